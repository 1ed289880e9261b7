"""`fit` is the loop that a user would write, for one adapter or many; it stops, resumes and diverges one by one."""

import sys
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import ones
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as recompute

import vera_func as vf
from vera_func.train import fit as loop
from vera_func.train.optim import adamw, adamw_init, adamw_update, clip_by_norm, linear_warmup_cosine
from vera_func.train.run import load_fit

from loops import (
    INPUTS,
    OPTIONS,
    RATES,
    TARGETS,
    N,
    everyones_own,
    fit,
    loss_of_many,
    loss_of_one,
    metric_of,
    own,
    row,
    same,
    shared,
    start,
)
from refused import NAN, Refused


def test_one_is_the_loop_a_user_would_write():
    run = fit(loss_of_one, start(), shared, steps=9, learning_rate=0.1, max_norm=0.2)
    params, state, losses = start(), adamw_init(start()), []
    for step in range(9):
        grads, loss = torch.func.grad_and_value(loss_of_one)(params, shared(step))
        params, state = adamw_update(clip_by_norm(grads, 0.2), state, params, learning_rate=0.1)
        losses.append(loss)
    assert_close((run.params, run.state), (params, state), rtol=1e-6, atol=1e-6)
    assert_close(run.losses, torch.stack(losses).double(), rtol=1e-6, atol=1e-6)
    assert run.stopped == -1
    assert not run.diverged
    full = (INPUTS, TARGETS)
    assert loss_of_one(run.params, full) < loss_of_one(start(), full)


@pytest.mark.parametrize("data", ["shared", "own"])
def test_together_equals_one_by_one(data):
    options = {"weight_decay": 0.1, "schedule": partial(linear_warmup_cosine, warmup=3, total=25)}
    loss_fn, batches = loss_of_many(None), shared
    if data == "own":
        loss_fn, batches = loss_of_many(0), everyones_own
    limits = [0.05 * (i + 1) for i in range(N)]
    run = fit(loss_fn, start(N), batches, steps=20, learning_rate=RATES, max_norm=limits,
              num_adapters=N, **options)  # fmt: skip
    assert run.losses.shape == (20, N)
    assert run.state.step.tolist() == [20] * N
    for i in range(N):
        alone = fit(loss_of_one, start(), shared if data == "shared" else partial(own, adapter=i),
                    steps=20, learning_rate=RATES[i], max_norm=limits[i], **options)  # fmt: skip
        assert_close(row(run.params, i), alone.params, rtol=1e-5, atol=1e-5)
        assert_close(run.losses[:, i], alone.losses, rtol=1e-5, atol=1e-5)


def test_stopped_adapters_stay_bit_for_bit():
    options = {"learning_rate": 0.1, "num_adapters": 3, "evaluate": metric_of([2, 4, 99])}
    loss_fn = loss_of_many(None)
    run = fit(loss_fn, start(3), shared, steps=12, patience=2, **options)
    assert run.stopped.tolist() == [4, 6, -1]
    assert run.state.step.tolist() == [4, 6, 12]
    assert run.metrics.shape == (12, 3)
    assert run.losses.shape == (12, 3)
    for i, steps in enumerate([4, 6, 12]):
        free = fit(loss_fn, start(3), shared, steps=steps, **options)
        assert same(row(run.params, i), row(free.params, i))
        assert same(row(run.state.mean, i), row(free.state.mean, i))
        assert same(row(run.state.var, i), row(free.state.var, i))


@pytest.mark.parametrize(
    ("metrics", "stopped"),
    [
        ([3, 2, 1, 0, 0, 0], 6),
        ([1, 1, 1, 1, 1, 1], 3),
        ([float("nan")] * 6, 3),
        ([float("nan"), 2, float("nan"), float("nan"), 1, 1], 4),
        ([2, 3, 1, 2, 0, 1], -1),
    ],
)
def test_patience_counts_evaluations_without_a_new_best(metrics, stopped):
    run = fit(loss_of_one, start(), shared, steps=6, learning_rate=0.1, patience=2,
              evaluate=lambda params, step: metrics[step - 1])  # fmt: skip
    assert run.stopped == stopped
    assert len(run.losses) == (6 if stopped < 0 else stopped)


