"""Compare servers below one small application: how fast they are, and which of them a client that never finishes can hold.

    pip install granian uvicorn httptools uvloop hypercorn gunicorn waitress
    python results/service/bench_servers.py        # writes servers.json beside this file; five minutes

The application answers GET with two bytes, and POST with 250 kB after it has read the body, for which it takes 5 s at most.
Where a server has a time limit for headers or for silence, it is 5 s. A held connection sends a byte a second; after 15 s it
counts as never closed. Rates are the best of three rounds over all servers.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from importlib.metadata import version
from pathlib import Path
from typing import Any

APP = '''
import asyncio

async def reply(send, status, body, *headers):
    headers = [(b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

async def lifespan(receive, send):
    for _ in range(2):
        await send({"type": (await receive())["type"] + ".complete"})

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    if scope["method"] == "GET":
        return await reply(send, 200, b"ok")
    try:
        async with asyncio.timeout(5):
            while (await receive()).get("more_body"):
                pass
    except TimeoutError:
        return await reply(send, 408, b"", (b"connection", b"close"))
    await reply(send, 200, bytes(250_000))

def wsgi(request, start):
    body = b"ok"
    if request["REQUEST_METHOD"] == "POST":
        request["wsgi.input"].read(int(request["CONTENT_LENGTH"]))
        body = bytes(250_000)
    start("200 OK", [("Content-Length", str(len(body)))])
    return [body]
'''
HYPERCORN = "import asyncio, app; from hypercorn.config import Config; from hypercorn.asyncio import serve; c = Config(); " \
            "c.bind, c.read_timeout, c.keep_alive_timeout = ['127.0.0.1:PORT'], 5, 5; asyncio.run(serve(app.app, c))"
UVICORN = "-m uvicorn --port PORT --no-access-log"
GUNICORN = "-m gunicorn -b 127.0.0.1:PORT --keep-alive 5"
SERVERS = {  # name → arguments of Python
    "granian": "-m granian --interface asgi --http 1 --port PORT --http1-header-read-timeout 5000 app:app".split(),
    "uvicorn h11": f"{UVICORN} --http h11 app:app".split(),
    "uvicorn httptools": f"{UVICORN} --http httptools --loop uvloop app:app".split(),
    "hypercorn": ["-c", HYPERCORN],
    "gunicorn asgi": f"{GUNICORN} -k asgi app:app".split(),
    "gunicorn threads": f"{GUNICORN} -k gthread --threads 8 app:wsgi".split(),
    "waitress": "-m waitress --listen 127.0.0.1:PORT --threads 8 --channel-timeout 5 --cleanup-interval 1 app:wsgi".split()}
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
CLIENTS = 50
SECONDS = 2
NEVER = 15
ROUNDS = 3


async def ask(port: int, request: bytes, end: float, latencies: list[float]) -> None:
    "Send one request after the other on one connection."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < end:
        start = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        latencies.append(time.perf_counter() - start)
    writer.close()


async def rate(port: int, request: bytes) -> tuple[int, float]:  # requests/s, 95th percentile of the latency, ms
    latencies: list[float] = []
    start = time.perf_counter()
    await asyncio.gather(*(ask(port, request, start + SECONDS, latencies) for _ in range(CLIENTS)))
    n = len(latencies)
    return round(n / (time.perf_counter() - start)), round(1e3 * sorted(latencies)[95 * n // 100], 1)


async def held(port: int, begin: bytes, most: float) -> float | None:  # s; None: never
    "Time until the server closes a connection that sends a byte a second."
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(begin)
    closed = asyncio.ensure_future(reader.read())
    while not closed.done() and time.perf_counter() < start + most:
        writer.write(b"x")
        await asyncio.wait((closed,), timeout=1)
    found = round(time.perf_counter() - start, 1) if closed.done() else None
    closed.cancel()
    writer.close()
    return found


async def closing_times(port: int) -> dict[str, Any]:
    headers, body = await asyncio.gather(held(port, b"GET / HTTP/1.1\r\nX-", NEVER), held(port, POST, NEVER))
    return {"unfinished_headers_closed_s": headers, "unfinished_body_closed_s": body}


async def rates(port: int) -> dict[str, Any]:
    (fast, p95), (large, _) = await rate(port, GET), await rate(port, POST + bytes(1000))
    begins = [b"GET / HTTP/1.1\r\nX-", POST] * 10
    tasks = [asyncio.ensure_future(held(port, begin, SECONDS + 1)) for begin in begins]
    await asyncio.sleep(0.5)
    beside, _ = await rate(port, GET)
    await asyncio.gather(*tasks)
    return {"requests_per_s": fast, "p95_ms": p95, "answers_of_250_kB_per_s": large, "requests_per_s_beside_20_held": beside}


def served(arguments: list[str], folder: str, work: Any) -> Any:
    "The result of work on a port where a server listens."
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, *(part.replace("PORT", str(port)) for part in arguments)], cwd=folder,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        task: Coroutine[Any, Any, Any] = work(port)
        return asyncio.run(task)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "app.py").write_text(APP)
        for name, arguments in SERVERS.items():
            found[name] = {"version": version(name.split()[0]), **served(arguments, folder, closing_times)}
        for _ in range(ROUNDS):
            for name, arguments in SERVERS.items():
                for key, value in served(arguments, folder, rates).items():
                    better = min if key == "p95_ms" else max
                    found[name][key] = better(value, found[name].get(key, value))
    report = {"clients": CLIENTS, "cores": os.cpu_count(), "load_after": round(os.getloadavg()[0], 2), "servers": found}
    Path(__file__).with_name("servers.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
