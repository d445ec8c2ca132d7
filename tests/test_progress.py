"""Maps over processes: in order, bounded, and no process left behind, whoever is killed."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tomat.io.remote import TomatError
from tomat.io.progress import in_order, silent, track


def square(x):
    return x * x


def die(x):
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def refuse(x):
    if x == 3:
        raise TomatError(f"{x} is not to our taste: give another.")
    return x


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 7, 40])
def test_results_come_in_order(workers, n):
    assert list(in_order(square, range(n), workers)) == [x * x for x in range(n)]


def test_a_few_items_a_worker_are_under_way():
    asked = []
    results = in_order(square, (asked.append(i) or i for i in itertools.count()), workers=2)
    for i, result in zip(range(20), results, strict=False):
        assert result == i * i and len(asked) <= i + 6
    results.close()


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(TomatError, match=r"worker process was killed.*fewer workers"):
        list(in_order(die, range(10), workers=2))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_sentence_of_a_worker_arrives(workers):
    with pytest.raises(TomatError, match="3 is not to our taste"):
        list(in_order(refuse, range(10), workers))


SCRIPT = """
import os, sys, time
from tomat.io.progress import in_order, _context
def work(x):
    print(os.getpid(), flush=True)
    time.sleep(60)
if __name__ == "__main__":
    print(_context().get_start_method(), flush=True)
    if sys.argv[1] == "forkserver":
        import threading
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    list(in_order(work, range(4), 2))
"""


def alive(pid):
    "Whether a process runs; one that nobody has waited for yet does not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("how", ["fork", "forkserver"])
def test_the_children_of_a_killed_parent_end(tmp_path, how):
    (tmp_path / "job.py").write_text(SCRIPT)
    run = subprocess.Popen([sys.executable, tmp_path / "job.py", how], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline().strip() == "fork"
    children = [int(run.stdout.readline()) for _ in range(2)]
    run.kill()
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 30
    while any(map(alive, children)):
        assert time.monotonic() < deadline, "a child lives on"
        time.sleep(0.05)


def test_a_bar_inside_a_bar_is_silent(monkeypatch):
    monkeypatch.delenv("TOMAT_PROGRESS", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert not silent()
    for _ in track([1], "outer"):
        assert silent() and list(track([1, 2], "inner")) == [1, 2]
    assert not silent()
