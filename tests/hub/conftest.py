"""Points the real client at a Hub on localhost, makes a store in memory, and edits a model once for all tests."""

import shutil

import fsspec
import pytest
from command_line import checked
from hub.edits import ablate, write_model, write_model_adapter
from hub.hub_server import Server
from hub.object_store import fill


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


def empty_hub(server, folder, patch):
    """Returns a Hub without repositories, which huggingface_hub takes for the real one; the folder is worked in."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    fresh = server.fresh()
    for name, value in {
        "ENDPOINT": fresh.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": fresh.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_TOKEN_PATH": str(folder / "token"),
    }.items():
        patch.setattr(constants, name, value)
    patch.setattr(_http, "_HUB_ORIGINS", frozenset({_http._url_origin(fresh.endpoint)}))
    patch.delenv("HF_TOKEN", raising=False)
    patch.chdir(folder)
    return fresh


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    # With the test's own monkeypatch, which undoes in the right order what a test changes once more.
    return empty_hub(server, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def made(server, tmp_path_factory):
    """A model in a folder, ``local``, and what editing it gives.

    ``expected`` is the folder ablated; ``ablated`` and ``merged`` are made from the same model on the Hub, whose commit
    the receipts name: its hash depends on the files alone.
    """
    folder = write_model(tmp_path_factory.mktemp("made"))
    write_model_adapter(folder / "adapter")
    with pytest.MonkeyPatch.context() as patch:
        empty_hub(server, folder, patch).add("org/model", folder / "local")
        for source, out in (("local", "expected"), ("org/model", "ablated")):
            assert ablate(source, out).exit_code == 0
        checked("merge", "org/model", "adapter", "merged")
    return folder


@pytest.fixture
def in_store(store, made, tmp_path, monkeypatch):
    """A store that holds the model, and a working folder that holds the directions alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.safetensors").write_bytes((made / "d.safetensors").read_bytes())
    fill(store, "/bucket/model", made / "local")
    return store


@pytest.fixture
def on_hub(hub, made, tmp_path, monkeypatch):
    """The model on a Hub that the token may write to, and a working folder that holds all that was made."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    hub.add("org/model", tmp_path / "local")
    return hub, tmp_path


@pytest.fixture(scope="session")
def endpoint():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint, made, tmp_path, monkeypatch):
    """A bucket that holds the model, and a working folder that holds all that was made."""
    import s3fs

    for name, value in {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    if store.exists("bucket"):
        store.rm("bucket", recursive=True)
    store.mkdir("bucket")
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    fill(store, "bucket/model", made / "local")
    yield store
    s3fs.S3FileSystem.clear_instance_cache()
