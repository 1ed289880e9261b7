"""Merging one layer: PEFT's bytes, and calibration that keeps what rounding loses."""

import peft
import pytest
import torch
from torch import nn, ones
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import vera_func as vf
from vera_func.merging.calibrate import gram
from vera_func.merging.layer import merge_stochastic

from refused import LAYER, NAN, PAIR, Q4, Q8, ROWS, Refused, X, filled
from weights import IN, R, make_adapter, make_weight


FORMATS = {
    "nf4": lambda w: vf.quantize_4bit(w, compute_dtype=torch.float32),
    "nested": lambda w: vf.quantize_4bit(w, double_quant=True, compute_dtype=torch.float32),
    "fp4, bf16 compute": lambda w: vf.quantize_4bit(w, "fp4", compute_dtype=torch.bfloat16),
    "bf16 storage": lambda w: vf.quantize_4bit(w, quant_storage=torch.bfloat16, compute_dtype=torch.float32),
    "int8": vf.quantize_8bit,
    "int8, outliers": lambda w: vf.quantize_8bit(w, threshold=6.0),
}


class OneLayer(nn.Module):
    def __init__(self, lin):
        super().__init__()
        self.lin = lin

    def forward(self, x):
        return self.lin(x)


def same_bytes(a, b):
    # As integers: a bf16 storage may spell NaN, which no value equals.
    leaves = [[leaf.contiguous().reshape(-1).view(torch.uint8) for leaf in tree_leaves(q)] for q in (a, b)]
    return len(leaves[0]) == len(leaves[1]) and all(map(torch.equal, *leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_pefts(name, dtype):
    q = FORMATS[name](make_weight(dtype=dtype))
    model = peft.get_peft_model(OneLayer(vf.to_bnb(q)), peft.VeraConfig(r=R, target_modules=["lin"]))
    layer = model.base_model.model.lin
    params, _ = make_adapter(0.1, make_weight())
    for leaf, value in params.items():
        layer.get_parameter(f"vera_{leaf}.default").data.copy_(value)
    frozen = {name: getattr(layer, name)["default"].clone() for name in ("vera_A", "vera_B")}
    theirs, _ = vf.from_bnb(model.merge_and_unload().lin)
    ours = vf.merge_quantized(q, params, frozen)
    assert same_bytes(ours, theirs)
    assert [leaf.dtype for leaf in tree_leaves(ours)] == [leaf.dtype for leaf in tree_leaves(q)]
    assert not same_bytes(ours, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_of_16_bit_adapters_are_pefts(dtype):
    q = vf.quantize_4bit(make_weight(dtype=dtype))
    params, frozen = ({k: t.to(dtype) for k, t in part.items()} for part in make_adapter(0.1, make_weight()))
    model = peft.get_peft_model(OneLayer(vf.to_bnb(q)), peft.VeraConfig(r=R, target_modules=["lin"]))
    layer = model.base_model.model.lin
    for name, value in {**params, **frozen}.items():
        held = getattr(layer, name if name in frozen else f"vera_{name}")
        held["default"] = nn.Parameter(value.clone()) if name in params else value
    model.merge_adapter()
    merged = vf.merge_quantized(q, params, frozen)
    assert same_bytes(merged, vf.from_bnb(layer.get_base_layer())[0])
    exact = vf.delta_weight(*({k: t.double() for k, t in part.items()} for part in (params, frozen)), IN)
    dense = vf.merge_dense(q, params, frozen, torch.float32)
    assert_close(dense.double(), vf.dequantize(q, torch.float64) + exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_float64_adapters_merge_as_in_float32(name):
    params, frozen = make_adapter(0.1, make_weight())
    wide = [{key: leaf.double() for key, leaf in part.items()} for part in (params, frozen)]
    q = FORMATS[name](make_weight())
    merged = [vf.dequantize(vf.merge_quantized(q, *adapter)) for adapter in ((params, frozen), wide)]
    assert (merged[0] - merged[1]).norm() < 1e-2 * merged[0].norm()  # single values may be rounded the other way


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_changes_nothing(name):
    q = FORMATS[name](make_weight())
    params, frozen = make_adapter(0.1, make_weight())
    for leaf in params:
        nothing = params | {leaf: torch.zeros_like(params[leaf])}
        assert same_bytes(vf.merge_quantized(q, nothing, frozen), q)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["lambda_b", "lambda_d", "vera_A"])
@pytest.mark.parametrize("merge", [vf.merge_quantized, vf.merge_dense, vf.merge_report])
def test_broken_adapters_are_refused(merge, key, value):
    q = vf.quantize_4bit(make_weight())
    params, frozen = make_adapter(0.1, make_weight())
    tree = params if key in params else frozen
    tree[key] = tree[key].clone()
    tree[key].view(-1)[3] = value
    with pytest.raises(ValueError, match=f"{key}.*NaN or inf"):
        merge(q, params, frozen)


@pytest.mark.parametrize("merge", [vf.merge_quantized, vf.merge_dense, vf.merge_report])
def test_stacked_adapters_are_refused(merge):
    q = vf.quantize_4bit(make_weight())
    params, frozen = make_adapter(0.1, make_weight())
    with pytest.raises(ValueError, match="unstack_adapters"):
        merge(q, vf.stack_adapters([params, params]), frozen)


@pytest.mark.parametrize("name", FORMATS)
def test_dense_is_the_sum_rounded_once(name):
    q = FORMATS[name](make_weight())
    params, frozen = make_adapter(0.1, make_weight())
    exact = vf.dequantize(q, torch.float64) + vf.delta_weight(
        {k: v.double() for k, v in params.items()}, {k: v.double() for k, v in frozen.items()}, IN
    )
    assert_close(vf.merge_dense(q, params, frozen, torch.float32).double(), exact, rtol=1e-5, atol=1e-7)
    # Half a unit in the last place of bfloat16 (8 bits), and what float32 leaves open on the way.
    error = (vf.merge_dense(q, params, frozen).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 * 1.001 + 1e-9).all()


def correlated(tokens, seed):
    """Inputs as layers see them: a few directions carry most."""
    mix = torch.randn(24, IN, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 24, generator=generator) @ mix
    return x + 0.1 * torch.randn(tokens, IN, generator=generator)


@pytest.mark.parametrize("name", ["nf4", "nested", "fp4, bf16 compute", "bf16 storage"])
def test_calibrated_keeps_what_rounding_loses(name):
    weight = make_weight()
    q = FORMATS[name](weight)
    params, frozen = make_adapter(0.01, weight)
    merged = vf.merge_calibrated(q, params, frozen, correlated(3000, 6))
    held_out = correlated(1000, 7)
    rounded = vf.merge_report(q, params, frozen, held_out)
    calibrated = vf.merge_report(q, params, frozen, held_out, merged=merged)
    assert rounded.output_kept < 0.4
    assert calibrated.output_kept == pytest.approx(1, abs=0.15)
    assert calibrated.output_error < 0.95 * rounded.output_error
    assert (merged.quant_type, merged.blocksize, merged.packed.dtype) == (q.quant_type, q.blocksize, q.packed.dtype)
    # An ordinary bitsandbytes weight.
    x = held_out[:5].to(q.dtype)
    assert_close(vf.to_bnb(merged).train()(x), vf.quantized_linear(merged, x))


def test_inputs_stand_for_their_gram():
    weight, x = make_weight(32), correlated(1000, 6)
    q = vf.quantize_4bit(weight)
    params, frozen = make_adapter(0.01, weight)
    # Fewer tokens are damped more.
    for inputs, damping in ((x, 0.01), (x.reshape(2, 500, IN), 0.01), (x[:999], 0.1)):
        merged = vf.merge_calibrated(q, params, frozen, inputs)
        assert same_bytes(merged, vf.merge_calibrated(q, params, frozen, gram=gram(inputs), damping=damping))
    unnamed, named = (vf.merge_calibrated(q, params, frozen, gram=gram(x), **d) for d in ({}, {"damping": 0.01}))
    assert same_bytes(unnamed, named)


def test_autocast_does_not_round_a_merge():
    weight, x = make_weight(32), correlated(100, 6)
    q = vf.quantize_4bit(weight)
    params, frozen = make_adapter(0.1, weight)
    calls = {
        "delta": lambda: vf.delta_weight(params, frozen, IN),
        "rounded": lambda: vf.merge_quantized(q, params, frozen),
        "dense": lambda: vf.merge_dense(q, params, frozen, torch.float32),
        "calibrated": lambda: vf.merge_calibrated(q, params, frozen, x),
        "report": lambda: torch.tensor(vf.merge_report(q, params, frozen, x)),
        "gram": lambda: gram(x),
    }
    for name, call in calls.items():
        right = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert same_bytes(call(), right), name


def test_stochastic_is_right_on_average():
    weight = make_weight()
    q = vf.quantize_4bit(weight)
    params, frozen = make_adapter(0.01, weight)
    generator = torch.Generator().manual_seed(0)
    draws = [vf.dequantize(merge_stochastic(q, params, frozen, generator=generator)) for _ in range(200)]
    delta = vf.delta_weight(params, frozen, IN)
    moved = torch.stack(draws).mean(0) - vf.dequantize(q)
    # Beyond the largest level of a block there is nothing to round to, so a little is lost there.
    assert ((moved * delta).sum() / delta.square().sum()).item() == pytest.approx(0.95, abs=0.1)


def test_calibration_says_what_it_needs():
    params, frozen = make_adapter(0.01, make_weight())
    x = correlated(100, 6)
    with pytest.raises(ValueError, match="4-bit"):
        vf.merge_calibrated(vf.quantize_8bit(make_weight()), params, frozen, x)
    with pytest.raises(ValueError, match="inputs must have shape"):
        vf.merge_calibrated(vf.quantize_4bit(make_weight()), params, frozen, x[:, 1:])
    with pytest.raises(ValueError, match="straddle"):
        vf.merge_calibrated(vf.quantize_4bit(make_weight(), blocksize=256), params, frozen, x)


# What is refused

bad = Refused()
MERGES = {
    "merge_quantized": vf.merge_quantized,
    "merge_dense": vf.merge_dense,
    "merge_report": vf.merge_report,
    "merge_calibrated": lambda *args: vf.merge_calibrated(*args, X),
    "merge_stochastic": lambda *args: merge_stochastic(*args, generator=torch.Generator()),
}

for name, f in MERGES.items():
    for what, params, frozen, message in (
        ("inf", LAYER | {"lambda_b": ones(32) / 0}, PAIR, r"lambda_b \(32,\) holds NaN or inf"),
        ("NaN in A", LAYER, PAIR | {"vera_A": ones(4, 64) * NAN}, r"vera_A \(4, 64\) holds NaN or inf"),
        ("no lambda_d", {"lambda_b": ones(32)}, PAIR, "keys 'lambda_b' and 'lambda_d' .*got .'lambda_b'."),
        ("a sum", LAYER | {"mixture": ones(())}, PAIR, "merge a single adapter"),
        ("None", LAYER | {"lambda_d": None}, PAIR, "lambda_d must be a tensor, got NoneType"),
        ("integers", {k: v.long() for k, v in LAYER.items()}, PAIR, "must be a floating-point tensor"),
        ("another layer", LAYER | {"lambda_b": ones(31)}, PAIR, r"lambda_b must have shape \(32,\), got \(31,\)"),
        ("a scalar", LAYER | {"lambda_d": ones(())}, PAIR, "lambda_d"),
        ("half the pair", LAYER, {"vera_A": PAIR["vera_A"]}, r"frozen lacks \['vera_B'\]"),
    ):
        bad(name, what, lambda _, f=f, p=params, fr=frozen: f(Q4, p, fr), message)

bad(
    "merge_quantized",
    "a dense weight",
    lambda _: vf.merge_quantized(ones(32, 64), LAYER, PAIR),
    "is dense: use merge_dense",
)
bad("merge_quantized", "overflow", lambda _: vf.merge_quantized(Q8, filled(LAYER, 1e4), PAIR), "overflows float16")
bad(
    "merge_dense",
    "to integers",
    lambda _: vf.merge_dense(Q4, LAYER, PAIR, torch.int8),
    "dtype must be a floating-point",
)
bad(
    "merge_dense",
    "overflow",
    lambda _: vf.merge_dense(Q4, filled(LAYER, 1e4), PAIR, torch.float16),
    "overflows torch.float16",
)
bad(
    "merge_dense",
    "a base of NaN",
    lambda _: vf.merge_dense(ones(32, 64) * NAN, LAYER, PAIR),
    "the base holds NaN or inf",
)
bad(
    "merge_calibrated",
    "a scalar input",
    lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, ones(())),
    r"must have .*64\), got \(\)",
)
bad(
    "merge_calibrated",
    "inputs of NaN",
    lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, X * NAN),
    r"inputs .* holds NaN or inf",
)
bad("merge_calibrated", "no token", lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, ones(0, 64)), "one weight per token")
bad(
    "merge_calibrated",
    "half a gram",
    lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, gram=ones(64, 64).triu()),
    "symmetric",
)
bad(
    "merge_calibrated",
    "a negative gram",
    lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, gram=-torch.eye(64)),
    "gram must not",
)
bad(
    "merge_calibrated",
    "damping=-1",
    lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, X, damping=-1),
    "damping must be positive",
)
bad(
    "merge_calibrated", "straddling", lambda _: vf.merge_calibrated(ROWS, LAYER, PAIR, ones(3, 32)), "straddle the rows"
)
bad("merge_stochastic", "straddling", lambda _: MERGES["merge_stochastic"](ROWS, LAYER, PAIR), "straddle the rows")

