"""Measure by many workers on Modal what each way of writing a density loses; the table goes to tables/NAME.csv of the volume.

    modal run scripts/fidelity_sweep_modal.py::sweep --split validation --n-workers 16
    python scripts/fidelity_sweep_modal.py --source densities/ [--dry-run | --here FOLDER]    # needs modal, no account
"""
from tomat.run.launch import SweepLaunch, command_line, launcher, modal_app, modal_function, submit

app = modal_app("fidelity")
run = modal_function(app)


@app.local_entrypoint()
@launcher(SweepLaunch)
def sweep(options: SweepLaunch) -> None:
    "Every worker measures its stretch of the materials; a last job joins their tables."
    submit(options.stages(), app, run, options.here, options.dry_run)


if __name__ == "__main__":
    command_line(sweep)
