"""Train on GPUs of Modal: A100:1, :2, :4 or :8, one process each; the run goes to runs/NAME of the volume.

    modal run scripts/train_modal.py::train --label train-full --gpu A100:8 --options "size=30M steps=5000 batch_size=128"
    modal run scripts/train_modal.py::train --label train-full --decoder probe --size L --gpu A100:8
    python scripts/train_modal.py --label train-full [--dry-run | --here FOLDER]    # needs modal, no account

Options are the fields of TrainConfig or ProbeTrainConfig and RunConfig in tomat.train.config; each can also be a variable such
as TOMAT_STEPS. The language model trains on rows/LABEL of the volume, the probe network on voxels/LABEL.
"""
from tomat.run.launch import TrainLaunch, command_line, launcher, modal_app, modal_function, submit

app = modal_app("train")
run = modal_function(app)


@app.local_entrypoint()
@launcher(TrainLaunch)
def train(options: TrainLaunch) -> None:
    "Started again, a run goes on where it stopped."
    submit(options.stages(), app, run, options.here, options.dry_run)


if __name__ == "__main__":
    command_line(train)
