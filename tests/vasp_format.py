"""The form in which VASP writes a CHGCAR, line by line: columns, widths and order. It knows nothing of tomat's reader."""

import re

NUMBER = r"(?: |-)?0?\.\d{%d}E[+-]\d{2}"


def rows(lines, n, width, digits, what):
    "The next n numbers, five a line, each in as many columns; raises AssertionError for another form."
    pattern = re.compile(NUMBER % digits)
    for start in range(0, n, 5):
        line, count = next(lines).rstrip(), min(5, n - start)  # VASP writes spaces behind a short line
        fields = [line[i * width:(i + 1) * width] for i in range(count)]
        assert len(line) == count * width, f"{what}: {len(line)} columns for {count} numbers: {line!r}"
        assert all(pattern.fullmatch(field.strip()) for field in fields), f"{what}: {line!r}"


def check_vasp_format(text):
    """Check a whole file; returns the sizes of the grid, the number of blocks, and for each block the number of its occupancies.

    Raises AssertionError at the first line that Fortran's formats of VASP would not give."""
    lines = iter(text.replace("\r\n", "\n").split("\n"))
    next(lines)
    assert re.fullmatch(r" *\d+\.\d{8,} *", next(lines)), "scale"
    for _ in range(3):
        assert len(next(lines).split()) == 3, "lattice"
    symbols, counts = next(lines).split(), [int(word) for word in next(lines).split()]
    assert len(symbols) == len(counts) and min(counts) > 0 and all(re.fullmatch("[A-Z][a-z]?", s) for s in symbols), "elements"
    assert next(lines).startswith("Direct"), "coordinates are fractions"
    for _ in range(sum(counts)):
        assert len([float(word) for word in next(lines).split()]) == 3, "coordinates"
    assert not next(lines).strip(), "a blank line stands before the grid"
    sizes, occupancies, line = None, [], next(lines)
    while line:
        assert re.fullmatch(r"(?: {1,4}\d{1,4}){3}", line) and len(line) == 15, f"sizes of the grid: {line!r}"
        assert sizes in (None, line), "all grids have one size"
        sizes = line
        a, b, c = map(int, line.split())
        rows(lines, a * b * c, 18, 11, "density")
        line, found = next(lines), []
        while line.startswith("augmentation"):
            label = re.fullmatch(r"augmentation occupancies([ \d]{4})([ \d]{4})", line)
            assert label and int(label[1]) == len(found) + 1, f"label: {line!r}"
            found.append(int(label[2]))
            rows(lines, found[-1], 15, 7, "occupancies")
            line = next(lines)
        occupancies.append(found)
        if line and len(line) != 15:  # moments of the atoms stand before a grid of spin
            n = sum(counts)
            rows(iter([line, *(next(lines) for _ in range((n - 1) // 5))]), n, 20, 12, "moments")
            line = next(lines)
    assert not any(lines) and len(occupancies) in (1, 2, 4), "nothing follows"
    return tuple(map(int, sizes.split())), len(occupancies), occupancies
