"""An installed checkout is found from any folder."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import numpy as np
from crystals import assert_same, noise
from packaging.requirements import Requirement

from tomat.density.formats import read_density, write_density

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import tomat
from tomat.prediction.predictors import load_predictor
print(tomat.__file__, load_predictor().kind, sep="\\n")
"""


def test_the_folder_above_a_checkout_called_tomat(tmp_path):
    "There the checkout itself, tomat/ without a module in it, is on Python's path before the installed package."
    (tmp_path / "tomat").symlink_to(ROOT)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\nInstall with --config-settings editable_mode=compat, as `make install` does."
    assert done.stdout.splitlines() == [str(ROOT / "tomat" / "__init__.py"), "probe"]


def test_what_is_installed_is_what_is_required():
    "An environment that was not installed again would test other versions than users get."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [Requirement(text) for text in [*project["dependencies"], *extras["train"], *extras["serve"]]]
    found = [f"{one} is required, {version(one.name)} is installed" for one in required if version(one.name) not in one.specifier]
    assert not found and any(one.name == "pymatgen-core" for one in required)
    assert not {text for extra in extras.values() for text in extra} - {*extras["dev"]}


def test_occupancies_have_the_lines_that_vasp_reads(tmp_path):
    """pymatgen-core before 2026.8.30 put an empty line after each of them, which VASP calls corrupt.

    VASP reads a label of 24 columns and two numbers of four (`A24,2I4`), then lines of five numbers of 15 columns.
    """
    density = noise(np.random.default_rng(0), spin=("diff",), augmented=True)
    write_density(density, tmp_path / "CHGCAR")
    lines = (tmp_path / "CHGCAR").read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("augmentation occupancies")]
    assert len(starts) == 6  # two atoms in two blocks, one atom of each with an imaginary part
    for start in starts:
        n = int(lines[start][-4:])
        rows = lines[start + 1:start + 1 + -(-n // 5)]
        numbers = [float(row[at:at + 15]) for row in rows for at in range(0, len(row), 15)]
        assert len(numbers) == n and all(len(row) % 15 == 0 and len(row) <= 75 for row in rows)
    between = [line for line in lines[starts[0]:] if not line.strip()]
    assert not between
    assert_same(read_density(tmp_path / "CHGCAR", id=density.id), density)
