"""The launcher with one more model size, `tiny`, that takes tests seconds; `sizes` of the library keeps it out of users' way."""

import sys
from pathlib import Path

MARIN = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(MARIN), str(MARIN.parent)]

from tomat.models.sizes import MODELS, ModelSize

MODELS["tiny"] = ModelSize(width=64, layers=2, heads=2, mlp=128, kv_heads=1)

if __name__ == "__main__":
    from train_tomat_tpu import main
    main()