for name in ("merge_dense", "merge_quantized", "merge_report"):
    merge = getattr(vf, name)
    for what, args, message in (
        ("a module", (nn.Linear(64, 32), LAYER, PAIR), r"q must be a quantized weight .*got Linear.*from_bnb"),
        ("no params", (Q4, None, PAIR), "params must be a dict of tensors, got NoneType"),
        ("a list of projections", (Q4, LAYER, [*PAIR.values()]), "frozen must be a dict of tensors, got list"),
    ):
        bad(name, what, lambda _, merge=merge, args=args: merge(*args), message)
bad(
    "merge_dense",
    "an integer base",
    lambda _: vf.merge_dense(ones(32, 64).long(), LAYER, PAIR),
    r"q must be .*torch\.int64",
)
bad("merge_report", "a list", lambda _: vf.merge_report(Q4, LAYER, PAIR, [1.0]), r"inputs must have shape .* got list")
bad(
    "merge_report",
    "merged=3",
    lambda _: vf.merge_report(Q4, LAYER, PAIR, merged=3),
    "merged must be a weight .* got int",
)
bad("merge_calibrated", "a list", lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, [1.0]), "inputs must have .* got list")
bad(
    "merge_calibrated",
    "an indefinite gram",
    lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, gram=torch.diag(torch.linspace(-1, 9, 64))),
    "gram must have no negative eigenvalue",
)
bad(
    "merge_calibrated",
    "damping=text",
    lambda _: vf.merge_calibrated(Q4, LAYER, PAIR, X, damping="a"),
    "damping must be positive .*got 'a'",
)
bad("gram", "a list", lambda _: gram([1.0]), "inputs and weights must be tensors .* got list")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
