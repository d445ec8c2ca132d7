"""Commands on a disk that is full: run by `test_disk.py` with a list of commands, in a mount namespace of its own.

Each command writes to disk/NAME: once with room, then on a disk where nothing or half of that fits, and there once more with room.
The exit codes, what was printed and the files after each run are printed as JSON.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tomat import cli

DISK = Path("disk")


def run(words: list[str]) -> dict[str, object]:
    "A command: exit code, text on standard error, and files by content."
    sys.argv, err, code = ["tomat", *words], io.StringIO(), 0
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    files = {str(path.relative_to(DISK)): hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "folder"
             for path in sorted(DISK.rglob("*"))}
    return {"code": code, "err": err.getvalue(), "files": files}


def resize(n_kb: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={n_kb}k", DISK], check=True)


def clear() -> None:
    for path in DISK.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    found = []
    for words in json.loads(sys.argv[1]):
        resize(1 << 20)
        whole = run(words)
        space = os.statvfs(DISK)
        used_kb = (space.f_blocks - space.f_bfree) * space.f_bsize // 1024
        clear()
        for n_kb in (4, max(8, used_kb // 2)):
            resize(n_kb)
            full = run(words)
            resize(1 << 20)
            found.append({"words": words, "kb": n_kb, "used_kb": used_kb, "whole": whole, "full": full, "again": run(words)})
            clear()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
