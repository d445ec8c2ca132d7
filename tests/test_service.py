"""The service on loopback: answers, limits, clients that never finish, a full queue, and processes that hang or die.

A process that predicts is halted by a signal where it has to be busy, so that no test depends on the clock.
"""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from threading import Event

import httpx
import numpy as np
import pytest
from pymatgen.core import Structure

from tomat.density.formats import read_density
from tomat.io.limits import LIMITS
from tomat.io.remote import TomatError
from tomat.prediction.predictors import load_predictor
from tomat.prediction.worker import Options, ServiceError, ServiceLimits, WorkerQueue, service_limits
from tomat.run.launch import ServeLaunch
from tomat.run.service import _FileAnswer, density_app, serve

POSCAR = b"NaCl\n1\n0 2.82 2.82\n2.82 0 2.82\n2.82 2.82 0\nNa Cl\n1 1\ndirect\n0 0 0\n.5 .5 .5\n"
CROWD = b"x\n1\n9 0 0\n0 9 0\n0 0 9\nHe\n21\ndirect\n" + b"".join(b"%.3f 0 0\n" % (n / 21) for n in range(21))
SMALL = "/?grid=12,12,12"
TOKEN = {"Authorization": "Bearer schlüssel".encode()}
UNFINISHED = (b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\nAuthorization: %s\r\n\r\nNaCl\n"
              % TOKEN["Authorization"])


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    "The port of `tomat serve`, with limits of its own."
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    limits = {"READ_SECONDS": "2", "QUEUE": "2", "ATOMS": "20", "VOXELS": "9000", "BODY_BYTES": "2000", "TOKEN": "schlüssel"}
    folder = tmp_path_factory.mktemp("service")
    env = {**os.environ, **{f"TOMAT_SERVICE_{name}": value for name, value in limits.items()}, "TMPDIR": str(folder)}
    server = subprocess.Popen([sys.executable, "-m", "tomat.cli", "serve", "--port", str(number), "--device", "cpu"], env=env)
    while True:
        assert server.poll() is None
        try:
            assert request(number, "GET", "/health")[::2] == (200, {"status": "ok", "requests": 0, "workers": 1})
            break
        except ConnectionError:
            Event().wait(0.1)
    yield number
    server.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not [path for path in folder.iterdir() if (path / "request").exists()]


def request(port, method, path, body=None, headers=TOKEN):
    "Status, headers and body of an answer; JSON is read."
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        content = reply.read()
        is_json = content and reply.headers["Content-Type"] == "application/json"
        return reply.status, reply.headers, json.loads(content) if is_json else content


def test_a_structure_goes_in_and_its_density_comes_out(port, tmp_path):
    status, headers, body = request(port, "POST", f"{SMALL}&format=zarr", POSCAR)
    metadata = json.loads(headers["X-Tomat"])
    assert status == 200 and metadata["grid"] == [12, 12, 12] and metadata["out"] == "density.zarr.zip"
    (tmp_path / "x.zarr.zip").write_bytes(body)
    served = read_density(tmp_path / "x.zarr.zip")
    direct = load_predictor(device="cpu").predict(Structure.from_str(POSCAR.decode(), "poscar"), (12, 12, 12)).density
    np.testing.assert_allclose(served.total, direct.total, rtol=1e-4, atol=1e-4)


def test_the_service_describes_itself(port):
    status, _, about = request(port, "GET", "/")
    assert status == 200 and about["decoder"] == "probe" and about["limits"]["voxels"] == 9000
    assert "schlüssel" not in json.dumps(about, ensure_ascii=False)
    assert request(port, "HEAD", "/")[0] == 200


