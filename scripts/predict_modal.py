"""A service on Modal that predicts: POST a POSCAR or a CIF, get a CHGCAR.  The checkpoint is loaded once a container.

    TOMAT_CHECKPOINT=/data/runs/NAME/model modal deploy scripts/predict_modal.py    # without it, the packaged checkpoint
    curl --data-binary @POSCAR 'URL/?grid=48,48,48' -o CHGCAR
    python scripts/predict_modal.py [--checkpoint RUN/model] [--dry-run]    # serve on this machine; no account is needed
"""
from typing import Any

from tomat.run.launch import (carry_out, command_line, modal_app, modal_needs, modal_options, proxy_auth, sentences,
                              serve_here, serve_job)

app = modal_app("predict")

import modal  # after modal_app, which says what to do where it is missing


@app.cls(**modal_options(), **modal_needs(serve_job().resources))
class Service:
    "Structure → density."

    @modal.enter()
    def load(self) -> None:
        "Once, when the container begins."
        self.application = carry_out(serve_job().text)

    @modal.wsgi_app(requires_proxy_auth=proxy_auth())
    def web(self) -> Any:
        "What answers requests."
        return self.application


@app.local_entrypoint()
@sentences
def serve(checkpoint: str = "", port: int = 8000, dry_run: bool = False) -> None:
    "On this machine, until somebody stops it."
    serve_here(serve_job(checkpoint), port, dry_run)


if __name__ == "__main__":
    command_line(serve)
