"""Tokenize a data set of settings.ini by many workers on Modal; its rows go to rows/LABEL of the volume.

    modal run scripts/tokenize_patches_modal.py::parallel --label val-full --split validation --n-workers 16
    python scripts/tokenize_patches_modal.py --label val-full [--dry-run | --here FOLDER]    # no account is needed
"""
from tomat.run.launch import command_line, modal_app, modal_function, sentences, submit, tokenize_jobs

app = modal_app("tokenize")
run = modal_function(app)


@app.local_entrypoint()
@sentences
def parallel(label: str = "val-smoke", split: str = "", n_workers: int = 16, materials: int = 0, source: str = "",
             cores: int = 4, here: str = "", dry_run: bool = False) -> None:
    "Every worker makes its part of the rows; begun again, each goes on where it was."
    submit(tokenize_jobs(label, split, n_workers, materials, source, cores, here), app, run, here, dry_run)


if __name__ == "__main__":
    command_line(parallel)