@pytest.mark.parametrize("path, body, status, sentence", [
    ("/?gird=1,2,3", POSCAR, 400, "no option 'gird'"), ("/?grid=1,2", POSCAR, 400, "three numbers"),
    ("/?name=../x.json", POSCAR, 400, r"POSCAR, \*.vasp or \*.cif"), ("/?format=xyz", POSCAR, 400, "no format 'xyz'"),
    ("/", b"", 400, "body is empty"), ("/", b"nothing", 422, "^POSCAR: "), ("/?name=x.cif", b"nothing", 422, "^x.cif: "),
    ("/?grid=99999,99999,99999", POSCAR, 413, "voxels"), ("/", POSCAR.replace(b"\n1\n", b"\n9\n"), 413, "voxels"),
    (SMALL, CROWD, 413, "21 atoms"), ("/", bytes(2001), 413, "2,000 bytes"),
    ("/", bytes(30_000), 413, "2,000 bytes"), ("/x", POSCAR, 404, "nothing at /x"),
    ("/health", POSCAR, 405, "POST is no method")])
def test_a_wrong_request_is_answered_with_a_sentence(port, path, body, status, sentence):
    found, _, error = request(port, "POST", path, body)
    assert found == status and list(error) == ["error"] and re.search(sentence, error["error"]), error
    assert error["error"].endswith(".") and tempfile.gettempdir() not in error["error"]


def test_a_body_without_a_length_is_limited_too(port):
    assert request(port, "POST", SMALL, iter([POSCAR[:20], POSCAR[20:]]))[0] == 200
    assert request(port, "POST", SMALL, iter([bytes(1500), bytes(1500)]))[0] == 413


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer schlusse"},
                                   {"Authorization": "schlüssel".encode()}])
def test_a_token_is_needed(port, given):
    for method, path in (("POST", SMALL), ("GET", "/")):
        status, headers, error = request(port, method, path, POSCAR, given)
        assert status == 401 and headers["WWW-Authenticate"] == "Bearer" and "token" in error["error"]
    assert request(port, "GET", "/health", None, given)[0] == 200


def test_unfinished_requests_are_closed_and_hold_nobody_up(port):
    held = [(socket.create_connection(("127.0.0.1", port), timeout=60), start) for start in UNFINISHED * 10]
    for connection, start in held:
        connection.sendall(start)
    assert request(port, "POST", SMALL, POSCAR)[0] == 200
    for connection, start in held:
        with closing(connection), connection.makefile("rb") as answer:
            text = answer.read()  # until the server closes the connection
            assert text == b"" if start.startswith(b"GET") else b"408" in text and b'{"error":"The body' in text


def test_forty_at_once_are_answered(port):
    def until_answered(_):
        while True:
            status, headers, body = request(port, "POST", SMALL, POSCAR)
            if status == 200:
                return len(body)
            assert status == 503 and int(headers["Retry-After"]) > 0 and "places of the queue, 2, are taken" in body["error"]
            Event().wait(0.1)
    with ThreadPoolExecutor(40) as pool:
        assert len(set(pool.map(until_answered, range(40)))) == 1


@asynccontextmanager
async def running(**limits):
    "The application in this process, with a client and the process that predicts."
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setenv(f"TOMAT_SERVICE_{name.upper()}", str(value))
        app = density_app(device="cpu")
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x",
                                                                   timeout=120) as client:
        yield client, app.state.service.queue


def halt(queue):
    os.kill(queue.workers[0].process.pid, signal.SIGSTOP)


def test_the_limits_of_a_crystal_are_those_of_the_command_line():
    assert (ServiceLimits().atoms, ServiceLimits().voxels) == (LIMITS["largest_atoms"].default, LIMITS["largest_voxels"].default)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def test_a_full_queue_says_so_at_once():
    async def run():
        async with running(queue=2) as (client, queue):
            halt(queue)
            waiting = [asyncio.create_task(client.post(SMALL, content=POSCAR)) for _ in range(3)]
            await until(lambda: queue.requests == 3)
            refused = await client.post(SMALL, content=POSCAR)
            assert not any(task.done() for task in waiting)
            os.kill(queue.workers[0].process.pid, signal.SIGCONT)
            return refused, await asyncio.gather(*waiting), queue.requests
    refused, answered, left = asyncio.run(run())
    assert refused.status_code == 503 and refused.headers["Retry-After"] == "3" and "queue, 2," in refused.json()["error"]
    assert [reply.status_code for reply in answered] == [200] * 3 and left == 0