def test_evaluates_every_so_many_steps():
    seen = []
    fit(loss_of_one, start(), shared, steps=7, learning_rate=0.1, evaluate_every=3,
        evaluate=lambda params, step: seen.append(step) or 0.0)  # fmt: skip
    assert seen == [3, 6]


# What goes wrong with adapter 1 at step 3: a term of its loss, and a factor on its rate. The slope of
# 1e30 is finite, but its norm is not: clipped, it would be a step of zero.
FAILURES = {
    "loss": (lambda p: torch.nan, 1.0),
    "gradient": (lambda p: (p.sum() * 0).square().sqrt(), 1.0),
    "norm": (lambda p: p.sum() * 1e30, 1.0),
    "update": (lambda p: 0.0, torch.inf),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_divergence_stops_one_and_spares_the_others(kind):
    term, factor = FAILURES[kind]

    def loss_fn(params, batch):
        losses = loss_of_many(None)(params, batch[:2])
        if batch[2] != 3:
            return losses
        return losses + torch.where(torch.arange(3) == 1, term(params["lambda_b"][1]), 0.0)

    batches = lambda step: (*shared(step), step)
    schedule = lambda step: torch.tensor([1.0, factor if step == 3 else 1.0, 1.0])
    options = {"learning_rate": 0.1, "num_adapters": 3, "max_norm": 1.0}
    with pytest.warns(RuntimeWarning, match=r"step 3.*adapter \[1\]"):
        run = fit(loss_fn, start(3), batches, steps=6, schedule=schedule, **options)
    assert run.stopped.tolist() == [-1, 3, -1]
    assert run.diverged.tolist() == [False, True, False]
    for steps, i in ((6, 0), (3, 1), (6, 2)):
        free = fit(loss_of_many(None), start(3), shared, steps=steps, **options)
        assert same(row(run.params, i), row(free.params, i))
        assert run.state.step[i] == steps


def test_one_that_diverges_ends_the_run():
    with pytest.warns(RuntimeWarning, match="step 0"):
        run = fit(lambda p, batch: p["lambda_b"].sum() * torch.inf, start(), shared, steps=5,
                  learning_rate=0.1)  # fmt: skip
    assert run.diverged
    assert run.stopped == 0
    assert len(run.losses) == 1
    assert same(run.params, start())


def test_activation_checkpointing():
    loss_fn = lambda params, batch: recompute(loss_of_one, params, batch, use_reentrant=False)
    options = {"steps": 4, "learning_rate": 0.1}
    run = fit(loss_fn, start(), shared, **options)
    assert_close(run.params, fit(loss_of_one, start(), shared, **options).params)


def test_a_base_that_requires_grad_keeps_no_graph():
    weight = torch.ones(7, requires_grad=True)
    params = {"lambda_b": torch.ones(7, requires_grad=True), "unused": torch.ones(2)}
    run = fit(lambda p, batch: (p["lambda_b"] * weight).square().sum(), params, shared, steps=2,
              learning_rate=0.1)  # fmt: skip
    assert not any(t.requires_grad for t in (*run.params.values(), run.losses))
    assert weight.grad is None
    assert torch.equal(run.params["unused"], torch.ones(2))


def test_inputs_are_not_modified():
    params = start(3)
    first = fit(loss_of_many(None), params, shared, steps=5, **OPTIONS)
    before = [t.clone() for t in torch.utils._pytree.tree_leaves(first)]
    fit(loss_of_many(None), params, shared, steps=12, resume=first, **OPTIONS)
    assert same(params, start(3))
    assert same(list(torch.utils._pytree.tree_leaves(first)), before)


@pytest.mark.parametrize("installed", [True, False])
def test_progress(installed, capsys, monkeypatch):
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    fit(loss_of_many(None), start(2), shared, steps=3, learning_rate=0.1, num_adapters=2,
        progress=True)  # fmt: skip
    out, err = capsys.readouterr()
    assert out == ""
    assert ("3/3" in err and "2 training" in err) == installed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batches": [1, 2]}, r"function of the step, got list.*lambda step"),
        ({"num_adapters": 4}, r"num_adapters=4 does not match params\['lambda_b'\] of shape \(3, 7\)"),
        ({"learning_rate": [0.1, 0.2]}, r"learning_rate has shape \(2,\): pass one value or 3 values"),
        ({"learning_rate": -0.1}, "learning_rate must be at least 0"),
        ({"max_norm": float("nan")}, "max_norm must be at least 0"),
        ({"loss_fn": lambda p, b: p["lambda_b"].sum()}, r"loss_fn must return .*\(3,\)"),
        ({"evaluate": lambda p, step: 0.0}, r"evaluate must return .*\(3,\)"),
        ({"patience": 2}, "pass evaluate"),
        ({"evaluate": metric_of([1, 1, 1]), "patience": 0}, "patience must be an integer, at least 1, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be an integer, at least 1"),
        ({"checkpoint_every": 1.5}, "checkpoint_every must be an integer"),
        ({"steps": 1.5}, r"steps must be an integer, at least 0, got 1\.5"),
        ({"num_adapters": 3.0}, "num_adapters must be an integer"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"eps": [1e-8]}, "eps must be a number"),
        ({"betas": 0.9}, r"betas must be two numbers \(b1, b2\), got 0\.9"),
        ({"schedule": 0.5}, "schedule must be a function, got float"),
        ({"schedule": lambda step: None}, r"schedule\(0\) must be a number"),
        ({"schedule": lambda step: ones(2)}, r"schedule\(0\) must be one number or 3 numbers"),
        ({"loss_fn": 3}, "loss_fn must be a function, got int"),
        ({"loss_fn": lambda p, b: p["lambda_b"].sum(-1) * 1j}, "must return real numbers"),
        ({"accumulate": lambda gradient, batch: gradient(batch)[1]}, r"must return \(gradients, losses\)"),
        ({"resume": 1}, "resume must be a Fit or the path"),
        ({"evaluate": lambda p, step: None}, "the metric of evaluate must be a number"),
        ({"params": [1.0]}, "params must be a dict of tensors, got list"),
        ({"params": {"lambda_b": 1.0}}, r"params\['lambda_b'\] must be a tensor, got float"),
        ({"checkpoint": "/no/such/folder/run"}, "existing folder, but /no/such/folder does not exist"),
        ({"params": {}}, "nothing to train"),
    ],
)
def test_mistakes_raise(wrong, message):
    right = {"loss_fn": loss_of_many(None), "params": start(3), "batches": shared, "steps": 1}
    with pytest.raises(ValueError, match=message):
        fit(**{**right, "learning_rate": 0.1, "num_adapters": 3, **wrong})


