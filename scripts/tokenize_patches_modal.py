"""Tokenize a data set of settings.ini by many workers on Modal; its rows go to rows/LABEL of the volume.

    modal run scripts/tokenize_patches_modal.py::parallel --label val-full --split validation --n-workers 16
    python scripts/tokenize_patches_modal.py --label val-full [--dry-run | --here FOLDER]    # needs modal, no account
"""
from tomat.run.launch import TokenizeLaunch, command_line, launcher, modal_app, modal_function, submit

app = modal_app("tokenize")
run = modal_function(app)


@app.local_entrypoint()
@launcher(TokenizeLaunch)
def parallel(options: TokenizeLaunch) -> None:
    "Every worker makes its part of the rows. Started again, each goes on where it stopped."
    submit(options.stages(), app, run, options.here, options.dry_run)


if __name__ == "__main__":
    command_line(parallel)
