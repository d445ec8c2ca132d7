"""Copy rows or a run from Modal's volume to its bucket, with checksums; what is there already is skipped.

    TOMAT_TOKEN_STORE=… modal run scripts/sync_modal.py::copy --name val-full
    TOMAT_CHECKPOINT_STORE=… modal run scripts/sync_modal.py::copy --name NAME --kind runs
    python scripts/sync_modal.py --name val-full [--dry-run | --here FOLDER]    # no account is needed
"""
from tomat.run.launch import command_line, modal_app, modal_function, sentences, submit, sync_jobs

app = modal_app("sync")
run = modal_function(app)


@app.local_entrypoint()
@sentences
def copy(name: str = "val-smoke", kind: str = "rows", here: str = "", dry_run: bool = False) -> None:
    "From rows/NAME or runs/NAME of the volume to the bucket that the settings name; its keys are in TOMAT_MODAL_SECRETS."
    submit(sync_jobs(name, kind, here), app, run, here, dry_run)


if __name__ == "__main__":
    command_line(copy)
