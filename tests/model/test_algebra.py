"""Scaled adapters and sums of adapters that are adapters again."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

import vera_func as vf

from refused import (
    NAN,
    PARAMS,
    STACK,
    Refused,
    X,
)


OUT, IN, R = 11, 7, 5
FROZEN = {k: v.double() for k, v in vf.init_projections(R, IN, OUT).items()}
FACTORS = st.floats(-3, 3, width=32)


def adapter(seed, **leaves):
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for layer in ("0.q", "1.v"):
        params[f"{layer}.lambda_b"] = torch.randn(OUT, generator=generator, dtype=torch.float64)
        params[f"{layer}.lambda_d"] = torch.randn(R, generator=generator, dtype=torch.float64)
    return params | leaves


def deltas(params):
    layers = [key.removesuffix(".lambda_b") for key in params if key.endswith("lambda_b")]
    vectors = {layer: {leaf: params[f"{layer}.{leaf}"] for leaf in ("lambda_b", "lambda_d")} for layer in layers}
    return {layer: vf.delta_weight(vectors[layer], FROZEN, IN) for layer in layers}


def with_same(params, other, leaf, factor=1.0):
    return {key: factor * other[key] if key.endswith(leaf) else value for key, value in params.items()}


@settings(max_examples=25, deadline=None)
@given(factor=FACTORS)
def test_scaling(factor):
    params = adapter(0)
    assert_close(deltas(vf.scale_adapter(params, factor)), {k: factor * v for k, v in deltas(params).items()})


def test_scaling_of_stacked_ones():
    stacked = vf.stack_adapters([adapter(0), adapter(1)])
    scaled = vf.unstack_adapters(vf.scale_adapter(stacked, 0.5))
    assert_close(scaled[1], vf.scale_adapter(adapter(1), 0.5), rtol=0, atol=0)


@pytest.mark.parametrize("leaf", ["lambda_b", "lambda_d"])
@settings(max_examples=25, deadline=None)
@given(factor=FACTORS, weights=st.tuples(FACTORS, FACTORS, FACTORS))
def test_sums_of_parallel_vectors(leaf, factor, weights):
    a, b, c = adapter(0), adapter(1), adapter(2)
    a[f"0.q.{leaf}"][0] = 0  # which is a multiple of any number, and of which only 0 is one
    three = [a, with_same(b, a, leaf), with_same(c, a, leaf, factor)]
    parts = [deltas(params) for params in three]
    expected = {k: sum(w * part[k] for w, part in zip(weights, parts, strict=True)) for k in parts[0]}
    assert_close(deltas(vf.add_adapters(three, weights)), expected)


def test_layers_may_differ_in_what_is_parallel():
    a, b = adapter(0), adapter(1)
    b["0.q.lambda_b"], b["1.v.lambda_d"] = -2 * a["0.q.lambda_b"], a["1.v.lambda_d"]
    parts = deltas(a), deltas(b)
    assert_close(deltas(vf.add_adapters([a, b])), {k: parts[0][k] + parts[1][k] for k in parts[0]})


def test_small_entries_are_compared_as_exactly_as_large_ones():
    a = adapter(0)
    for leaf in ("lambda_b", "lambda_d"):
        a[f"0.q.{leaf}"][0] = 1e-8
    b = a | {key: torch.cat([2 * a[key][:1], a[key][1:]]) for key in ("0.q.lambda_b", "0.q.lambda_d")}
    with pytest.raises(ValueError, match=r"'0\.q' neither"):
        vf.add_adapters([a, b])


def test_an_adapter_that_adds_nothing_can_be_added_to_any():
    a, nothing = adapter(0), {k: torch.zeros_like(v) if "b" in k else v for k, v in adapter(1).items()}
    for several in ([a, nothing], [nothing, a], [nothing, a, nothing]):
        assert_close(deltas(vf.add_adapters(several)), deltas(a))
    for several in ([nothing], [nothing, nothing]):
        assert not any(delta.any() for delta in deltas(vf.add_adapters(several)).values())
    assert_close(deltas(vf.add_adapters([adapter(3), a], [0, 1])), deltas(a))


def test_inputs_are_left_as_they_were():
    a = adapter(0)
    vf.add_adapters([a, a])
    vf.scale_adapter(a, 3.0)
    assert_close(a, adapter(0), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("adapters", "weights", "says"),
    [
        ([], None, "at least one"),
        ([adapter(0)], [1.0, 2.0], "1 adapters and 2 weights"),
        ([adapter(0)], [float("inf")], "finite"),
        ([adapter(0), adapter(1)], None, "select_adapters"),
        ([adapter(0), {k: v for k, v in adapter(0).items() if "q" in k}], None, "pool_adapters"),
        ([adapter(0), {k: v for k, v in adapter(0).items() if k != "1.v.lambda_d"}], None, "'1.v.lambda_d' has"),
        ([vf.stack_adapters([adapter(0)])], None, "single adapters"),
        ([adapter(0, **{"head.weight": torch.ones(2)})], None, "'head.weight'"),
        (
            [adapter(0), with_same(adapter(1), adapter(0), "lambda_d", 1) | {"0.q.lambda_d": torch.ones(6)}],
            None,
            "'0.q.lambda_d' has shape (6,) in adapter 1 and (5,)",
        ),
    ],
)
def test_sums_that_are_refused(adapters, weights, says):
    with pytest.raises(ValueError, match=r".") as caught:
        vf.add_adapters(adapters, weights)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("params", "factor", "says"),
    [
        (adapter(0), float("nan"), "finite"),
        (adapter(0), float("inf"), "finite"),
        (adapter(0, bias=torch.ones(2)), 2.0, "'bias'"),
    ],
)
def test_scalings_that_are_refused(params, factor, says):
    with pytest.raises(ValueError, match=says):
        vf.scale_adapter(params, factor)


# What is refused

bad = Refused()

bad("scale_adapter", "NaN", lambda _: vf.scale_adapter(PARAMS, NAN), "factor must be a finite number, got nan")
bad("scale_adapter", "many", lambda _: vf.scale_adapter(PARAMS, torch.ones(2)), r"a finite number, got tensor\(")
bad(
    "scale_adapter",
    "a head of its own",
    lambda _: vf.scale_adapter({"head.weight": X}, 2.0),
    "'head.weight', which is not an adapter vector",
)
bad("add_adapters", "none", lambda _: vf.add_adapters([]), "at least one adapter")
bad("add_adapters", "stacked", lambda _: vf.add_adapters([STACK, STACK]), "single adapters")
bad("add_adapters", "weights of another number", lambda _: vf.add_adapters([PARAMS], [1, 2]), "got 1 adapters and 2")
bad("add_adapters", "NaN", lambda _: vf.add_adapters([PARAMS, PARAMS], [1, NAN]), "weights must be finite")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