def test_inference_mode_has_no_gradients():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of torch\.inference_mode"):
        fit(loss_of_one, start(), shared, steps=1, learning_rate=0.1)


def test_a_transform_has_no_fit():
    with pytest.raises(ValueError, match="has no derivative"):
        torch.func.grad(lambda rate: fit(loss_of_one, start(), shared, steps=1, learning_rate=rate).losses[0])(ones(()))


def test_params_from_inference_mode_train():
    with torch.inference_mode():
        params = {key: p.clone() for key, p in start().items()}
    runs = [fit(loss_of_one, p, shared, steps=3, learning_rate=0.1) for p in (params, start())]
    assert same(runs[0].params, runs[1].params)


def test_many_rates_need_num_adapters():
    with pytest.raises(ValueError, match="if params are stacked, also pass num_adapters"):
        fit(loss_of_one, start(), shared, steps=1, learning_rate=[0.1, 0.2])
    with pytest.raises(ValueError, match=r"loss_fn must return one value.*pass num_adapters"):
        fit(loss_of_many(None), start(2), shared, steps=1, learning_rate=0.1)


class Counted(TorchDispatchMode):
    """Counts the operations that wait for a device, and those that copy a history."""

    def __init__(self):
        super().__init__()
        self.counts = {"aten::_local_scalar_dense": 0, "aten::cat": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in self.counts:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("n", [(), (3,)])
def test_a_step_waits_for_no_device_and_copies_no_history(n, progress, monkeypatch):
    monkeypatch.setattr(loop, "_sync_every", lambda device: 1000)
    loss_fn, number = (loss_of_many(None), n[0]) if n else (loss_of_one, None)
    counts = []
    for steps in (3, 13):
        with Counted() as counted:
            fit(loss_fn, start(*n), shared, steps=steps, learning_rate=0.1, num_adapters=number, max_norm=0.1,
                progress=progress, schedule=partial(linear_warmup_cosine, warmup=2, total=20))  # fmt: skip
        counts.append(counted.counts)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("failures", [{1: 3}, {0: 11}, {0: 2, 1: 2, 2: 2}, {0: 2, 1: 3, 2: 3}, {0: 5, 1: 0, 2: 7}])
@pytest.mark.parametrize("patience", [None, 2])
@pytest.mark.parametrize("evaluates", [True, False])
def test_a_run_does_not_depend_on_when_it_is_looked_at(failures, patience, evaluates, monkeypatch, tmp_path):
    def schedule(step):
        return torch.tensor([torch.inf if failures.get(i) == step else 1.0 for i in range(3)])

    def train(**options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = fit(loss_of_many(None), start(3), shared, steps=12, learning_rate=0.1, num_adapters=3,
                      schedule=schedule, **options)  # fmt: skip
        return run, [(str(w.message), w.filename) for w in caught]

    options = {"evaluate": metric_of([2, 4, 99]), "evaluate_every": 2, "patience": patience} if evaluates else {}
    expected, told = train(**options)
    assert all(filename == __file__ for _, filename in told)
    assert len(told) == len(set(expected.stopped[expected.diverged].tolist()))
    monkeypatch.setattr(loop, "_sync_every", lambda device: 5)
    saving = {"checkpoint": tmp_path / "run", "checkpoint_every": 3}
    for more in ({}, saving):
        found, told_later = train(**options, **more)
        assert same(found, expected)
        assert told_later == told
    assert same(load_fit(tmp_path / "run", start(3), num_adapters=3), expected)


def test_a_run_that_has_ended_is_not_gone_on_with(monkeypatch):
    train = partial(fit, loss_of_many(None), start(3), learning_rate=0.1, num_adapters=3)
    run = train(shared, steps=9, evaluate=metric_of([1, 1, 1]), patience=2)
    assert run.stopped.tolist() == [3] * 3
    padded = run._replace(losses=torch.cat([run.losses, torch.full_like(run.losses, torch.nan)]))  # as by join_fits
    monkeypatch.setattr(loop, "_sync_every", lambda device: 1000)
    for ended in (run, padded):
        assert same(train(lambda step: 1 / 0, steps=9, resume=ended), ended)


# What is refused

# Loggers


@pytest.mark.parametrize("n", [None, N])
def test_a_logger_gets_plain_numbers(n):
    seen = []
    metric, stack = (metric_of([*range(n)]), [n]) if n else (metric_of(3), [])
    halved = {"schedule": lambda step: 0.5**step, "evaluate": metric, "evaluate_every": 2}
    options = {"num_adapters": n, "learning_rate": 0.1, "on_step": lambda *each: seen.append(each), **halved}
    run = fit(loss_of_many(None) if n else loss_of_one, start(*stack), shared, steps=4, **options)
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    for step, numbers in seen:
        assert {type(value) for value in numbers.values()} == {float}
        ends = [f"/{i}" for i in range(n)] if n else [""]
        names = ["loss", "learning_rate", *(["metric"] if step % 2 == 0 else [])]
        assert list(numbers) == [name + end for name in names for end in ends]
        assert [numbers[f"loss{end}"] for end in ends] == run.losses[step - 1].reshape(-1).tolist()
        assert [numbers[f"learning_rate{end}"] for end in ends] == [0.1 * 0.5 ** (step - 1)] * len(ends)
        if step % 2 == 0:
            assert [numbers[f"metric{end}"] for end in ends] == run.metrics[step // 2 - 1].reshape(-1).tolist()
    more = fit(loss_of_many(None) if n else loss_of_one, start(*stack), shared, steps=6, resume=run, **options)
    assert [step for step, _ in seen[4:]] == [5, 6]
    assert len(more.losses) == 6


def test_the_recipes_of_the_docstring(tmp_path, monkeypatch):
    """Each logger's function as it stands in the docstring, over a stand-in of the logger that keeps what it gets."""
    kept = []
    writer = SimpleNamespace(add_scalar=lambda name, value, step: kept.append((name, value, step)))
    log = lambda numbers, step: kept.extend((name, value, step) for name, value in numbers.items())
    loggers = {"writer": writer, "wandb": SimpleNamespace(log=log), "mlflow": SimpleNamespace(log_metrics=log)}
    recipes = [line.strip() for line in vf.fit.__doc__.splitlines() if line.strip().startswith("lambda step, numbers:")]
    assert len(recipes) == 3
    for recipe in recipes:
        kept.clear()
        run = fit(loss_of_one, start(), shared, steps=2, learning_rate=0.1, on_step=eval(recipe, loggers))
        losses = [(value, step) for name, value, step in kept if name == "loss"]
        assert losses == [(loss, step) for step, loss in enumerate(run.losses.tolist(), 1)]


bad = Refused()


def train(**change):
    options = {"loss_fn": lambda p, batch: p["p"].sum(), "params": {"p": ones(2)}, "batches": int, "steps": 2}
    return vf.fit(**(options | {"learning_rate": 0.1, "progress": False} | change))


for what, change, message in (
    ("betas of 1", {"betas": (1.0, 0.9)}, "betas must be at least 0 and below 1"),
    ("eps of NaN", {"eps": NAN}, "eps must be at least 0"),
    ("negative steps", {"steps": -1}, "steps must be an integer, at least 0, got -1"),
    ("integers", {"params": {"p": ones(2).long()}}, "only floating-point tensors"),
    ("no adapters", {"num_adapters": 0}, "num_adapters must be an integer, at least 1, got 0"),
    ("a schedule below 0", {"schedule": lambda step: -1.0}, r"schedule\(0\) must be at least 0, got -1.0"),
    ("no learning rate", {"learning_rate": None}, "needs a learning_rate or an optimizer, got neither"),
    ("no pair for an optimizer", {"optimizer": torch.optim.AdamW}, "optimizer must be a pair .*got type"),
    (
        "weight_decay twice",
        {"optimizer": adamw(0.1), "weight_decay": 0.1},
        "weight_decay=0.1 has no effect with an opt",
    ),
    ("betas twice", {"optimizer": adamw(0.1), "betas": (0.9, 0.99)}, r"betas=\(0.9, 0.99\) has no effect with an opt"),
    ("eps twice", {"optimizer": adamw(0.1), "eps": 1e-6}, "eps=1e-06 has no effect with an optimizer"),
    ("a schedule of NaN", {"schedule": lambda step: NAN}, r"schedule\(0\) must be at least 0, got nan"),
    ("a loss that is a number", {"loss_fn": lambda p, b: 1.0}, "must return a tensor .* got float"),
    (
        "a loss of nothing",
        {"loss_fn": lambda p, b: ones(())},
        "do not depend on params; check that the losses are not detached",
    ),
    ("a detached loss", {"loss_fn": lambda p, b: p["p"].sum().detach()}, "check that the losses are not detached"),
    ("a list for a logger", {"on_step": []}, "on_step must be a function, got list"),
    ("a number for a metric", {"evaluate": 0.5}, "evaluate must be a function, got float"),
    ("a metric for others", {"evaluate": lambda p, step: ones(3)}, "evaluate must return one value"),
):
    bad("fit", what, lambda _, change=change: train(**change), message)

bad("fit", "no run to resume", lambda t: train(resume=t / "run"), "run", FileNotFoundError)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
