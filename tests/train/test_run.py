"""A run as a value and as a file: resumed bit for bit, never half-written, refused where it is of other params."""

import os
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

import vera_func as vf
from vera_func.train.run import load_fit, save_fit

from loops import OPTIONS, fit, loss_of_many, loss_of_one, same, shared, start
from refused import PARAMS, RAW, UNREADABLE, Refused


@pytest.mark.parametrize("steps", [0, 1, 5, 8, 12])
def test_resume_from_a_value_is_bit_for_bit(steps):
    train = partial(fit, loss_of_many(None), start(3), shared, **OPTIONS)
    first = train(steps=steps)
    assert same(train(steps=12, resume=first), train(steps=12))


@pytest.mark.parametrize("killed_at", [1, 5, 8, 11])
def test_resume_after_an_interrupt_is_bit_for_bit(killed_at, tmp_path):
    path = tmp_path / "run.safetensors"

    def interrupted(step):
        if step == killed_at:
            raise KeyboardInterrupt
        return shared(step)

    train = partial(fit, loss_of_many(None), start(3), steps=12, **OPTIONS)
    saving = {"checkpoint": path, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, **saving)
    assert len(load_fit(path, start(3), num_adapters=3).losses) == killed_at
    whole = train(shared)
    assert same(train(shared, resume=path, **saving), whole)
    assert same(load_fit(path, start(3), num_adapters=3), whole)
    assert os.listdir(tmp_path) == [path.name]


def test_resume_of_one(tmp_path):
    train = partial(fit, loss_of_one, start(), shared, learning_rate=0.1)
    train(steps=4, checkpoint=tmp_path / "run")
    assert same(train(steps=9, resume=str(tmp_path / "run")), train(steps=9))


def test_saves_views_of_one_tensor(tmp_path):
    both = torch.arange(20.0).reshape(2, 10)
    params = {"lambda_b": both[:, :7], "lambda_d": both[:, 7:], "all": both, "again": both}
    options = {"steps": 0, "learning_rate": 0.1, "num_adapters": 2}
    run = fit(loss_of_many(None), params, shared, checkpoint=tmp_path / "run", **options)
    assert same(load_fit(tmp_path / "run", params, num_adapters=2), run)


def test_the_path_of_the_file_is_returned(tmp_path):
    run = fit(loss_of_one, start(), shared, steps=1, learning_rate=0.1)
    path = save_fit(str(tmp_path / "run"), run)
    assert path == tmp_path / "run"
    assert same(load_fit(path, start()), run)


@pytest.mark.parametrize("crash", ["fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_file(crash, tmp_path, monkeypatch):
    path = tmp_path / "run"
    old = fit(loss_of_one, start(), shared, steps=2, learning_rate=0.1, checkpoint=path)

    def boom(*args):
        raise OSError("no space left")

    monkeypatch.setattr(*((os, "fsync") if crash == "fsync" else (os, "replace")), boom)
    with pytest.raises(OSError, match="no space"):
        save_fit(path, old._replace(losses=old.losses + 1))
    assert same(load_fit(path, start()), old)
    assert os.listdir(tmp_path) == ["run"]


def test_loading_the_wrong_run_raises(tmp_path):
    path = tmp_path / "run"
    run = fit(loss_of_one, start(), shared, steps=2, learning_rate=0.1, checkpoint=path)
    with pytest.raises(ValueError, match=r"run .*'params.bias'"):
        load_fit(path, {**start(), "bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"run: 'params.lambda_b' is \(7,\).*\(9,\)"):
        load_fit(path, {**start(), "lambda_b": torch.ones(9)})
    with pytest.raises(ValueError, match=r"run: 'params.lambda_d' is .*float32.*float64"):
        load_fit(path, {**start(), "lambda_d": torch.ones(3, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"resume: 'params.lambda_b'"):
        fit(loss_of_many(None), start(2), shared, steps=3, learning_rate=0.1, num_adapters=2,
            resume=run)  # fmt: skip
    with pytest.raises(ValueError, match="num_adapters"):
        # The same leaves, but one adapter instead of seven and three.
        load_fit(path, {"lambda_b": torch.ones(7)} | {"lambda_d": torch.ones(3)}, num_adapters=7)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"run is not a complete safetensors file"):
        load_fit(path, start())
    with pytest.raises(ValueError, match=r"steps must be at least 2 \(.*\), got 1"):
        fit(loss_of_one, start(), shared, steps=1, learning_rate=0.1, resume=run)


@pytest.mark.parametrize("n", [(), (3,)])
def test_files_of_version_0_1_are_read(n, tmp_path):
    loss_fn, number = (loss_of_many(None), n[0]) if n else (loss_of_one, None)
    run = fit(loss_fn, start(*n), shared, steps=4, learning_rate=0.1, num_adapters=number)
    trees = {"params": run.params, "mean": run.state.mean, "var": run.state.var}
    tensors = {f"{name}.{k}": leaf for name, tree in trees.items() for k, leaf in tree.items()}
    tensors |= {"step": run.state.step, "losses": run.losses, "metrics": run.metrics}
    save_file(tensors | {"stopped": run.stopped, "diverged": run.diverged}, tmp_path / "run")
    assert same(load_fit(tmp_path / "run", start(*n), num_adapters=number), run)
    save_file({"state.step": run.state.step + 1} | tensors, tmp_path / "run")
    with pytest.raises(ValueError, match="run is a run with other params"):
        load_fit(tmp_path / "run", start(*n), num_adapters=number)


# What is refused

bad = Refused()


bad("save_fit", "no run", lambda path: vf.save_fit(path / "run", PARAMS), "must be a Fit returned by fit, got dict")
bad("load_fit", "no file", lambda path: vf.load_fit(path / "run", PARAMS), "No such file", FileNotFoundError)


def resume_raw(folder, raw):
    (folder / "run").write_bytes(raw)
    return fit(lambda p, batch: p["p"].sum(), {"p": torch.ones(2)}, int, steps=2, learning_rate=0.1,
               resume=folder / "run")  # fmt: skip


for what, raw in RAW.items():
    wrong = "is a run with other params" if what == "no tensors" else UNREADABLE
    bad("fit", f"resuming from {what}", lambda t, raw=raw: resume_raw(t, raw), f"run {wrong}")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
