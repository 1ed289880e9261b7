"""Laws over any shape, dtype and base: what must hold whatever the numbers are.

Sizes are 1, primes, and others that fill no whole block; what is drawn is small, so that many cases are tried.
"""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.func import grad, jacfwd, jvp, vjp, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import vera_func as vf
import vera_func.train.fit
from vera_func.merging.layer import merge_stochastic
from vera_func.quant.value import BLOCKSIZES
from vera_func.train.privacy import poisson_indices

from helpers import BASES, TRANSFORMS, make_base, make_layer, row, snapshot


laws = settings(max_examples=25, deadline=None)
sizes = st.sampled_from([1, 2, 3, 7, 13, 31, 32, 37, 64, 97])
seeds = st.integers(0, 99)
dims = st.sampled_from([0, 1, -2, -3, None])
bases = st.sampled_from(BASES)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def _eager():
    """bitsandbytes compiles its 8-bit operations anew for every shape on a CPU; here there are many."""
    with torch.compiler.set_stance("force_eager"):
        yield


TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def assert_same(one, other):
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def near(actual, expected, dtype=torch.float64, scale=1.0):
    """Equal up to rounding in `dtype`, relative to the largest number that was in play."""
    size = max(float(expected.abs().max()) if expected.numel() else 0.0, float(scale), 1.0)
    assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * size)


@laws
@given(out=sizes, in_=sizes, r=sizes, base=bases, x_dtype=dtypes, vectors=dtypes, seed=seeds)
def test_forward_minus_base_is_the_delta(out, in_, r, base, x_dtype, vectors, seed):
    params, frozen, weight, x = make_layer(out=out, in_=in_, r=r, seed=seed, dtype=torch.float32)
    base_fn, _ = make_base(base, weight.to(x_dtype))
    params, x = {key: leaf.to(vectors) for key, leaf in params.items()}, x.to(x_dtype)
    y = vf.vera_forward(params, frozen, x, base_fn)
    delta = vf.delta_weight({key: leaf.double() for key, leaf in params.items()}, frozen, in_)
    assert (y.dtype, y.shape) == (x_dtype, (3, out))
    update = x.double() @ delta.T
    coarsest = max((x_dtype, vectors), key=lambda dtype: torch.finfo(dtype).eps)
    scale = max(float(base_fn(x).abs().max()), float(update.abs().max()))
    # Terms may be larger than their sum.
    terms = float((x.double().abs() @ delta.abs().T).max())
    near(y.double() - base_fn(x).double(), update, coarsest, max(scale, terms))


@laws
@given(out=sizes, in_=sizes, r=sizes, base=bases, a=st.floats(-3, 3), b=st.floats(-3, 3), seed=seeds)
def test_linear_in_lambda_b_over_any_base(out, in_, r, base, a, b, seed):
    params, frozen, weight, x = make_layer(2, out=out, in_=in_, r=r, seed=seed)
    base_fn, _ = make_base(base, weight)
    first, second = row(params, 0), row(params, 0) | {"lambda_b": params["lambda_b"][1]}
    update = lambda p: vf.vera_forward(p, frozen, x, base_fn) - base_fn(x)
    mixed = first | {"lambda_b": a * first["lambda_b"] + b * second["lambda_b"]}
    scale = sum(float(update(p).abs().max()) for p in (first, second)) + float(base_fn(x).abs().max())
    near(update(mixed), a * update(first) + b * update(second), scale=4 * scale)


