"""A service on Modal that predicts: POST a POSCAR or a CIF, get a CHGCAR.  Each container loads the checkpoint once.

    TOMAT_CHECKPOINT=/data/runs/NAME/model modal deploy scripts/predict_modal.py    # without it, the packaged checkpoint
    curl --data-binary @POSCAR 'URL/?grid=48,48,48' -o CHGCAR
    python scripts/predict_modal.py [--checkpoint RUN/model] [--dry-run]    # `tomat serve`, on this machine; needs no account
"""
from typing import Any

from tomat.prediction.worker import service_limits
from tomat.run.jobs import carry_out
from tomat.run.launch import (ServeLaunch, command_line, launcher, modal_app, modal_needs, modal_options, proxy_auth, serve_here,
                              serve_job)

app = modal_app("predict")

import modal  # after modal_app, which says what to do where it is missing


@app.cls(**modal_options(), **modal_needs(serve_job().resources))
@modal.concurrent(max_inputs=service_limits().workers + service_limits().queue)  # beyond, Modal starts another container
class Service:
    "Structure → density."

    @modal.enter()
    def load(self) -> None:
        "Make the application, once when the container starts."
        self.application = carry_out(serve_job().text)

    @modal.asgi_app(requires_proxy_auth=proxy_auth())
    def web(self) -> Any:
        "The application that answers requests; its processes load the checkpoint."
        return self.application


@app.local_entrypoint()
@launcher(ServeLaunch)
def serve(options: ServeLaunch) -> None:
    "Serve on this machine until the process is stopped."
    serve_here(options)


if __name__ == "__main__":
    command_line(serve)
