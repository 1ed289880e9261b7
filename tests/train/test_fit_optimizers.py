"""`fit` with other optimizers: pairs of pure functions, torchopt's among them, over one adapter or many."""

from functools import partial

import pytest
import torch
import torchopt
from torch import ones
from torch.testing import assert_close

from vera_func.train.optim import adamw, linear_warmup_cosine
from vera_func.train.run import load_fit
from vera_func.train.sweep import fit_row

from loops import RATES, N, everyones_own, fit, loss_of_many, loss_of_one, metric_of, own, same, shared, start


def momentum(rate, decay=0.9):
    """Any pytree of tensors is a state: here a tuple with an empty one in it."""
    init = lambda params: ({k: torch.zeros_like(p) for k, p in params.items()}, {}, torch.zeros((), dtype=torch.int64))

    def update(grads, state, params):
        velocity = {k: decay * state[0][k] + g for k, g in grads.items()}
        return {k: -rate * v for k, v in velocity.items()}, (velocity, {}, state[2] + 1)

    return init, update


class TestOptimizers:
    def test_adamw_is_the_default(self):
        options = {"schedule": partial(linear_warmup_cosine, warmup=2, total=12), "max_norm": 0.3, "steps": 9}
        default = fit(loss_of_one, start(), shared, learning_rate=0.1, weight_decay=0.2, betas=(0.8, 0.9), **options)
        pair = adamw(0.1, weight_decay=0.2, betas=(0.8, 0.9))
        assert_close(fit(loss_of_one, start(), shared, optimizer=pair, **options), default)
        pair = adamw(1.0, weight_decay=0.2, betas=(0.8, 0.9))
        assert_close(fit(loss_of_one, start(), shared, optimizer=pair, learning_rate=0.1, **options), default)
        options |= {"num_adapters": N}
        default = fit(loss_of_many(None), start(N), shared, learning_rate=RATES, weight_decay=0.2, **options)
        pair = adamw(1.0, weight_decay=0.2)
        run = fit(loss_of_many(None), start(N), shared, learning_rate=RATES, optimizer=pair, **options)
        assert_close(run[:2], default[:2])

    @pytest.mark.parametrize("rate", [None, 0.5])
    def test_updates_are_scaled_by_learning_rate_and_schedule(self, rate):
        schedule = lambda step: 1 / (step + 1)
        run = fit(loss_of_one, start(), shared, steps=7, optimizer=momentum(0.1), learning_rate=rate, schedule=schedule)
        params, velocity = start(), {k: torch.zeros_like(p) for k, p in start().items()}
        for step in range(7):
            grads = torch.func.grad(loss_of_one)(params, shared(step))
            velocity = {k: 0.9 * velocity[k] + g for k, g in grads.items()}
            factor = (1.0 if rate is None else rate) * schedule(step)
            params = {k: p - factor * 0.1 * velocity[k] for k, p in params.items()}
        assert_close((run.params, run.state), (params, (velocity, {}, torch.tensor(7))))

    def test_together_equals_one_by_one(self):
        options = {"steps": 9, "optimizer": momentum(0.1), "max_norm": 0.3}
        run = fit(loss_of_many(0), start(N), everyones_own, learning_rate=RATES, num_adapters=N, **options)
        assert run.state[2].tolist() == [9] * N
        for i, rate in enumerate(RATES):
            alone = fit(loss_of_one, start(), partial(own, adapter=i), learning_rate=rate, **options)
            assert_close(fit_row(run, i)[:2], alone[:2])

    def test_stopped_adapters_stay_bit_for_bit(self):
        options = {"optimizer": momentum(0.1), "num_adapters": 3, "evaluate": metric_of([2, 4, 99])}
        run = fit(loss_of_many(None), start(3), shared, steps=12, patience=2, **options)
        assert run.stopped.tolist() == [4, 6, -1]
        assert run.state[2].tolist() == [4, 6, 12]
        for i, steps in enumerate([4, 6, 12]):
            free = fit(loss_of_many(None), start(3), shared, steps=steps, **options)
            assert same(fit_row(run, i)[:2], fit_row(free, i)[:2])

    @pytest.mark.parametrize("rate", [float("inf"), float("nan")])
    def test_an_update_that_is_not_finite_is_not_made(self, rate):
        with pytest.warns(RuntimeWarning, match="step 0"):
            run = fit(loss_of_one, start(), shared, steps=3, optimizer=momentum(rate))
        assert run.diverged
        assert same((run.params, run.state), (start(), momentum(1.0)[0](start())))

    @pytest.mark.parametrize("n", [(), (3,)])
    def test_resumes_bit_for_bit(self, n, tmp_path):
        loss_fn, number = (loss_of_many(None), n[0]) if n else (loss_of_one, None)
        options = {"optimizer": momentum(0.1), "num_adapters": number}
        train = partial(fit, loss_fn, start(*n), shared, **options)
        first, whole = train(steps=5, checkpoint=tmp_path / "run"), train(steps=9)
        assert same(train(steps=9, resume=first), whole)
        assert same(train(steps=9, resume=tmp_path / "run"), whole)
        assert same(load_fit(tmp_path / "run", start(*n), **options), first)

    def test_a_run_of_another_optimizer_is_refused(self, tmp_path):
        train = partial(fit, loss_of_one, start(), shared)
        train(steps=2, optimizer=momentum(0.1), checkpoint=tmp_path / "run")
        for other in (None, adamw(0.1)):
            with pytest.raises(ValueError, match=r"run is a run .* or another optimizer: .*'state.step'"):
                load_fit(tmp_path / "run", start(), optimizer=other)
        with pytest.raises(ValueError, match=r"resume is a run .* or another optimizer"):
            train(steps=3, resume=train(steps=2, optimizer=momentum(0.1)), learning_rate=0.1)

    def test_a_state_keeps_its_types(self):
        pair = (lambda params: {"t": 0}, lambda grads, state, params: (grads, {"t": state["t"] + 1.0}))
        run = fit(loss_of_one, start(), shared, steps=2, optimizer=pair)
        assert_close(run.state, {"t": torch.tensor(2)})

    def test_a_state_that_changes_its_form_is_refused(self):
        for later in ({}, {"m": ones(2)}, [ones(())]):
            pair = (lambda params: {"m": ones(())}, lambda grads, state, params, later=later: (grads, later))
            with pytest.raises(ValueError, match="update must keep the structure and shapes of the state"):
                fit(loss_of_one, start(), shared, steps=2, optimizer=pair)


