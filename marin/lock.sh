#!/bin/sh
# Write requirements.lock and requirements-tpu.lock anew from pyproject.toml: `sh marin/lock.sh`.  Needs uv, which marin/.venv has.
set -eu
cd "$(dirname "$0")"
PATH=$PATH:.venv/bin
compile() { uv pip compile -q --python-version 3.12 --generate-hashes --no-annotate --no-header --no-emit-index-url "$@"; }
compile --universal --output-file requirements.lock pyproject.toml
{ echo "-r requirements.lock"; sed -n 's/^tpu = \["\(.*\)"\].*/\1/p' pyproject.toml | compile --no-deps -; } > requirements-tpu.lock
