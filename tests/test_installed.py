"""An installed checkout is found from any folder."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import tomat
from tomat.prediction.predictors import load_predictor
print(tomat.__file__, load_predictor().kind, sep="\\n")
"""


def test_the_folder_above_a_checkout_called_tomat(tmp_path):
    "There the checkout itself, tomat/ without a module in it, is on Python's path before the installed package."
    (tmp_path / "tomat").symlink_to(ROOT)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\nInstall with --config-settings editable_mode=compat, as `make install` does."
    assert done.stdout.splitlines() == [str(ROOT / "tomat" / "__init__.py"), "probe"]
