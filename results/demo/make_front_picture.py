"""The picture at the top of README and site: results/demo/front.png, a held-out material of the sample by the packaged network.

    python results/demo/make_front_picture.py
"""
from dataclasses import replace
from pathlib import Path

from tomat.density.regrid import supercell
from tomat.density.store import sample_store
from tomat.io.files import atomic_write
from tomat.prediction.predictors import load_predictor
from tomat.prediction.pictures import slices_png

PICTURE, COPIES = "MoC", (2, 2, 1)  # a held-out material; cells that are drawn


def main() -> None:
    store = sample_store()
    true = next(density for density in map(store.read, store.split("validation")) if density.formula == PICTURE)
    predicted = load_predictor().predict(true.structure, true.shape)
    shown = replace(predicted, density=supercell(predicted.density, COPIES))
    with atomic_write(Path(__file__).with_name("front.png")) as aside:
        aside.write_bytes(slices_png(supercell(true, COPIES), {"predicted": shown}))


if __name__ == "__main__":
    main()
