"""Points the real client at a Hub on localhost, and makes a store in memory."""

import fsspec
import pytest
from hub.hub_server import Server

from ablate_shards.surgery.checkpoint import remote


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """What is tried again is tried again soon."""
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def store():
    """A store in memory, empty."""
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


@pytest.fixture(scope="session")
def server():
    from huggingface_hub.utils import close_session

    with Server() as running:
        yield running
        close_session()


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """A Hub without repositories, which huggingface_hub in this process takes for the real one."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    fresh = server.fresh()
    for name, value in {
        "ENDPOINT": fresh.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": fresh.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(_http, "_HUB_ORIGINS", frozenset({_http._url_origin(fresh.endpoint)}))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    return fresh
