"""Load a service on this machine with 200 requests at once, beside clients that never finish theirs, and for a longer time.

    python results/service/bench_service.py [--soak 600]      # writes bench.json beside this file; Linux

`tomat serve` runs with its default limits and one thread. A request is rock salt on 24 × 24 × 24 points, its answer a CHGCAR
of 252 kB. A client that gets status 503 comes back after the time that the answer names.

burst: 200 clients at once, while ten connections have unfinished headers and ten unfinished bodies; one that the server closes
is opened again. The latency of a client is the time from its first attempt to its answer.
soak: four clients send requests one after the other, of which some are wrong, some are never finished, and some clients hang up.
Memory is that of all processes of the service together (Pss: shared pages count once).
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tomat.prediction.worker import ServiceLimits

CLIENTS = 200
HELD = 10
POSCAR = b"NaCl\n1\n0 2.82 2.82\n2.82 0 2.82\n2.82 2.82 0\nNa Cl\n1 1\ndirect\n0 0 0\n.5 .5 .5\n"
PATH = "/?grid=24,24,24"
UNFINISHED = (b"GET / HTTP/1.1\r\nHo", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\nNaCl\n")
SOAK = [(PATH, POSCAR)] * 12 + [(f"/?grid=16,18,20&format={name}", POSCAR) for name in ("chgcar", "cube", "mp-json", "zarr")] + [
    ("/?grid=99999,99999,99999", POSCAR), ("/", b"no crystal"), ("/?gird=1", POSCAR), ("/", bytes(1 << 21))]


def post(port: int, path: str = PATH, body: bytes = POSCAR) -> tuple[int, float]:  # status, s of Retry-After
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
        connection.request("POST", path, body)
        reply = connection.getresponse()
        reply.read()
        return reply.status, float(reply.headers.get("Retry-After", 0))


@contextmanager
def service() -> Iterator[tuple[int, int]]:  # its port and its process
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOMAT_PROGRESS": "0"}
    server = subprocess.Popen([sys.executable, "-m", "tomat.cli", "serve", "--port", str(port), "--device", "cpu"], env=env)
    while server.poll() is None:
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    try:
        post(port)
        yield port, server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


@contextmanager
def unfinished(port: int) -> Iterator[Counter[str]]:  # number of connections that were opened, and closed by the server
    "Connections that are never finished, opened again whenever the server closes them."
    counts, done = Counter[str](), threading.Event()

    def hold(start: bytes) -> None:
        while not done.is_set():
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.settimeout(1)
                connection.sendall(start)
                counts["opened"] += 1
                while not done.is_set():
                    try:
                        if not connection.recv(1000):
                            counts["closed by the server"] += 1
                            break
                    except TimeoutError:
                        continue
    with ThreadPoolExecutor(2 * HELD) as pool:
        futures = [pool.submit(hold, start) for start in UNFINISHED * HELD]
        try:
            yield counts
        finally:
            done.set()
    for future in futures:
        future.result()


def until_answered(port: int, begin: threading.Barrier) -> dict[str, float]:
    begin.wait()
    start, refused = time.perf_counter(), [0.0]
    while True:
        attempt = time.perf_counter()
        status, wait = post(port)
        if status == 200:
            return {"latency": time.perf_counter() - start, "refusal": max(refused), "refusals": len(refused) - 1}
        assert status == 503 and wait >= 1, (status, wait)
        refused.append(time.perf_counter() - attempt)
        time.sleep(wait)


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {name: round(ordered[len(ordered) * n // 100], 3) for name, n in (("p50_s", 50), ("p95_s", 95))}


def burst(port: int) -> dict[str, Any]:
    "Many clients at once, beside some that never finish."
    begin = threading.Barrier(CLIENTS)
    with unfinished(port) as counts, ThreadPoolExecutor(CLIENTS) as pool:
        start = time.perf_counter()
        found = list(pool.map(lambda _: until_answered(port, begin), range(CLIENTS)))
        seconds = time.perf_counter() - start
    return {"clients": CLIENTS, "answered": len(found), "answered_at_first": sum(not one["refusals"] for one in found),
            "most_refusals_of_a_client": int(max(one["refusals"] for one in found)),
            "longest_refusal_s": round(max(one["refusal"] for one in found), 3), "requests_per_s": round(len(found) / seconds, 2),
            **percentiles([one["latency"] for one in found]), "unfinished": {"at_once": 2 * HELD, **counts}}


def alone(port: int, n: int = 50) -> dict[str, Any]:
    "One client, one request after the other."
    times = []
    for _ in range(n):
        start = time.perf_counter()
        assert post(port)[0] == 200
        times.append(time.perf_counter() - start)
    return {"requests": n, "requests_per_s": round(n / sum(times), 2), **percentiles(times)}


def memory(pid: int) -> float:  # MB
    "Memory of a process and all below it."
    total = 0.0
    todo = [pid]
    for one in todo:
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            for task in Path(f"/proc/{one}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has ended
        total += int(rollup.split("Pss:")[1].split()[0]) / 1024
    return round(total, 1)


def hang_up(port: int) -> None:
    "A whole request whose answer nobody waits for."
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (PATH.encode(), len(POSCAR), POSCAR))


def soak(port: int, pid: int, seconds: float) -> dict[str, Any]:
    "Mixed requests for a time, and the memory meanwhile."
    end, statuses, samples = time.monotonic() + seconds, Counter[str](), []

    def client(first: int) -> None:
        status: int | str
        for n in itertools.count(first):
            if time.monotonic() > end:
                return
            if n % 10 == 0:
                hang_up(port)
                statuses["hung up"] += 1
            try:
                status, wait = post(port, *SOAK[n % len(SOAK)])
            except (OSError, http.client.HTTPException) as err:
                status, wait = type(err).__name__, 0.0
            statuses[str(status)] += 1
            time.sleep(wait)
    with unfinished(port) as counts, ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(client, 5 * n) for n in range(4)]
        while time.monotonic() < end:
            samples.append(memory(pid))
            time.sleep(seconds / 60)
    for future in futures:
        future.result()
    tenth = samples[len(samples) // 10:]
    half = len(tenth) // 2
    means = [round(sum(part) / len(part), 1) for part in (tenth[:half], tenth[half:])]
    return {"seconds": seconds, "requests": statuses.total(), "statuses": dict(sorted(statuses.items())),
            "unfinished": {"at_once": 2 * HELD, **counts}, "memory_MB": samples, "mean_of_halves_after_the_first_tenth_MB": means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soak", type=float, default=600, help="seconds of the soak (default 600)")
    args = parser.parse_args()
    report: dict[str, Any] = {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2),
                              "queue": ServiceLimits().queue}
    with service() as (port, pid):
        for name, part in {"alone": alone, "burst": burst, "soak": lambda port: soak(port, pid, args.soak)}.items():
            report[name] = part(port)
            print(name, json.dumps(report[name]), flush=True)
    Path(__file__).with_name("bench.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
