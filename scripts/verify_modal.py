"""Read rows on Modal's volume again: hashes, every row, the counts of meta.json.

    modal run scripts/verify_modal.py::check --label val-full
    python scripts/verify_modal.py --label val-full [--dry-run | --here FOLDER]    # needs modal, no account
"""
from tomat.run.launch import VerifyLaunch, command_line, launcher, modal_app, modal_function, submit

app = modal_app("verify")
run = modal_function(app)


@app.local_entrypoint()
@launcher(VerifyLaunch)
def check(options: VerifyLaunch) -> None:
    "Check the rows of a label. A fault ends the program with a sentence."
    submit(options.stages(), app, run, options.here, options.dry_run)


if __name__ == "__main__":
    command_line(check)
