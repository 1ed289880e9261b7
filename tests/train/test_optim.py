"""AdamW and clipping as pure functions: equal to torch, for one adapter or many."""

import math
from functools import partial

import pytest
import torch
import torchopt
from hypothesis import given, settings, strategies as st
from torch import ones
from torch.func import grad, hessian, jvp, vmap
from torch.testing import assert_close

from vera_func.private import tree_leaves
from vera_func.train.optim import (
    adamw,
    adamw_init,
    adamw_update,
    apply_updates,
    as_optimizer,
    clip_by_norm,
    global_norm,
)

from refused import NAN, Refused


EXACT = {"rtol": 1e-12, "atol": 1e-14}


def make(*n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.lambda_b": (7,), "a.lambda_d": (3,), "scale": ()}
    return {k: torch.randn((*n, *s), generator=generator, dtype=torch.float64).to(dtype) for k, s in shapes.items()}


def row(tree, i):
    return {k: leaf[i] for k, leaf in tree.items()}


def steps_here(params, gradients, **hyper):
    state = adamw_init(params)
    for grads in gradients:
        params, state = adamw_update(grads, state, params, **hyper)
    return params, state


def steps_in_torch(params, gradients, *, learning_rate, **hyper):
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=learning_rate, foreach=False, **hyper)
    for grads in gradients:
        for k, leaf in leaves.items():
            leaf.grad = grads[k].clone()
        optimizer.step()
    return {k: leaf.detach() for k, leaf in leaves.items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch(weight_decay):
    gradients = [make(seed=seed) for seed in range(1, 21)]
    hyper = {"learning_rate": 0.03, "weight_decay": weight_decay}
    actual, state = steps_here(make(), gradients, **hyper)
    assert_close(actual, steps_in_torch(make(), gradients, **hyper), **EXACT)
    assert state.step == 20
    assert state.step.dtype == torch.int64


@settings(max_examples=30, deadline=None)
@given(
    learning_rate=st.floats(1e-6, 1.0),
    betas=st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.9999)),
    eps=st.floats(1e-10, 1e-3),
    weight_decay=st.floats(0.0, 1.0),
    seed=st.integers(0, 99),
)
def test_adamw_equals_torch_for_any(seed, **hyper):
    gradients = [make(seed=seed + i) for i in (1, 2, 3)]
    expected = steps_in_torch(make(seed=seed), gradients, **hyper)
    # 1 - b2^t cancels where b2 is near 1, and pow differs by a unit between float and tensor.
    assert_close(steps_here(make(seed=seed), gradients, **hyper)[0], expected, rtol=1e-10, atol=1e-12)


def test_adamw_equals_torch_where_only_the_mean_is_left():
    gradients = [make(seed=1), {k: torch.zeros_like(v) for k, v in make().items()}]
    hyper = {"learning_rate": 0.03, "betas": (0.9, 0.0), "eps": 0.01, "weight_decay": 0.1}
    assert_close(steps_here(make(), gradients, **hyper)[0], steps_in_torch(make(), gradients, **hyper), **EXACT)


