"""Run the demo and keep what README and site show of it: results/demo/scores.json and slices.png.

    python results/demo/make_demo_results.py
"""
import tempfile
from pathlib import Path

from tomat.demo import demo
from tomat.io.files import read_json, atomic_write, write_json
from tomat.prediction.predictors import load_predictor
from tomat.prediction.report import slices_png
from tomat.density.store import sample_store

RESULTS = Path(__file__).resolve().parent
PICTURE = "MoC"  # a held-out material


def main() -> None:
    store = sample_store()
    true = next(density for density in map(store.read, store.split("validation")) if density.formula == PICTURE)
    with tempfile.TemporaryDirectory() as folder:
        demo(folder)
        found = read_json(f"{folder}/scores.json")
        kept = {name: found[name] for name in ("summary", "materials", "skipped", "notes")}
        write_json(RESULTS / "scores.json", kept)
        predictor = load_predictor(f"{folder}/probe/model")
        png = slices_png(true, {"probe": predictor.predict(true.structure, true.shape)})
    with atomic_write(RESULTS / "slices.png") as aside:
        aside.write_bytes(png)
    print(f"wrote {RESULTS / 'scores.json'} and {RESULTS / 'slices.png'}")


if __name__ == "__main__":
    main()
