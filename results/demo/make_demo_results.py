"""Run the demo and keep what README and site show of it: results/demo/scores.json.

    python results/demo/make_demo_results.py
"""
import tempfile
from pathlib import Path

from tomat.demo import demo
from tomat.io.files import read_json, write_json

RESULTS = Path(__file__).resolve().parent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        demo(folder)
        found = read_json(f"{folder}/scores.json")
        kept = {name: found[name] for name in ("summary", "materials", "skipped", "notes")}
        write_json(RESULTS / "scores.json", kept)
    print(f"wrote {RESULTS / 'scores.json'}")


if __name__ == "__main__":
    main()
