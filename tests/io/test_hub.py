"""Adapters from the hub: the hub's own client against a server on this machine, which has what the hub would have."""

import hashlib
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import hf_hub_download

import vera_func as vf
from vera_func.io.hub import find_adapter

from refused import CONFIGURATION, FROZEN, PARAMS, Refused, filled, small_model


COMMITS = {"main": "a" * 40, "v1": "b" * 40}
NAMES = {commit: revision for revision, commit in COMMITS.items()}
REPOSITORY = "user/repo"


@pytest.fixture(scope="module")
def hub():
    """`(url, files)` of a server; `files` is `{(revision, path): bytes}` of its only repository."""
    files = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            repository, _, rest = self.path.strip("/").partition("/resolve/")
            revision, _, path = rest.partition("/")
            revision = NAMES.get(revision, revision)
            if repository != REPOSITORY:
                return self.fail("RepoNotFound", 401)
            if revision not in COMMITS:
                return self.fail("RevisionNotFound")
            if (revision, path) not in files:
                return self.fail("EntryNotFound")
            data = files[revision, path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMITS[revision])
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)
            return None

        do_HEAD = do_GET

        def fail(self, code, status=404):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """Points the hub's client at the server, with a cache of its own; `client(url)` points it elsewhere."""

    def point(url):
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_download", partial(hf_hub_download, endpoint=url, cache_dir=tmp_path / "cache")
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    point(hub[0])
    return point


def upload(files, folder, value, *, revision="main", subfolder="", **options):
    saved = vf.save_adapter(folder / "saved", filled(PARAMS, value), FROZEN, CONFIGURATION, **options)
    for file in saved.iterdir():
        files[revision, f"{subfolder}{file.name}"] = file.read_bytes()


@pytest.fixture(scope="module")
def adapters(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    upload(hub[1], folder, 1.0, card=True)
    upload(hub[1], folder, 2.0, revision="v1")
    upload(hub[1], folder, 3.0, subfolder="sets/a/")
    upload(hub[1], folder, 4.0, subfolder="sets/a/other/")


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (1.0, {}),
        (2.0, {"revision": "v1"}),
        (2.0, {"revision": COMMITS["v1"]}),
        (3.0, {"subfolder": "sets/a"}),
        (4.0, {"subfolder": "sets/a", "adapter_name": "other"}),
    ],
)
def test_a_repository_is_loaded(value, options, client, adapters):
    _, params, frozen, config = vf.load_adapter(REPOSITORY, small_model(), **options)
    assert {leaf.unique().item() for leaf in params.values()} == {value}
    assert torch.equal(frozen["vera_A"], FROZEN["vera_A"])
    assert config == CONFIGURATION


def test_without_a_network_the_cache_serves(client, adapters):
    vf.load_adapter(REPOSITORY, small_model())
    client("http://127.0.0.1:9")  # nobody listens
    assert vf.load_adapter(REPOSITORY, small_model()).config == CONFIGURATION


def test_a_local_directory_comes_first(client, tmp_path):
    vf.save_adapter(tmp_path / "user" / "repo" / "b", filled(PARAMS, 7.0), FROZEN, CONFIGURATION)
    client("http://127.0.0.1:9")
    assert vf.load_adapter(REPOSITORY, small_model(), subfolder="b").params["0.lambda_d"][0] == 7
    with pytest.raises(
        ValueError, match="revision='v1' applies only to a repository of the hub, but user/repo is a local"
    ):
        vf.load_adapter(REPOSITORY, small_model(), revision="v1")


def test_a_repository_that_changes_meanwhile(client, monkeypatch):
    folders = iter(["one", "two"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **_: f"{next(folders)}/file")
    with pytest.raises(OSError, match="user/repo changed while it was downloaded: try again"):
        vf.load_adapter(REPOSITORY, small_model())


def test_the_metadata_of_the_command_line_is_optional(client, adapters, hub):
    assert not (find_adapter(REPOSITORY, optional=["vera_func.json"]) / "vera_func.json").exists()
    hub[1]["main", "vera_func.json"] = b"{}"
    assert (find_adapter(REPOSITORY, optional=["vera_func.json"]) / "vera_func.json").read_text() == "{}"
    del hub[1]["main", "vera_func.json"]


def failing(error):
    def download(**_):
        raise error

    return download


@pytest.mark.parametrize(
    ("repository", "options", "message", "error"),
    [
        (
            "user/other",
            {},
            "no local directory user/other, and the hub has no repository user/other",
            FileNotFoundError,
        ),
        (REPOSITORY, {"revision": "x"}, "repository user/repo of the hub has no revision 'x'", FileNotFoundError),
        (REPOSITORY, {"subfolder": "x"}, "folder x of the repository user/repo .* has no adapter_c", FileNotFoundError),
        (REPOSITORY, {"subfolder": "../x"}, "subfolder must be a relative path", ValueError),
        (REPOSITORY, {"revision": ""}, "revision must be a branch, tag or commit", ValueError),
        (REPOSITORY, {"adapter_name": "a/b"}, "adapter_name must be a valid folder name", ValueError),
        ("user/a..b", {}, "'user/a..b' is not a valid repository name", ValueError),
        ("./user/repo", {}, "there is no adapter directory", FileNotFoundError),
    ],
)
def test_what_the_hub_lacks_is_named(repository, options, message, error, client, adapters):
    with pytest.raises(error, match=message) as raised:
        vf.load_adapter(repository, small_model(), **options)
    assert type(raised.value) is error


def test_without_a_network_one_sentence_says_so(client, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or it would try for 20 seconds
    with pytest.raises(ConnectionError) as raised:
        vf.load_adapter(REPOSITORY, small_model())
    assert str(raised.value) == (
        "there is no local directory user/repo, and the hub can't be reached for the repository user/repo. The local "
        "cache does not contain the files."
    )


def test_an_error_of_the_clients_http_library(client, monkeypatch):
    error = type("ConnectError", (Exception,), {"__module__": "httpx"})("no route")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing(error))
    with pytest.raises(ConnectionError, match="can't be reached for the repository user/repo: no route"):
        vf.load_adapter(REPOSITORY, small_model())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing(KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        vf.load_adapter(REPOSITORY, small_model())


def test_without_the_package(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ModuleNotFoundError, match="user/repo of the hub requires a package: pip install huggingface_hub"
    ):
        vf.load_adapter(REPOSITORY, small_model())


bad = Refused()
bad("load_adapter", "a subfolder above", lambda t: vf.load_adapter(t, small_model(), subfolder=".."), "a relative path")
bad("load_adapter", "revision 5", lambda t: vf.load_adapter("a/b", small_model(), revision=5), "revision must be")


@pytest.mark.parametrize("case", bad.rows)
def test_bad_input_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
