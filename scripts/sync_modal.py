"""Copy rows or a run from Modal's volume to its bucket, with checksums. Files that are already there are skipped.

    TOMAT_TOKEN_STORE=… modal run scripts/sync_modal.py::copy --name val-full
    TOMAT_CHECKPOINT_STORE=… modal run scripts/sync_modal.py::copy --name NAME --kind runs
    python scripts/sync_modal.py --name val-full [--dry-run | --here FOLDER]    # needs modal, no account
"""
from tomat.run.launch import SyncLaunch, command_line, launcher, modal_app, modal_function, submit

app = modal_app("sync")
run = modal_function(app)


@app.local_entrypoint()
@launcher(SyncLaunch)
def copy(options: SyncLaunch) -> None:
    "From rows/NAME or runs/NAME of the volume to the bucket of the settings; its keys are in TOMAT_MODAL_SECRETS."
    submit(options.stages(), app, run, options.here, options.dry_run)


if __name__ == "__main__":
    command_line(copy)