def test_a_prediction_that_takes_too_long_is_stopped():
    async def run():
        async with running(seconds=1) as (client, queue):
            first = queue.workers[0].process
            halt(queue)
            late = await client.post(SMALL, content=POSCAR)
            queue.workers[0].seconds = 120
            return late, await client.post(SMALL, content=POSCAR), first.is_alive()
    late, answered, alive = asyncio.run(run())
    assert late.status_code == 504 and "stopped after 1 s" in late.json()["error"]
    assert answered.status_code == 200 and not alive


@pytest.mark.parametrize("asked", [True, False])
def test_a_process_that_dies_is_replaced(asked):
    async def run():
        async with running() as (client, queue):
            process = queue.workers[0].process
            halt(queue)
            task = asyncio.create_task(client.post(SMALL, content=POSCAR)) if asked else None
            await until(lambda: queue.requests == asked)
            process.kill()
            if not asked:
                process.join()
            return task and await task, await client.post(SMALL, content=POSCAR)
    first, second = asyncio.run(run())
    assert second.status_code == 200
    assert not asked or (first.status_code == 500 and "process that predicts has ended" in first.json()["error"])


def test_a_client_that_hangs_up_leaves_the_queue(tmp_path):
    async def run():
        queue = WorkerQueue("", "cpu", ServiceLimits(queue=1))
        async with queue.running():
            halt(queue)
            options = Options("POSCAR", (12, 12, 12), "x.CHGCAR")
            busy = asyncio.create_task(queue.answer(tmp_path, options, asyncio.Event().wait))
            left = asyncio.Event()
            waiting = asyncio.create_task(queue.answer(tmp_path, options, left.wait))
            await until(lambda: queue.requests == 2)
            with pytest.raises(ServiceError, match="queue, 1, are taken"):  # also after its body was read
                await queue.answer(tmp_path, options, asyncio.Event().wait)
            left.set()
            with pytest.raises(ServiceError, match="hung up"):
                await waiting
            assert queue.requests == 1
            os.kill(queue.workers[0].process.pid, signal.SIGCONT)
            with pytest.raises(ServiceError, match="POSCAR"):
                await busy  # its folder is empty
    asyncio.run(run())


def test_a_client_that_takes_nothing_is_hung_up_on(tmp_path):
    async def run():
        file = (tmp_path / "x").open("wb+")
        file.write(bytes(1000))
        started = []
        async def send(message):
            started.append(message["type"])
            await asyncio.Event().wait()
        answer = _FileAnswer(file, {"out": "x"}, 0)
        await answer({"type": "http", "asgi": {"spec_version": "2.4"}}, asyncio.Event().wait, send)
        return started, file.closed
    assert asyncio.run(run()) == (["http.response.start"], True)


def test_limits_are_settings(monkeypatch, tmp_path):
    (tmp_path / "settings.ini").write_text("[service]\nservice_queue = 7\nservice_atoms = 10\n[data]\n")
    monkeypatch.setenv("TOMAT_SETTINGS", str(tmp_path / "settings.ini"))
    monkeypatch.setenv("TOMAT_SERVICE_ATOMS", "11")
    assert service_limits() == ServiceLimits(queue=7, atoms=11)
    for value, sentence in (("0", "service_seconds must be at least 1, got 0"), ("1.5", "service_seconds must be a whole number")):
        monkeypatch.setenv("TOMAT_SERVICE_SECONDS", value)
        with pytest.raises(TomatError, match=sentence):
            service_limits()


def test_a_service_that_cannot_start_says_why(monkeypatch, tmp_path, capfd):
    with pytest.raises(TomatError, match="nowhere"):
        asyncio.run(density_app(str(tmp_path / "nowhere")).router.lifespan_context(None).__aenter__())
    assert re.fullmatch(r"tomat: .*nowhere does not exist: .*\.\n", capfd.readouterr().err)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(TomatError, match=r"cannot listen at port \d+ of 127"):
        serve(density_app, port=taken.getsockname()[1])
    with pytest.raises(TomatError, match="port must be at most 65535"):
        ServeLaunch(port=99999)
