"""Faults: killed while writing, no room, no permission, an interrupted run.

A helper process, which is this file as a program, imports everything once and forks a child for each kill. The child
writes two states in turn until SIGKILL, so that whatever is found must be one or the other, whole. The number of kills
is `VERA_FUNC_KILLS`, 20 by default: `VERA_FUNC_KILLS=500 pytest tests/test_faults.py -k killed`.
"""

import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_leaves

import vera_func as vf
from vera_func.data.assets import Asset, fetch
from vera_func.data.metadata import Metadata, read_metadata, write_metadata
from vera_func.io.bank import append_to_bank
from vera_func.io.checkpoint import WEIGHTS
from vera_func.io.config import CONFIG
from vera_func.io.files import filling
from vera_func.train.fit import batch_indices, load_fit, save_fit
from vera_func.train.optim import linear_warmup_cosine


KILLS = int(os.environ.get("VERA_FUNC_KILLS", "20"))
N, R, STEPS = 40, 6, max(40, KILLS // 2)

# ------------------------------------------------------------------------------------ what is written, and how it reads


def model():
    return nn.Sequential(nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 64))


def filled(tree, value):
    return {key: torch.full_like(leaf, value) for key, leaf in tree.items()}


def state(value):
    """An adapter of ones or of twos; they differ in rank and targets, too."""
    config = vf.VeraConfig(r=R * value, target_modules=["0", "2"][:value])
    _, params, frozen, config = vf.adapt(model(), config)
    return filled(params, value), filled(frozen, value), config


def stack(params, value):
    return {key: leaf.new_full((N, *leaf.shape), value) for key, leaf in params.items()}


def names(value):
    return [f"{value} {i}" for i in range(N)]


def finished_run(value):
    params = {"p": torch.full((5000,), float(value))}
    run = vf.fit(lambda p, _: p["p"].sum(), params, int, steps=0, learning_rate=0.0, progress=False)
    return run._replace(losses=torch.full((value,), float(value), dtype=torch.float64))