def test_adamw_as_tensors_equals_floats():
    gradients = [make(seed=1), make(seed=2)]
    floats = {"learning_rate": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in floats.items()}
    tensors["betas"] = tuple(tensors["betas"])
    expected = steps_here(make(), gradients, **floats)[0]
    assert_close(steps_here(make(), gradients, **tensors)[0], expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vmap_over_learning_rates_equals_loop(dtype):
    params, grads = make(5, dtype=dtype), make(5, seed=1, dtype=dtype)
    rates = torch.tensor([0.0, 1e-3, 1e-2, 0.1, 1.0], dtype=torch.float64)
    state = vmap(adamw_init)(params)
    update = vmap(lambda g, s, p, lr: adamw_update(g, s, p, learning_rate=lr, weight_decay=0.1))
    for _ in range(2):
        params, state = update(grads, state, params, rates)
    assert state.step.tolist() == [2] * 5
    for i, rate in enumerate(rates.tolist()):
        one, g = row(make(5, dtype=dtype), i), row(grads, i)
        expected, _ = steps_here(one, [g, g], learning_rate=rate, weight_decay=0.1)
        assert_close(row(params, i), expected)
        assert all(leaf.dtype == dtype for leaf in params.values())


def test_vmap_over_learning_rate_alone():
    params, grads = make(), make(seed=1)
    state = adamw_init(params)
    update = lambda lr: adamw_update(grads, state, params, learning_rate=lr)[0]
    batched = vmap(update)(torch.tensor([0.1, 0.2]))
    assert_close(row(batched, 1), update(torch.tensor(0.2)), **EXACT)


def after_two_steps(params, rate):
    """A scalar of params and rate, through every function that updates."""
    state = adamw_init(params)
    for _ in range(2):
        grads = clip_by_norm({k: p**3 for k, p in params.items()}, 0.7)
        params, state = adamw_update(grads, state, params, learning_rate=rate, weight_decay=0.1)
    return global_norm(params)


@pytest.mark.parametrize("argnum", [0, 1])
def test_derivatives_equal_differences(argnum):
    args = (make(), torch.tensor(0.1, dtype=torch.float64))
    tangent = (make(seed=5), torch.tensor(1.0, dtype=torch.float64))[argnum]

    def along(t):
        moved = list(args)
        if argnum:
            moved[1] = args[1] + t * tangent
        else:
            moved[0] = {k: p + t * tangent[k] for k, p in args[0].items()}
        return after_two_steps(*moved)

    zero, one, h = *torch.tensor([0.0, 1.0], dtype=torch.float64), 1e-5
    expected = (along(h) - along(-h)) / (2 * h)
    assert_close(grad(along)(zero), expected, rtol=1e-6, atol=1e-8)
    assert_close(jvp(along, (zero,), (one,))[1], expected, rtol=1e-6, atol=1e-8)
    assert hessian(along)(zero).isfinite()


def test_derivative_where_a_gradient_is_zero():
    # Step 1 of VeRA: lambda_b is zero, so lambda_d has no gradient.
    params = {"b": torch.zeros(2), "d": torch.ones(2)}

    def loss(rate):
        grads = {"b": torch.ones(2), "d": torch.zeros(2)}
        moved, _ = adamw_update(clip_by_norm(grads, 1.0), adamw_init(params), params, learning_rate=rate)
        return global_norm(moved)

    def through_grads(g):
        grads = {"b": g, "d": g * 0}
        moved, _ = adamw_update(grads, adamw_init(params), params, learning_rate=0.1, eps=1.0)
        return moved["b"].sum() + moved["d"].sum()

    assert grad(loss)(torch.tensor(0.1)).isfinite()
    assert grad(through_grads)(torch.ones(2)).isfinite().all()
    assert_close(grad(lambda g: global_norm({"g": g}))(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("mapped", [False, True])
def test_compiles_whole(mapped):
    n = (3,) if mapped else ()
    rates = torch.full(n, 0.1, dtype=torch.float64)

    def step(params, rate):
        grads = clip_by_norm(params, 0.5)
        return adamw_update(grads, adamw_init(params), params, learning_rate=rate)[0]

    step = vmap(step) if mapped else step
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert_close(compiled(make(*n), rates), step(make(*n), rates), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_updated_in_float32(dtype):
    gradients = [make(seed=seed, dtype=dtype) for seed in (1, 2)]
    params, state = steps_here(make(dtype=dtype), gradients[:1], learning_rate=0.1)
    wide = {k: p.float() for k, p in make(dtype=dtype).items()}
    expected, _ = steps_here(wide, gradients[:1], learning_rate=0.1)
    assert_close(params, {k: p.to(dtype) for k, p in expected.items()}, rtol=0, atol=0)
    assert {m.dtype for m in (*state.mean.values(), *state.var.values())} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_pair_makes_the_steps_of_adamw(dtype, weight_decay):
    options = {"learning_rate": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer = adamw(**options)
    params = expected = make(dtype=dtype)
    state = right = optimizer.init(params)
    for seed in range(3):
        grads = make(seed=seed, dtype=dtype)
        updates, state = optimizer.update(grads, state, params)
        params = apply_updates(params, updates)
        expected, right = adamw_update(grads, right, expected, **options)
        assert {k: u.dtype for k, u in updates.items()} == {k: m.dtype for k, m in right.mean.items()}
        assert_close((params, state), (expected, right))


def test_the_pair_maps_over_learning_rates():
    rates, params, grads = torch.tensor([0.1, 0.5], dtype=torch.float64), make(2), make(2, seed=1)
    state = vmap(adamw_init)(params)
    step = lambda g, s, p, rate: apply_updates(p, adamw(1.0, weight_decay=0.1).update(g, s, p)[0], rate)
    moved = vmap(step)(grads, state, params, rates)
    for i, rate in enumerate(rates):
        one = row(params, i)
        expected, _ = adamw_update(row(grads, i), adamw_init(one), one, learning_rate=rate, weight_decay=0.1)
        assert_close(row(moved, i), expected, **EXACT)


def test_updates_of_16_bit_params_are_added_in_float32():
    params, updates = {"p": ones(2, dtype=torch.bfloat16)}, {"p": torch.full((2,), 2**-6, dtype=torch.float32)}
    assert_close(apply_updates(params, updates, 2**-2)["p"], ones(2, dtype=torch.bfloat16))
    assert_close(apply_updates(params, updates, 1.0)["p"], torch.full((2,), 1 + 2**-6, dtype=torch.bfloat16))


def test_torchopt_is_told_to_write_to_nothing():
    params, grads = make(), make(seed=1)
    optimizer = as_optimizer(torchopt.sgd(0.1, momentum=0.9, weight_decay=0.1))
    state = optimizer.init(params)
    before = [t.clone() for t in tree_leaves((params, grads, state))]
    updates, _ = optimizer.update(grads, state, params)
    assert all(map(torch.equal, tree_leaves((params, grads, state)), before))
    assert_close(updates, {k: -0.1 * (g + 0.1 * params[k]) for k, g in grads.items()})


def test_numbers_in_a_state_become_tensors():
    counting = as_optimizer((lambda params: {"t": 1, "f": 0.1}, lambda g, s, p: (g, {"t": s["t"] + 1, "f": 0.2})))
    state = counting.init({"p": ones(2)})
    assert_close(state, {"t": torch.tensor(1), "f": torch.tensor(0.1, dtype=torch.float64)})
    _, state = counting.update({}, state, {"p": ones(2)})
    assert_close(state, {"t": torch.tensor(2), "f": torch.tensor(0.2, dtype=torch.float64)})


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 100.0, math.inf])
def test_clip_equals_torch(max_norm):
    grads = make()
    leaves = [torch.zeros_like(g).requires_grad_() for g in grads.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    assert_close(global_norm(grads), norm, **EXACT)
    expected = {k: leaf.grad for k, leaf in zip(grads, leaves, strict=True)}
    assert_close(clip_by_norm(grads, max_norm), expected, **EXACT)


def test_clip_is_per_adapter():
    grads, limits = make(4), torch.tensor([0.1, 0.5, 1.0, 99.0], dtype=torch.float64)
    clipped = vmap(clip_by_norm)(grads, limits)
    for i, limit in enumerate(limits.tolist()):
        assert_close(row(clipped, i), clip_by_norm(row(grads, i), limit), **EXACT)


def test_clip_does_not_overflow_or_hide():
    large = {"g": torch.full((2,), 6e4, dtype=torch.float16)}
    assert global_norm(large).isfinite()
    assert clip_by_norm(large, 1.0)["g"].dtype == torch.float16
    assert_close(clip_by_norm({"g": torch.zeros(2)}, 1.0)["g"], torch.zeros(2))
    assert clip_by_norm({"g": torch.tensor([1.0, math.nan])}, 1.0)["g"].isnan().all()


def test_inputs_are_not_modified():
    params, grads, state = make(), make(seed=1), adamw_init(make())
    inputs = [*params.values(), *grads.values(), state.step, *state.mean.values()]
    before = [t.clone() for t in inputs]
    adamw_update(clip_by_norm(grads, 0.1), state, params, learning_rate=0.1, weight_decay=0.1)
    assert all(map(torch.equal, inputs, before))


def test_mistakes_raise():
    params, state = make(), adamw_init(make())
    update = partial(adamw_update, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"grads .* missing keys: \['scale'\], unknown keys: \['other'\]"):
        update({**row_without(params, "scale"), "other": torch.ones(1)}, state, params)
    with pytest.raises(ValueError, match=r"state.mean .* missing keys: \['new'\]"):
        update({**params, "new": torch.ones(1)}, state, {**params, "new": torch.ones(1)})
    with pytest.raises(ValueError, match=r"grads\['scale'\] has shape \(2,\)"):
        update({**params, "scale": torch.ones(2)}, state, params)
    with pytest.raises(ValueError, match=r"learning_rate must be a scalar .* got shape \(7,\).*vmap"):
        adamw_update(params, state, params, learning_rate=torch.ones(7))
    with pytest.raises(ValueError, match=r"max_norm must be a scalar .* got shape \(7,\)"):
        clip_by_norm(params, torch.ones(7))
    with pytest.raises(ValueError, match="stacked adapters"):
        update(make(2), vmap(adamw_init)(make(2)), make(2))
    with pytest.raises(ValueError, match="nothing to train"):
        adamw_init({})
    with pytest.raises(ValueError, match="empty"):
        global_norm({})


def row_without(tree, key):
    return {k: leaf for k, leaf in tree.items() if k != key}


# What is refused

bad = Refused()


def update(**change):
    tree = {"p": ones(2)}
    options = {"grads": tree, "state": adamw_init(tree), "params": tree, "learning_rate": 0.1} | change
    return adamw_update(**options)


bad(
    "adamw_init",
    "integers",
    lambda _: adamw_init({"p": ones(2).long()}),
    r"params\['p'\] is torch.int64; only float",
)

for name, value, message in (
    ("learning_rate", NAN, "learning_rate must be at least 0, got nan"),
    ("learning_rate", -1.0, "learning_rate must be at least 0, got -1"),
    ("betas", (1.0, 0.9), "betas must be at least 0 and below 1, got 1.0"),
    ("betas", (0.9, 2.0), "betas must be at least 0 and below 1, got 2.0"),
    ("betas", (-0.1, 0.9), "betas must be at least 0 and below 1, got -0.1"),
    ("eps", -1.0, "eps must be at least 0"),
    ("eps", NAN, "eps must be at least 0, got nan"),
    ("weight_decay", -1.0, "weight_decay must be at least 0"),
):
    bad("adamw_update", f"{name}={value}", lambda _, k=name, v=value: update(**{k: v}), message)

bad(
    "adamw_update",
    "gradients of another size",
    lambda _: update(grads={"p": ones(3)}),
    r"grads\['p'\] has shape \(3,\)",
)
bad("clip_by_norm", "a negative norm", lambda _: clip_by_norm({"p": ones(2)}, -1.0), "max_norm must be at least 0")
bad("clip_by_norm", "a norm of NaN", lambda _: clip_by_norm({"p": ones(2)}, NAN), "max_norm must be at least 0")
bad("clip_by_norm", "nothing", lambda _: clip_by_norm({}, 1.0), "the norm of an empty dict")
bad("global_norm", "nothing", lambda _: global_norm({}), "the norm of an empty dict")


PARAMS = {"p": ones(2)}
bad("apply_updates", "other keys", lambda _: apply_updates(PARAMS, {"q": ones(2)}), r"updates .* missing keys: \['p'\]")
bad(
    "apply_updates",
    "another shape",
    lambda _: apply_updates(PARAMS, {"p": ones(3)}),
    r"updates\['p'\] has shape \(3,\)",
)
leaf = ones(2, requires_grad=True)
for what, wrong, found in (
    ("one of torch.optim", torch.optim.SGD([leaf], lr=0.1), "got SGD"),
    ("a function", adamw, "got function"),
    ("three functions", (len, len, len), "got tuple"),
    ("no functions", (1, 2), "got tuple"),
):
    bad("as_optimizer", what, lambda _, wrong=wrong: as_optimizer(wrong), f"a pair of pure functions, .*{found}")
bad(
    "as_optimizer", "None in the state", lambda _: as_optimizer((lambda p: {"m": None}, len)).init(PARAMS),
    "pytree of tensors and numbers, got a leaf of type NoneType",
)  # fmt: skip
for what, result in (("updates alone", {"p": ones(2)}), ("a tensor", (ones(2), ()))):
    bad(
        "as_optimizer", what,
        lambda _, result=result: as_optimizer((len, lambda g, s, p: result)).update({}, (), PARAMS),
        r"must return \(updates, state\) with a dict of updates",
    )  # fmt: skip


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
