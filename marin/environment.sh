#!/bin/sh
# Make the environment of the TPU launcher: `sh marin/environment.sh [FOLDER] [tpu]`.  FOLDER: marin/.venv if not given.
# The packages are those of requirements.lock (with `tpu`, requirements-tpu.lock), checked against their hashes; tomat itself
# is taken from this checkout.  Done again only when the lock file or a folder has changed.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-$here/.venv}
lock=$here/requirements${2:+-$2}.lock
[ -f "$lock" ] || { echo "There is no $lock: the second argument is tpu, or nothing." >&2; exit 1; }
stamp=$venv/.made-$({ cat "$here"/requirements*.lock; echo "$lock"; } | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0

# A name can be on PATH and still not run (pyenv's), hence the trial.
found=
for python in python3.12 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; do
  if "$python" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then found=$python; break; fi
done
if [ -z "$found" ] && ! command -v uv >/dev/null; then
  echo "marin/ needs Python 3.12: it is not on PATH, and neither is uv, which could fetch it." >&2
  exit 1
fi

echo "making $venv with ${found:-uv} (about a minute, 2 GB)"
if [ -n "$found" ]; then "$found" -m venv --clear "$venv"; else uv venv -q --clear --python 3.12 "$venv"; fi
uv=$(command -v uv || echo "$venv/bin/uv")
if [ ! -x "$uv" ]; then
  awk '/^uv==/ { ours = 1 } ours { print } ours && !/\\$/ { exit }' "$here/requirements.lock" > "$venv/uv.lock"
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input --no-deps --require-hashes -r "$venv/uv.lock"
fi
"$uv" pip install -q --python "$venv/bin/python" --no-deps --require-hashes -r "$lock"
printf '%s\n' "$(dirname "$here")" "$here" > "$venv/lib/python3.12/site-packages/tomat-checkout.pth"
touch "$stamp"
