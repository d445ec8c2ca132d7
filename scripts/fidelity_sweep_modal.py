"""Measure by many workers on Modal what each way of writing a density loses; the table goes to tables/NAME.csv of the volume.

    modal run scripts/fidelity_sweep_modal.py::sweep --split validation --n-workers 16
    python scripts/fidelity_sweep_modal.py --source densities/ [--dry-run | --here FOLDER]    # no account is needed
"""
from tomat.run.launch import command_line, modal_app, modal_function, sentences, submit, sweep_jobs

app = modal_app("fidelity")
run = modal_function(app)


@app.local_entrypoint()
@sentences
def sweep(name: str = "fidelity", split: str = "all", n_workers: int = 16, materials: int = 0, only: str = "", source: str = "",
          cores: int = 4, here: str = "", dry_run: bool = False) -> None:
    "Every worker measures its stretch of the materials; a last job puts their tables together."
    submit(sweep_jobs(name, split, n_workers, materials, only, source, cores, here), app, run, here, dry_run)


if __name__ == "__main__":
    command_line(sweep)