def archive(value):
    """An asset and a download of it, without a network."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("one", "two"):
            entry = tarfile.TarInfo(name)
            entry.size = 100_000
            tar.addfile(entry, io.BytesIO(bytes([value]) * entry.size))
    content = buffer.getvalue()
    asset = Asset(f"thing=={value}", "thing.tar", hashlib.sha256(content).hexdigest(), ("one", "two"))

    def download(asset, folder):
        (folder / asset.filename).write_bytes(content)
        return folder / asset.filename

    return asset, download


def write(kind, folder, value):
    params, frozen, config = state(value)
    if kind == "adapter":
        vf.save_adapter(folder, params, frozen, config)
    elif kind == "bank":
        vf.save_bank(folder / "bank", stack(params, value), frozen, config, names(value))
    elif kind == "append":
        params, frozen, config = state(1)
        if not (folder / "bank").exists():
            vf.save_bank(folder / "bank", stack(params, 1), frozen, config, names(1))
        append_to_bank(folder / "bank", stack(params, value), names(1), replace=True)
    elif kind == "run":
        save_fit(folder / "run", finished_run(value))
    elif kind == "metadata":
        write_metadata(folder, Metadata("nf4", [str(value)] * 500, "{text}"))
    elif kind == "lora":
        vf.export_lora(folder, params, frozen, config, model())
    elif kind == "asset":
        os.environ["VERA_FUNC_CACHE"] = str(folder)
        shutil.rmtree(folder / ".gone", ignore_errors=True)
        fetch(*archive(value)).rename(folder / ".gone")
        fetch(*archive(value))
    elif kind == "fit":
        train(folder, resume=folder / "run" if (folder / "run").exists() else None)


def holds(tree, value):
    return all((leaf == value).all() for leaf in tree.values())


def assert_whole(kind, folder):
    """What is there is state 1 or state 2, from end to end."""
    if kind == "adapter":
        _, params, frozen, config = vf.load_adapter(folder, model())
        value = config.r // R
        assert holds(params | frozen, value)
        assert (params.keys(), config.target_modules) == (state(value)[0].keys(), state(value)[2].target_modules)
    elif kind in ("bank", "append"):
        bank = vf.open_bank(folder / "bank")
        value = int(next(iter(bank.read()["0.lambda_b"].unique())))
        assert holds(bank.read(), value)
        assert holds(bank.frozen(), value if kind == "bank" else 1)
        assert bank.names == tuple(names(value if kind == "bank" else 1))
    elif kind == "run":
        run = load_fit(folder / "run", finished_run(1).params)
        assert holds(run.params | {"losses": run.losses}, len(run.losses))
    elif kind == "metadata":
        assert read_metadata(folder).labels in ([str(value)] * 500 for value in (1, 2))
    elif kind == "lora":
        # Two files can't be replaced at once, and PEFT reads them. Between the two there is no configuration.
        if (folder / CONFIG).exists():
            fields, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
            value = fields["r"] // R
            assert len(tensors) == 2 * len(fields["target_modules"]) == 2 * value
            assert all((leaf == value**2).all() and R * value in leaf.shape for leaf in tensors.values())
    elif kind == "asset":
        for value in (1, 2):
            found = folder / f"thing-{value}"
            assert not found.exists() or {p.name: p.read_bytes() for p in found.iterdir()} == dict.fromkeys(
                ("one", "two"), bytes([value]) * 100_000
            )
    elif kind == "fit" and (folder / "run").exists():
        load_fit(folder / "run", start())


# ------------------------------------------------------------------------------------------------------ a real training

DATA = torch.randn(37, 16, generator=torch.Generator().manual_seed(0))


def start():
    return vf.adapt(network(), vf.VeraConfig(r=3, target_modules=["0", "2"], vera_dropout=0.25)).params


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5))


def train(folder, resume=None, *, stop=None, **options):
    """Shuffled batches, dropout, clipping and a schedule: all of it a function of the step."""
    apply, params, frozen, _ = vf.adapt(network(), vf.VeraConfig(r=3, target_modules=["0", "2"], vera_dropout=0.25))

    def batch(step):
        if step == stop:
            raise KeyboardInterrupt
        rows = batch_indices(step, num_examples=37, batch_size=5, key=1)
        return DATA[rows], torch.Generator().manual_seed(step)

    def loss(params, batch):
        x, generator = batch
        return (apply.with_dropout(generator)(params, frozen, x) - x[:, :5]).square().mean()

    options = {"checkpoint": folder / "run", "checkpoint_every": 3, "progress": False} | options
    schedule = partial(linear_warmup_cosine, warmup=5, total=STEPS)
    return vf.fit(
        loss, params, batch, steps=STEPS, learning_rate=0.1, max_norm=1.0, schedule=schedule, resume=resume, **options
    )


# -------------------------------------------------------------------------------------------------------------- kills


def serve():
    """The helper: for each line `kind folder seconds`, a forked writer that is killed after so many seconds."""
    for line in sys.stdin:
        kind, folder, seconds = line.split()
        child = os.fork()
        if not child:
            try:
                value = 0
                while kind != "fit" or not value:
                    write(kind, Path(folder), 1 + value % 2)
                    value += 1
                time.sleep(60)  # a training that is done waits for its end
            except BaseException as error:
                print(f"the writer failed: {error!r}", flush=True)
            os._exit(1)
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "exited", flush=True)


@contextmanager
def helper():
    root = str(Path(vf.__file__).parents[1])
    # One thread, so that there is nothing that a fork would leave behind.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def kill(kind, folder, seconds):
            process.stdin.write(f"{kind} {folder} {seconds}\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{int(signal.SIGKILL)}\n"

        yield kill
        process.stdin.close()


def remove_leftovers(folder):
    """What a killed writer leaves beside the files; its names begin with a dot."""
    leftovers = [path for path in folder.iterdir() if path.name.startswith(".")]
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return len(leftovers)


KINDS = ["adapter", "bank", "append", "run", "metadata", "lora", "asset", "fit"]


def test_killed_while_writing_the_old_or_the_new_is_there(tmp_path):
    moments, interrupted = random.Random(0), dict.fromkeys(KINDS, 0)
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        if kind != "fit":
            write(kind, tmp_path / kind, 1)
    with helper() as kill:
        for i in range(KILLS):
            kind = KINDS[i % len(KINDS)]
            kill(kind, tmp_path / kind, moments.uniform(0.002, 0.15))
            assert_whole(kind, tmp_path / kind)
            interrupted[kind] += remove_leftovers(tmp_path / kind) > 0
    # Kills that came between writes prove little: a fair part must have hit one.
    assert sum(interrupted.values()) >= KILLS // 20, interrupted
    print(f"{KILLS} kills, {sum(interrupted.values())} in the middle of a write: {interrupted}")
    # The training that was killed so often ends where an undisturbed one does.
    file = tmp_path / "fit" / "run"
    resumed = train(tmp_path / "fit", resume=file if file.exists() else None)
    whole = train(tmp_path, checkpoint=None)
    assert_equal_runs(resumed, whole)


def assert_equal_runs(one, other):
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_filled_as_a_whole(there, tmp_path):
    folder = tmp_path / "models" / "merged"
    if there:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("old")
        (folder / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))

    def fail():
        with filling(folder) as temporary:
            (temporary / "config.json").write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [path for path in sorted(tmp_path.rglob("*")) if path != folder.parent] == before[1:]
    if there:
        assert (folder / "config.json").read_text() == "old"
    with filling(folder) as temporary:
        (temporary / "config.json").write_text("new")
    assert (folder / "config.json").read_text() == "new"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"] + ["mine.txt"] * there


@pytest.mark.parametrize("stop", [1, 3, 8, 26, 39])
def test_a_resumed_run_is_bit_for_bit_the_whole_one(stop, tmp_path):
    # 37 examples in batches of 5: an epoch has 8 steps, the last of 2 examples. Checkpoints come every 3.
    whole = train(tmp_path, checkpoint=None)
    assert len(whole.losses) == STEPS
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop=stop)
    file = tmp_path / "run"
    assert file.exists() == (stop >= 3)
    torch.manual_seed(999)  # nothing depends on the global generator
    assert_equal_runs(train(tmp_path, resume=file if file.exists() else None), whole)


# ------------------------------------------------------------------------------------------- no room, no permission


@contextmanager
def full_disk(room):
    """A limit on the size of files: the kernel stops a write in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_permission(folder):
    """A folder that can't be written to, for root neither: it gives its rights away for a while."""
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FILES = {
    "adapter": "adapter_",
    "bank": "bank",
    "append": "bank",
    "run": "run",
    "metadata": "vera_func.json",
    "lora": "adapter_",
}


