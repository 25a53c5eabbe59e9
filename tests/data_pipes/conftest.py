"""Servers on this machine that shards are read from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "faults"))

from hostile_server import HostileServer, serving


@pytest.fixture
def server() -> Iterator[HostileServer]:
    """Serves what is `put` on it."""
    with serving() as local:
        yield local


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    """The address of a local S3."""
    pytest.importorskip("botocore", reason="botocore (extra s3) is not installed")
    server = pytest.importorskip("moto.server", reason="moto and flask are not installed: no local S3")
    local = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    local.start()
    host, port = local.get_host_and_port()
    yield f"http://{host}:{port}"
    local.stop()


@pytest.fixture
def s3(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the local S3 with a bucket `shards`; credentials come from the environment."""
    import botocore.session  # type: ignore[import-untyped, unused-ignore]

    for name in ("AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAHUNTER2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")
    client = botocore.session.get_session().create_client(
        "s3", region_name="us-east-1", endpoint_url=moto_url
    )
    client.create_bucket(Bucket="shards")
    return client
