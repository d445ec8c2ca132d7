"""The library on an export, in its own Python with torch: `python torch_side.py EXPORT ROWS VAL_SEQS EMD SOFT NOISE OUT`."""

import json
import sys
from itertools import islice

import numpy as np
import torch

from tomat.dataset.held_out import train_and_val, validation_rows
from tomat.dataset.noise import HistoryNoise
from tomat.dataset.stream import Batches
from tomat.models.causal import load_checkpoint
from tomat.models.loss import LossModule
from tomat.models.objective import objective_of


def main(export: str, rows: str, val_seqs: str, emd: str, soft: str, noise: str, out: str) -> None:
    model, tokenizer = load_checkpoint(export)
    train, val = train_and_val(rows, 0, 1024, int(val_seqs), None)
    block, _ = validation_rows(val, int(val_seqs))
    ids_BxL = block.ids.long()
    loss_module = LossModule(model, objective_of(tokenizer, emd=float(emd), soft=float(soft)))
    with torch.no_grad():
        logits_BxLxV = model(ids_BxL[:4]).logits
        places_T = loss_module.positions(ids_BxL)
        hidden = HistoryNoise(tokenizer, 1.0, 0)(ids_BxL.numpy(), np.arange(len(ids_BxL))) if noise == "1" else ids_BxL.numpy()
        read_BxL = torch.from_numpy(hidden)
        loss = float(loss_module(ids_BxL, places_T, read_BxL)) / len(places_T)
    held_out = {val.names[i] for window in val for i in window.materials.tolist()}
    train_ids = torch.cat([batch.ids for batch in islice(Batches(train, 8, pad_to=256), 20)]).numpy()
    read_ids = HistoryNoise(tokenizer, float(noise), 0)(train_ids, np.arange(len(train_ids))) if float(noise) else train_ids
    np.savez(out, ids=ids_BxL[:4].numpy(), logits=logits_BxLxV.numpy(), train_ids=train_ids, read_ids=read_ids,
             found=json.dumps({"loss": loss, "held_out": sorted(held_out)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
