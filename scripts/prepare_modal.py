"""Draw the voxels of a data set of settings.ini by many workers on Modal; they go to voxels/LABEL of the volume.

    modal run scripts/prepare_modal.py::parallel --label train-full --n-workers 16
    python scripts/prepare_modal.py --label val-full [--dry-run | --here FOLDER]    # needs modal, no account
"""
from tomat.run.launch import PrepareLaunch, command_line, launcher, modal_app, modal_function, submit

app = modal_app("prepare")
run = modal_function(app)


@app.local_entrypoint()
@launcher(PrepareLaunch)
def parallel(options: PrepareLaunch) -> None:
    "One job chooses the atoms, then every worker makes its part. Started again, each goes on where it stopped."
    submit(options.stages(), app, run, options.here, options.dry_run)


if __name__ == "__main__":
    command_line(parallel)
