"""What the library says of an export, in its own Python with torch: `python torch_side.py EXPORT ROWS VAL_SEQS EMD OUT`."""

import json
import sys

import numpy as np
import torch

from tomat.dataset.held_out import validation_rows, train_and_val
from tomat.models.loss import LossModule, objective_of
from tomat.models.causal import load_checkpoint


def main(export: str, rows: str, val_seqs: str, emd: str, out: str) -> None:
    model, tokenizer = load_checkpoint(export)
    _, held_out = train_and_val(rows, 0, 1024, int(val_seqs), None)
    block, _ = validation_rows(held_out, 0)
    ids_BxL = block.ids.long()
    learner = LossModule(model, objective_of(tokenizer, emd=float(emd)))
    with torch.no_grad():
        logits_BxLxV = model(ids_BxL[:4]).logits
        places_T = learner.places(ids_BxL)
        loss = float(learner(ids_BxL, places_T)) / len(places_T)
    facts = {"loss": loss, "held_out": sorted({held_out.names[i] for i in block.materials.tolist()})}
    np.savez(out, ids=ids_BxL[:4].numpy(), logits=logits_BxLxV.numpy(), facts=json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