@pytest.mark.parametrize("room", [0, 100, 1000])
@pytest.mark.parametrize("kind", FILES)
def test_a_full_disk(kind, room, tmp_path):
    write(kind, tmp_path, 1)
    before = contents(tmp_path)
    with full_disk(room), pytest.raises(OSError, match=r"[Ff]ile too large|could not be written"):
        write(kind, tmp_path, 2)
    assert contents(tmp_path) == before  # no half-written file is left either
    assert_whole(kind, tmp_path)


@pytest.mark.parametrize("kind", FILES)
def test_a_folder_that_can_not_be_written(kind):
    # Not tmp_path, whose parents are closed to others.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write(kind, folder, 1)
        for path in folder.iterdir():
            path.chmod(0o644)
        before = contents(folder)
        with (
            no_permission(folder),
            pytest.raises(OSError, match=r"[Pp]ermission denied.*|could not be written") as error,
        ):
            write(kind, folder, 2)
        assert FILES[kind] in str(error.value)
        assert contents(folder) == before


@pytest.mark.parametrize("kind", ["adapter", "bank", "metadata", "lora"])
def test_a_file_where_a_folder_should_be(kind, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        write(kind, tmp_path / "file", 1)
    assert contents(tmp_path) == {Path("file"): b"mine"}


if __name__ == "__main__":
    serve()