@laws
@given(n=st.integers(1, 5), batch=st.integers(1, 4), in_dim=dims, base=bases, seed=seeds)
def test_vmap_is_a_loop_is_folding(n, batch, in_dim, base, seed):
    params, frozen, weight, _ = make_layer(n, seed=seed)
    base_fn, _ = make_base(base, weight)
    shape = (batch, weight.shape[1])
    if in_dim is not None:
        shape = (n, *shape) if in_dim in (0, -3) else (batch, n, weight.shape[1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    f = lambda p, frozen, x: vf.vera_forward(p, frozen, x, base_fn)
    one = lambda i: x if in_dim is None else x.select(in_dim, i)
    loop = torch.stack([f(row(params, i), frozen, one(i)) for i in range(n)])
    near(vmap(f, (0, None, in_dim))(params, frozen, x), loop)
    near(vf.vmap_adapters(f, in_dim)(params, frozen, x), loop)
    near(vf.vmap_adapters(f, in_dim, chunk_size=2)(params, frozen, x), loop)


@laws
@given(n=st.integers(1, 5), out=sizes, r=sizes, dtype=dtypes, seed=seeds)
def test_unstacking_undoes_stacking(n, out, r, dtype, seed):
    params, *_ = make_layer(n, out=out, r=r, seed=seed, dtype=torch.float32)
    adapters = [{key: leaf.to(dtype) for key, leaf in row(params, i).items()} for i in range(n)]
    stacked = vf.stack_adapters(adapters)
    assert_same(vf.unstack_adapters(stacked), adapters)
    assert_same(vf.stack_adapters(vf.unstack_adapters(stacked)), stacked)


@laws
@given(
    n=st.integers(1, 5),
    order=st.randoms(use_true_random=False),
    ids=st.lists(st.integers(-1, 4), min_size=1, max_size=9),
)
def test_permuting_rows_commutes_with_selecting(n, order, ids):
    ids = torch.tensor([min(i, n - 1) for i in ids])
    stacked, frozen, weight, _ = make_layer(n)
    x = torch.randn(len(ids), weight.shape[1], dtype=torch.float64)
    permuted = torch.tensor(order.sample(range(len(ids)), len(ids)))
    forward = lambda ids, x: vf.vera_forward(vf.select_adapters(stacked, ids), frozen, x, lambda x: x @ weight.T)
    assert_same(
        vf.select_adapters(stacked, ids[permuted]),
        {k: v[permuted] for k, v in vf.select_adapters(stacked, ids).items()},
    )
    near(forward(ids[permuted], x[permuted]), forward(ids, x)[permuted])


@laws
@given(n=st.integers(1, 9), out=sizes, r=sizes, dtype=dtypes, rows=st.lists(st.integers(0, 8), max_size=6), seed=seeds)
def test_a_bank_holds_what_was_saved(tmp_path_factory, n, out, r, dtype, rows, seed):
    layer, *_ = make_layer(n, out=out, r=r, seed=seed, dtype=torch.float32)
    stacked = {f"0.{key}": leaf.to(dtype) for key, leaf in layer.items()}
    frozen = vf.init_projections(r, 3, out, seed)
    names, rows = [f"{i}\n\N{SNOWMAN}" for i in range(n)], [i % n for i in rows]
    path = tmp_path_factory.mktemp("bank") / "bank"
    vf.save_bank(path, stacked, frozen, vf.VeraConfig(r=r, target_modules=["0"]), names)
    bank = vf.open_bank(path)
    assert_same(bank.read(), {key: bank.read()[key] for key in bank.read()})
    for read in (bank.read(), bank.read(names)):
        assert all(torch.equal(read[key], leaf) and read[key].dtype == dtype for key, leaf in stacked.items())
    chosen = bank.read([names[i] for i in rows])
    assert all(torch.equal(chosen[key], leaf[rows]) for key, leaf in stacked.items())
    assert all(torch.equal(bank.frozen()[key], leaf) for key, leaf in frozen.items())


formats = st.one_of(
    st.builds(
        lambda **options: lambda weight: vf.quantize_4bit(weight, **options),
        quant_type=st.sampled_from(["nf4", "fp4"]),
        blocksize=st.sampled_from(BLOCKSIZES),
        double_quant=st.booleans(),
        compute_dtype=st.sampled_from([None, torch.bfloat16]),
    ),
    st.builds(
        lambda threshold: lambda weight: vf.quantize_8bit(weight, threshold=threshold), st.sampled_from([0.0, 6.0])
    ),
)


@laws
@given(out=sizes, in_=sizes, form=formats, dtype=dtypes, biased=st.booleans(), seed=seeds)
def test_reading_a_module_undoes_making_it(out, in_, form, dtype, biased, seed):
    _, _, weight, _ = make_layer(out=out, in_=in_, seed=seed, dtype=torch.float32)
    q = form(weight.to(dtype))
    bias = weight[:, 0].to(dtype) if biased else None
    again, bias_again = vf.from_bnb(vf.to_bnb(q, bias))
    assert_same(tree_leaves(again), tree_leaves(q))
    static = lambda q: {f.name: getattr(q, f.name) for f in dataclasses.fields(q) if f.name not in LEAVES}
    assert static(again) == static(q)
    assert (bias_again is None) if bias is None else torch.equal(bias_again, bias)


LEAVES = ("packed", "absmax", "nested", "codes", "scale")


@laws
@given(
    out=sizes,
    in_=sizes,
    r=sizes,
    form=formats,
    dtype=dtypes,
    which=st.sampled_from(["lambda_b", "lambda_d"]),
    seed=seeds,
)
def test_merging_zero_changes_nothing(out, in_, r, form, dtype, which, seed):
    params, frozen, weight, _ = make_layer(out=out, in_=in_, r=r, seed=seed, dtype=torch.float32)
    params |= {which: torch.zeros_like(params[which])}
    q = form(weight.to(dtype))
    assert_same(vf.merge_quantized(q, params, frozen), q)
    assert_same(vf.merge_dense(q, params, frozen, torch.float32), vf.dequantize(q, torch.float32))
    if isinstance(q, vf.Quantized4bit):
        assert_same(vf.merge_calibrated(q, params, frozen, torch.ones(2, in_)), q)
        assert_same(merge_stochastic(q, params, frozen, generator=torch.Generator()), q)


def _quantized_and_merged():
    weight = torch.linspace(-1, 1, 32 * 64, dtype=torch.float32, device="cpu").reshape(32, 64)
    q, frozen = vf.quantize_4bit(weight), vf.init_projections(4, 64, 32)
    params = {name: vector + 0.01 for name, vector in vf.init_params(4, 32).items()}
    return vf.to_bnb(q).quant_state.code, vf.merge_calibrated(q, params, frozen, weight)


def _trained():
    vectors = vf.init_params(3, 4)
    loss = lambda params, batch: (params["lambda_b"] - params["lambda_d"].sum()).square().sum()
    fitness = lambda stacked: -stacked["lambda_b"].square().sum(1)
    options = {"steps": 2, "population": 4, "sigma": 0.1, "learning_rate": 0.1, "seed": 0}
    run = vf.fit(loss, vectors, batch_indices, steps=2, learning_rate=0.3, progress=False)
    return run, vf.evolve(fitness, vectors, **options), poisson_indices(0, num_examples=9, batch_size=3, key=0)


def _selected():
    stacked = vf.stack_adapters([vf.init_params(3, 4, dtype=torch.float64)] * 2)
    return vf.select_adapters(stacked, [[0, 1]], [[0.3, 0.7]]), vf.select_adapters(stacked, [])


MODEL = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
batch_indices = functools.partial(vera_func.train.fit.batch_indices, num_examples=5, batch_size=2, key=0)
CALLS = {
    "adapt": lambda: vf.adapt(MODEL, vf.VeraConfig(r=3, target_modules=["0"]))[1:3],
    "adapt, random": lambda: vf.adapt(
        MODEL, vf.VeraConfig(r=3, target_modules=["0"], init_weights=False), generator=torch.Generator()
    )[1:3],
    "dropout_mask": lambda: vf.dropout_mask(0.3, (5, 7), generator=torch.Generator()),
    "quantized and merged": _quantized_and_merged,
    "selected": _selected,
    "trained": _trained,
}


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_the_default_dtype_and_device_change_nothing(call, default):
    right = CALLS[call]()
    try:
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        found = CALLS[call]()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert_same(found, right)
    assert all(leaf.device.type == "cpu" for leaf in tree_leaves(found))


@laws
@given(base=bases, transform=st.sampled_from(list(TRANSFORMS)), n=st.integers(0, 3), seed=seeds)
def test_no_transform_modifies_its_inputs(base, transform, n, seed):
    params, frozen, weight, x = make_layer(*[n] * (n > 0), seed=seed, out=3, in_=5, r=2)
    base_fn, dense = make_base(base, weight)
    before = snapshot(params, frozen, weight, x, dense)
    one = TRANSFORMS[transform](lambda p: vf.vera_forward(p, frozen, x, base_fn))
    (vmap(one) if n else one)(params)
    in_x = lambda x: vf.vera_forward(row(params, 0) if n else params, frozen, x, base_fn)
    grad(lambda x: in_x(x).sum())(x), jvp(in_x, (x,), (x,)), vjp(in_x, x)[1](in_x(x)), jacfwd(in_x)(x)
    assert_same(snapshot(params, frozen, weight, x, dense), before)
