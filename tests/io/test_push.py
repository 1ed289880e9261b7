"""Pushing an adapter: what the hub's client is told to upload, and what its failures become."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

import vera_func as vf
from vera_func.cli.main import main
from vera_func.io.push import push_adapter

from refused import CONFIGURATION, FROZEN, PARAMS


@pytest.fixture
def calls(monkeypatch):
    """The calls of the client, as `{method: keyword arguments}`, and the uploaded files."""
    seen = {}

    class Api:
        def create_repo(self, **options):
            seen["create_repo"] = options

        def create_branch(self, **options):
            seen["create_branch"] = options

        def upload_folder(self, *, folder_path, **options):
            seen["files"] = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
            seen["upload_folder"] = options
            return "https://hub/user/repo/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return seen


@pytest.fixture
def adapter(tmp_path):
    vf.save_adapter(tmp_path / "a", PARAMS, FROZEN, CONFIGURATION)
    (tmp_path / "a" / "vera_func.json").write_text("{}")
    (tmp_path / "a" / "secret.txt").write_text("not part of the adapter")
    (tmp_path / "a" / "checkpoint-1").mkdir()
    return tmp_path / "a"


def test_the_files_of_the_adapter_are_pushed(calls, adapter):
    before = sorted(adapter.iterdir())
    assert push_adapter(adapter, "user/repo") == "https://hub/user/repo/commit/1"
    files = {"adapter_config.json", "adapter_model.safetensors", "vera_func.json", "README.md"}
    assert calls["files"].keys() == files
    for name in files - {"README.md"}:
        assert calls["files"][name] == (adapter / name).read_bytes()
    assert b"| trained parameters | 16 |" in calls["files"]["README.md"]  # 5 + 3 + 2 * 4
    assert calls["create_repo"] == {"repo_id": "user/repo", "private": None, "exist_ok": True}
    assert "create_branch" not in calls
    assert sorted(adapter.iterdir()) == before


def test_a_card_that_is_there_is_kept(calls, adapter):
    (adapter / "README.md").write_text("mine")
    push_adapter(adapter, "user/repo", revision="v2", subfolder="x", private=True, message="second")
    assert calls["files"]["README.md"] == b"mine"
    assert calls["create_repo"]["private"] is True
    assert calls["create_branch"]["branch"] == "v2"
    expected = {"repo_id": "user/repo", "path_in_repo": "x", "revision": "v2", "commit_message": "second"}
    assert calls["upload_folder"] == expected


def test_what_is_not_an_adapter_is_not_pushed(calls, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no adapter directory"):
        push_adapter(tmp_path / "gone", "user/repo")
    with pytest.raises(ValueError, match="repository must be a name such as 'user/repo', got NoneType"):
        push_adapter(tmp_path, None)
    assert not calls


class Response:
    headers, url, request, text = {}, "https://hub", None, ""

    def __init__(self, status):
        self.status_code = status


def http_error(kind, status):
    error = kind.__new__(kind, "refused")
    error.response = Response(status)
    return error


@pytest.mark.parametrize(
    ("error", "message", "kind"),
    [
        (
            http_error(errors.RepositoryNotFoundError, 401),
            "no repository user/repo that you may access",
            FileNotFoundError,
        ),
        (http_error(errors.HfHubHTTPError, 403), r"\(HTTP status 403\). Log in with `hf auth login`.", OSError),
        (http_error(errors.HfHubHTTPError, 500), r"refused the request for user/repo \(HTTP status 500\).$", OSError),
        (
            errors.OfflineModeIsEnabled("offline"),
            r"reached for the repository user/repo: offline mode is on \(\$HF_HUB_OFFLINE\)\.$",
            ConnectionError,
        ),
    ],
)
def test_failures_are_sentences(error, message, kind, calls, adapter, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(kind, match=message) as raised:
        push_adapter(adapter, "user/repo")
    assert type(raised.value) is kind


def test_the_command(calls, adapter, capsys):
    assert main(["push", str(adapter), "user/repo", "--private", "--message", "third", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == "https://hub/user/repo/commit/1"
    assert (calls["create_repo"]["private"], calls["upload_folder"]["commit_message"]) == (True, "third")
    assert main(["push", str(adapter / "checkpoint-1"), "user/repo"]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err
