"""What several test files want: an S3 server on loopback, and a few densities."""

from dataclasses import replace

import numpy as np
import pytest

pytest.register_assert_rewrite("crystals")
from crystals import noise


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


@pytest.fixture
def three():
    "Densities for a store."
    rng = np.random.default_rng(7)
    return [replace(noise(rng, (3, 4, 5), n, baseline=True), id=f"m-{n}", metadata={}) for n in (1, 2, 3)]
