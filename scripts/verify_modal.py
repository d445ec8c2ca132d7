"""Read rows on Modal's volume again: hashes, every row, the counts of meta.json.

    modal run scripts/verify_modal.py::check --label val-full
    python scripts/verify_modal.py --label val-full [--dry-run | --here FOLDER]    # no account is needed
"""
from tomat.run.launch import command_line, modal_app, modal_function, sentences, submit, verify_jobs

app = modal_app("verify")
run = modal_function(app)


@app.local_entrypoint()
@sentences
def check(label: str = "val-smoke", cores: int = 4, here: str = "", dry_run: bool = False) -> None:
    "Check the rows of a label; whatever is wrong ends it with a sentence."
    submit(verify_jobs(label, cores, here), app, run, here, dry_run)


if __name__ == "__main__":
    command_line(check)
