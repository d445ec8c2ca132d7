"""What several test files want: a browser, object stores on loopback, a line to them that can be cut, and a few densities."""

import socket
import socketserver
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

pytest.register_assert_rewrite("crystals")
from crystals import Done, noise


@pytest.fixture(scope="session", autouse=True)
def silent():
    "No progress bars, and no key of the user, in this process or its children."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOMAT_PROGRESS", "0")
        patch.delenv("MP_API_KEY", raising=False)
        yield


@pytest.fixture(scope="module")
def one_thread():
    "One thread for torch, so that sums come in one order."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tomat(monkeypatch, capsys):
    "Run the command line in this process, on one thread."
    import torch

    from tomat import cli
    threads = torch.get_num_threads()
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["tomat", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        got = capsys.readouterr()
        return Done(code, got.out, got.err)
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def browser():
    "Debian's Chromium, or playwright's own; without either these tests are skipped."
    from browsing import CHROMIUM
    with pytest.importorskip("playwright.sync_api").sync_playwright() as play:
        path = CHROMIUM or play.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("Chromium is not installed")
        swiftshader = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        chromium = play.chromium.launch(executable_path=path, args=swiftshader)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server():
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def s3(server, monkeypatch):
    "A bucket, found through the environment as anybody's is."
    for name, value in {"AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    import s3fs
    fs = s3fs.S3FileSystem(endpoint_url=server, use_listings_cache=False)
    if fs.exists("densities"):
        fs.rm("densities", recursive=True)
    fs.mkdir("densities")
    return "s3://densities"


@pytest.fixture(scope="module")
def gcs_server():
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    pytest.importorskip("gcsfs")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = emulator.create_server("127.0.0.1", port, in_memory=True)
    running.start()
    yield running, f"http://127.0.0.1:{port}"
    running.stop()


@pytest.fixture
def gcs(gcs_server, monkeypatch):
    "A bucket of Google's, empty, found through the environment."
    running, url = gcs_server
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    running.wipe()
    from tomat.io.remote import remote_fs
    remote_fs("gs://densities")[0].mkdir("densities")
    return "gs://densities"


class Line:
    "A way to a server that breaks, or goes silent, after `left` bytes; `came` counts those from there."

    def __init__(self, upstream: str):
        place = urlsplit(upstream)
        self.left, self.came, self.silent, self.upstream = 1 << 60, 0, False, (place.hostname, place.port)
        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), self.connect)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def connect(self, here, address, server):
        with socket.create_connection(self.upstream) as there:
            asking = threading.Thread(target=self.pump, args=(here, there), daemon=True)
            asking.start()
            self.pump(there, here)

    def pump(self, source, sink):
        try:
            while (got := source.recv(1 << 14)) and self.left > 0:
                self.came += len(got) * (source.getpeername() == self.upstream)
                self.left -= len(got)
                sink.sendall(got)
            if self.silent and self.left <= 0:
                threading.Event().wait(30)
            for each in (source, sink):
                each.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # hung up on the other side

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def line():
    "Makes a line to a server that can be cut."
    lines = []
    yield lambda upstream: lines.append(Line(upstream)) or lines[-1]
    for each in lines:
        each.close()


@pytest.fixture
def three():
    "Densities for a store."
    rng = np.random.default_rng(7)
    return [replace(noise(rng, (3, 4, 5), n, sad=True), id=f"m-{n}", metadata={}) for n in (1, 2, 3)]
