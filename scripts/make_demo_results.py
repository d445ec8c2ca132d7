"""Run the demo and keep what README and site show of it: results/demo/scores.json and slices.png.

    python scripts/make_demo_results.py
"""
import shutil
import tempfile
from pathlib import Path

from tomat.demo import demo
from tomat.evaluate import slices_png
from tomat.files import write_aside
from tomat.model import load_checkpoint
from tomat.predict import best_choice, predict
from tomat.store import sample_store

RESULTS = Path(__file__).resolve().parents[1] / "results" / "demo"
PICTURE = "MoC"  # a held-out material


def main() -> None:
    store = sample_store()
    true = next(density for density in map(store.read, store.split("validation")) if density.formula == PICTURE)
    with tempfile.TemporaryDirectory() as folder:
        files = demo(folder)["files"]
        shutil.copy(f"{folder}/scores.json", RESULTS / "scores.json")
        model, tokenizer = load_checkpoint(next(name for name in files if name.endswith("run/model")))
        png = slices_png(true, predict(true.structure, true.shape, model, tokenizer, best_choice(tokenizer)))
    with write_aside(RESULTS / "slices.png") as aside:
        aside.write_bytes(png)
    print(f"wrote {RESULTS / 'scores.json'} and {RESULTS / 'slices.png'}")


if __name__ == "__main__":
    main()
