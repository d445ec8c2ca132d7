"""Write requirements.txt: the exact versions of tomat's dependencies in this environment, for images of other machines.

    python scripts/make_lock.py            # after `make install`, on Linux with Python 3.11
    python scripts/make_lock.py --check    # only compare; exit code 1 where it is not what would be written

It holds what tomat[gcs,s3,serve,train,wandb] runs on, nothing for development.  PyTorch's libraries for GPUs are left to
PyTorch, which names their versions exactly.
"""
import argparse
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("gcs", "s3", "serve", "train", "wandb")
ROOT = Path(__file__).resolve().parents[1]
HEAD = """# The exact versions that tomat[{extras}] is tested with, Python {python}: written by scripts/make_lock.py.
"""


def needed(name: str, extras: set[str]) -> list[Requirement]:
    "What a package asks for here."
    required = [Requirement(text) for text in distribution(name).requires or []]
    return [r for r in required if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in {"", *extras})]


def declared() -> list[Requirement]:
    "What pyproject.toml asks for; an installed copy may be of an older one."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in EXTRAS)]
    return [Requirement(text) for part in lists for text in part]


def closure() -> dict[str, str]:  # name → version
    "Everything below tomat, whatever the depth."
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = declared()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name.startswith(("nvidia-", "cuda-", "triton")) or (name, str(sorted(wanted.extras))) in seen:
            continue
        seen.add((name, str(sorted(wanted.extras))))
        found[name] = distribution(wanted.name).version.partition("+")[0]  # torch names its build after a plus
        todo += needed(wanted.name, set(wanted.extras))
    return dict(sorted(found.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    head = HEAD.format(extras=",".join(EXTRAS), python=".".join(map(str, sys.version_info[:2])))
    text = head + "".join(f"{name}=={version}\n" for name, version in closure().items())
    path = ROOT / "requirements.txt"
    if check:
        return int(not path.exists() or path.read_text() != text)
    path.write_text(text)
    print(f"{path.name}: {text.count('==')} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