# By torch.optim. torchopt corrects for the start in float32, whatever the params are in.
TORCHOPT = {
    "adam": (lambda: torchopt.adam(0.1), lambda p: torch.optim.Adam(p, 0.1)),
    "adamw": (lambda: torchopt.adamw(0.1, weight_decay=0.2), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.2)),
    "adamax": (lambda: torchopt.adamax(0.1), lambda p: torch.optim.Adamax(p, 0.1)),
    "momentum": (
        lambda: torchopt.sgd(0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    ),
    "rmsprop": (lambda: torchopt.rmsprop(0.1, alpha=0.9), lambda p: torch.optim.RMSprop(p, 0.1, alpha=0.9)),
}


# vmap says of an operation that it knows that it is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", TORCHOPT)
def test_optimizers_of_torchopt(name, tmp_path):
    make, make_right = TORCHOPT[name]
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    params, targets = {"a": normal(5), "b": normal(2, 3), "c": normal(())}, normal(6, 5)
    loss = lambda p, y: (p["a"] * p["c"] - y).square().sum() + p["b"].cos().sum()
    batches = lambda step: targets[step]
    leaves = {k: leaf.clone().requires_grad_() for k, leaf in params.items()}
    right = make_right(leaves.values())
    for step in range(6):
        right.zero_grad()
        loss(leaves, batches(step)).backward()
        right.step()
    train = partial(fit, steps=6, optimizer=make())
    run = train(loss, params, batches, checkpoint=tmp_path / "run")
    assert_close(run.params, {k: leaf.detach() for k, leaf in leaves.items()}, rtol=1e-4, atol=1e-4)
    assert same(load_fit(tmp_path / "run", params, optimizer=make()), run)
    many = torch.func.vmap(loss, in_dims=(0, None))
    both = train(many, {k: torch.stack([p, p]) for k, p in params.items()}, batches, num_adapters=2,
                 learning_rate=[1.0, 0.5])  # fmt: skip
    assert_close(fit_row(both, 0)[:3], run[:3])
    assert_close(fit_row(both, 1)[:3], train(loss, params, batches, learning_rate=0.5)[:3])
