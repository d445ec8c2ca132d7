"""Train on GPUs of Modal: A100:1, :2, :4 or :8, a process each; the run goes to runs/NAME of the volume.

    modal run scripts/train_modal.py::train --label train-full --gpu A100:8 --options "model=30M steps=5000 batch_size=128"
    python scripts/train_modal.py --label train-full [--dry-run | --here FOLDER]    # no account is needed

Options are the fields of tomat.train.config's TrainConfig and Setup, and each can also be a variable such as TOMAT_STEPS.
"""
from tomat.run.launch import command_line, modal_app, modal_function, sentences, submit, train_jobs

app = modal_app("train")
run = modal_function(app)


@app.local_entrypoint()
@sentences
def train(label: str = "", gpu: str = "A100:1", options: str = "", val_label: str = "", name: str = "", here: str = "",
          dry_run: bool = False) -> None:
    "Begun again, a run goes on where it was."
    submit(train_jobs(label, gpu, options, val_label, name, here), app, run, here, dry_run)


if __name__ == "__main__":
    command_line(train)
