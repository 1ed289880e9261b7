"""DVoRA of one layer: every transform on every base against the dense formula, rows, sums, and the row norms."""

import pytest
import torch
from torch import nn, ones
from torch.func import grad, hessian, vmap
from torch.testing import assert_close

import vera_func as vf
from vera_func.core import dora
from vera_func.core.dora import fold_layer, norm_statistics

from helpers import (
    BASES,
    TOLERANCE,
    TRANSFORMS,
    LargestTensor,
    dora_forward,
    dora_weight,
    make_base,
    make_layer,
    row,
    squared,
)
from refused import LAYER, PAIR, Refused, X


EXACT = TOLERANCE[torch.float64]


def make_dora(base, *n, statistics=True, **options):
    """Params, frozen with or without norm statistics, a base with a bias, the dense weight, that bias, an input."""
    params, frozen, weight, x = make_layer(*n, dora=True, **options)
    bias = weight[:, 0].clone()
    base_fn, dense = make_base(base, weight, bias=bias)
    return params, frozen | (norm_statistics(dense, frozen) if statistics else {}), base_fn, dense, bias, x


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("base", "differentiate"), [*[(base, False) for base in BASES], ("dense", True), ("nf4", True)], ids=str
)
def test_equals_dense(base, transform, differentiate):
    params, frozen, base_fn, dense, bias, x = make_dora(base)
    apply, options = TRANSFORMS[transform], {"bias": bias, "differentiate_norm": differentiate}
    actual = apply(lambda p: vf.vera_forward(p, frozen, x, base_fn, **options))(params)
    expected = apply(lambda p: dora_forward(p, frozen, x, dense, bias, differentiate))(params)
    assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("transform", ["forward", "grad", "hessian"])
@pytest.mark.parametrize("base", ["dense", "nested", "int8"])
def test_equals_dense_in_x(base, transform):
    params, frozen, base_fn, dense, bias, x = make_dora(base)
    apply = TRANSFORMS[transform]
    actual = apply(lambda x: vf.vera_forward(params, frozen, x, base_fn, bias=bias))(x[0])
    expected = apply(lambda x: dora_forward(params, frozen, x, dense, bias))(x[0])
    assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_equals_dense_in_the_projections_and_the_bias(transform):
    params, frozen, _, weight, bias, x = make_dora("dense", statistics=False)
    inputs = {name: frozen[name] for name in ("vera_A", "vera_B")} | {"bias": bias}
    options = {"differentiate_norm": True}

    def forward(p):
        return vf.vera_forward(params, p, x, lambda x: x @ weight.T + p["bias"], bias=p["bias"], **options)

    actual = TRANSFORMS[transform](forward)(inputs)
    expected = TRANSFORMS[transform](lambda p: dora_forward(params, p, x, weight, p["bias"], True))(inputs)
    assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("base", BASES)
def test_without_statistics_the_weight_is_read_from_the_base(base):
    params, frozen, base_fn, dense, bias, x = make_dora(base, statistics=False)
    actual = grad(squared(lambda p: vf.vera_forward(p, frozen, x, base_fn, bias=bias)))(params)
    assert_close(actual, grad(squared(lambda p: dora_forward(p, frozen, x, dense, bias)))(params), **EXACT)


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_float32(base):
    params, frozen, base_fn, dense, bias, x = make_dora(base, dtype=torch.float32)
    # Magnitudes as adapters have them, beside norms of about 6.
    params["magnitude"] = 6 + params["magnitude"]
    f = squared(lambda p: vf.vera_forward(p, frozen, x, base_fn, bias=bias))
    wide = [{k: v.double() for k, v in tree.items()} for tree in (params, frozen)]
    expected = hessian(squared(lambda p: dora_forward(p, wide[1], x.double(), dense.double(), bias.double())))(wide[0])
    for name, rows in hessian(f)(params).items():
        for other, actual in rows.items():
            bound = 1e-5 * expected[name][other].abs().max().item() + 1e-5
            assert_close(actual.double(), expected[name][other], rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compute_dtypes(dtype):
    params, frozen, weight, x = make_layer(dora=True, dtype=torch.float32)
    q = vf.quantize_4bit(weight, compute_dtype=dtype)
    frozen |= norm_statistics(vf.dequantize(q), frozen)
    actual = vf.vera_forward(params, frozen, x, lambda x: vf.quantized_linear(q, x))
    expected = dora_forward(params, frozen, x, vf.dequantize(q))
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps


def test_sixteen_bits():
    params, frozen, weight, x = make_layer(dora=True, dtype=torch.float32)
    base = weight.bfloat16()
    frozen |= norm_statistics(base, frozen)
    actual = vf.vera_forward(params, frozen, x.bfloat16(), lambda x: nn.functional.linear(x, base))
    expected = dora_forward(params, frozen, x.bfloat16().float(), base.float())
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() / expected.norm() < 1e-2


def test_autocast_does_not_round_the_norms():
    params, frozen, weight, _ = make_layer(dora=True, dtype=torch.float32)
    exact = fold_layer(params, frozen | norm_statistics(weight, frozen))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = fold_layer(params, frozen | norm_statistics(weight, frozen))
    assert_close(rounded, exact, rtol=0, atol=0)


@pytest.mark.parametrize("transform", ["forward", "grad", "jvp", "hessian"])
@pytest.mark.parametrize("base", ["dense", "fp4", "int8"])
def test_vmap_over_params(base, transform):
    params, frozen, base_fn, dense, bias, x = make_dora(base, 4)
    apply = TRANSFORMS[transform]
    batched = vmap(apply(lambda p: vf.vera_forward(p, frozen, x, base_fn, bias=bias)))(params)
    for i in range(4):
        expected = apply(lambda p: dora_forward(p, frozen, x, dense, bias))(row(params, i))
        assert_close(row(batched, i), expected, **EXACT)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_per_example_gradients(base):
    params, frozen, base_fn, dense, bias, x = make_dora(base)
    loss = squared(lambda p, x: vf.vera_forward(p, frozen, x, base_fn, bias=bias))
    actual = vmap(grad(loss), (None, 0))(params, x)
    for i, example in enumerate(x):
        expected = grad(squared(lambda p, x: dora_forward(p, frozen, x, dense, bias)))(params, example)
        assert_close(row(actual, i), expected, **EXACT)


@pytest.mark.parametrize("differentiate", [False, True], ids=["constant norm", "norm"])
def test_backward(differentiate):
    params, frozen, base_fn, dense, bias, x = make_dora("nf4")
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    options = {"bias": bias, "differentiate_norm": differentiate}
    vf.vera_forward(leaves, frozen, x, base_fn, **options).square().sum().backward()
    expected = grad(squared(lambda p: dora_forward(p, frozen, x, dense, bias, differentiate)))(params)
    assert_close({k: v.grad for k, v in leaves.items()}, expected, **EXACT)


@pytest.mark.parametrize("base", ["dense", "nested", "int8"])
def test_compiles(base):
    params, frozen, base_fn, _, bias, x = make_dora(base, 4, out=32, in_=32, dtype=torch.float32)

    def forward(p):
        y = vf.vera_forward(p, frozen, x, base_fn, bias=bias).tanh()
        return vf.vera_forward(p, frozen, y, base_fn, bias=bias)

    f = vmap(grad(squared(forward)))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(params)
    assert_close(compiled, f(params), rtol=1e-3, atol=1e-3)


class TestRows:
    # Of lambda_b, lambda_d and the magnitude.
    @pytest.mark.parametrize(
        "axes",
        [((4,),) * 3, ((4, 2),) * 3, ((4,), (), ()), ((), (), (4,)), ((4,), (4, 2), ()), ((4, 2), (), (4,))],
        ids=str,
    )
    @pytest.mark.parametrize("batch", [(4, 2), (4, 2, 3)], ids=str)
    def test_row_i_goes_through_adapter_i(self, axes, batch):
        many, frozen, base_fn, dense, bias, x = make_dora("dense", 4, 2)
        x = x[0] * torch.linspace(-1, 1, 8 if len(batch) < 3 else 24).double().reshape(*batch, 1)
        pick = {(4, 2): lambda v: v, (4,): lambda v: v[:, 0], (): lambda v: v[0, 0]}
        params = {key: pick[own](leaf) for (key, leaf), own in zip(many.items(), axes, strict=True)}
        actual = vf.vera_forward(params, frozen, x, base_fn, bias=bias)
        for i in range(4):
            for j in range(2):
                one = {k: v[(i, j)[: v.dim() - 1]] for k, v in params.items()}
                assert_close(actual[i, j], dora_forward(one, frozen, x[i, j], dense, bias), **EXACT)

    def test_rows_of_the_base(self):
        params, frozen, base_fn, _, bias, x = make_dora("nf4", 3)
        rows = vf.select_adapters(params, [2, -1, 0])
        one = vf.vera_forward(row(params, 2), frozen, x[0], base_fn, bias=bias)
        for given in (rows, fold_layer(rows, frozen), vf.select_adapters(fold_layer(params, frozen), [2, -1, 0])):
            actual = vf.vera_forward(given, frozen, x, base_fn, bias=bias)
            assert_close(actual[0], one, **EXACT)
            assert torch.equal(actual[1], base_fn(x)[1])

    def test_in_chunks(self, monkeypatch):
        params, frozen, base_fn, dense, bias, x = make_dora("dense", 3)
        whole = vf.vera_forward(params, frozen, x, base_fn, bias=bias)
        monkeypatch.setattr(dora, "_CHUNK", 3 * 5 * 2)
        with LargestTensor() as largest:
            norms = fold_layer(params, frozen)
        assert largest.numel == dense.shape[0] * 5
        assert_close(vf.vera_forward(norms, frozen, x, base_fn, bias=bias), whole, **EXACT)

    def test_rows_of_one_adapter_have_one_norm(self):
        params, frozen, base_fn, _, bias, x = make_dora("dense", out=40, in_=40, r=30)
        x = x.repeat(30, 1)

        def losses(rows):
            return vf.vera_forward(rows, frozen, x, base_fn, bias=bias).square().sum()

        copies = {key: value.repeat(90, 1) for key, value in params.items()}
        with LargestTensor() as largest:
            actual = grad(losses)({key: value.expand(90, -1) for key, value in params.items()})
        assert largest.numel <= 90 * 40  # not 90 (40, 30)
        assert_close(actual, grad(losses)(copies), **EXACT)


class TestFolded:
    @pytest.mark.parametrize("base", BASES)
    def test_gives_the_same(self, base):
        params, frozen, base_fn, _, bias, x = make_dora(base)
        folded = fold_layer(params, frozen)
        assert folded.keys() == {"lambda_b", "lambda_d", "output_scale"}
        pair = {name: frozen[name] for name in ("vera_A", "vera_B")}
        expected = vf.vera_forward(params, frozen, x, base_fn, bias=bias)
        assert_close(vf.vera_forward(folded, pair, x, base_fn, bias=bias), expected, **EXACT)

    def test_a_sum_adds_the_changes_of_the_output(self):
        params, frozen, base_fn, _, bias, x = make_dora("nf4", 3)
        ids, weights = [[0, 2], [1, 1], [-1, 0]], torch.tensor([[0.5, -1], [2, 0.25], [3, 1]]).double()
        folded = fold_layer(params, frozen)
        actual = vf.vera_forward(vf.select_adapters(folded, ids, weights), frozen, x, base_fn, bias=bias)
        for i, terms in enumerate(ids):
            base = base_fn(x[i])
            expected = base
            for adapter, weight in zip(terms, weights[i], strict=True):
                if adapter >= 0:
                    one = vf.vera_forward(row(params, adapter), frozen, x[i], base_fn, bias=bias)
                    expected = expected + weight * (one - base)
            assert_close(actual[i], expected, **EXACT)

    def test_no_norm_is_computed_again(self):
        params, frozen, _, _, bias, x = make_dora("dense", out=40, in_=40, r=30)
        folded = fold_layer(params, frozen)
        with LargestTensor() as largest:
            vf.vera_forward(folded, frozen, x, lambda x: x, bias=bias)
        assert largest.numel <= 42 * 30  # a projection


class TestWeights:
    def test_delta_weight(self):
        params, frozen, weight, _ = make_layer(3, dora=True)
        plain = {key: params[key] for key in ("lambda_b", "lambda_d")}
        expected = dora_weight(params, weight, vf.delta_weight(plain, frozen, 37)) - weight
        assert_close(vf.delta_weight(params, frozen, 37, weight), expected, **EXACT)
        folded = fold_layer(params, frozen | norm_statistics(weight, frozen))
        assert_close(vf.delta_weight(folded, frozen, 37, weight), expected, **EXACT)
        rows = vf.select_adapters(params, [1, -1])
        assert_close(vf.delta_weight(rows, frozen, 37, weight)[0], expected[1], **EXACT)
        assert not vf.delta_weight(rows, frozen, 37, weight)[1].any()

    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_fresh_adapter_is_the_base(self, base, dtype):
        _, frozen, base_fn, dense, bias, x = make_dora(base, statistics=False, dtype=dtype)
        params = vf.init_params(5, 13, dtype=dtype, weight=dense)
        assert_close(params["magnitude"], dense.norm(dim=1))
        frozen |= norm_statistics(dense, frozen)
        assert torch.equal(vf.vera_forward(params, frozen, x, base_fn, bias=bias), base_fn(x))

    def test_the_magnitude_is_float32_or_wider(self):
        params = vf.init_params(5, 13, dtype=torch.bfloat16, weight=torch.ones(13, 7, dtype=torch.bfloat16))
        assert params["magnitude"].dtype == torch.float32
        assert params["lambda_d"].dtype == torch.bfloat16

    def test_a_row_of_zeros_has_no_nan(self):
        params, frozen, weight, x = make_layer(dora=True)
        weight[3] = 0
        fresh = vf.init_params(5, 13, dtype=torch.float64, weight=weight)
        frozen |= norm_statistics(weight, frozen)

        def forward(p):
            return vf.vera_forward(p, frozen, x, lambda x: x @ weight.T, differentiate_norm=True)

        assert torch.equal(forward(fresh), x @ weight.T)
        assert all(value.isfinite().all() for value in grad(squared(forward))(fresh).values())
        assert_close(forward(params), dora_forward(params, frozen, x, weight), **EXACT)


bad = Refused()
DORA = LAYER | {"magnitude": ones(32)}
COMPLETE = PAIR | norm_statistics(ones(32, 64), PAIR)
ROWS = {key: value.expand(3, -1) for key, value in LAYER.items()}


def forward(params, frozen=COMPLETE):
    return lambda _: vf.vera_forward(params, frozen, X, lambda x: x[..., :32])


def weighted(weight):
    return lambda _: vf.init_params(4, 32, weight=weight)


for what, call, message in (
    ("a magnitude and an output scale", forward(DORA | {"output_scale": ones(32)}), "keys 'lambda_b' and 'lambda_d'"),
    ("a magnitude of another layer", forward(LAYER | {"magnitude": ones(31)}), r"magnitude \(31,\) must have shape"),
    ("an output scale of another layer", forward(LAYER | {"output_scale": ones(1)}), "the layer has 32 outputs"),
    ("integers as a magnitude", forward(LAYER | {"magnitude": ones(32).int()}), "magnitude must be a floating"),
    ("statistics of another layer", forward(DORA, PAIR | norm_statistics(ones(31, 64), PAIR)), "square_norm': .31,"),
    ("a part of the statistics", forward(DORA, PAIR | {"C": ones(32, 4)}), r"lacks \['G', 'square_norm'\]; pass"),
    ("magnitudes of other rows", forward(ROWS | {"magnitude": ones(2, 32)}), "the leading axes of .* do not match"),
    ("a sum with magnitudes", forward(ROWS | {"magnitude": ones(3, 32), "mixture": ones(3)}), "fold them first"),
):
    bad("vera_forward", what, call, message)
bad("delta_weight", "no weight", lambda _: vf.delta_weight(DORA, PAIR, 64), r"a weight of shape \(32, 64\), got None")
bad("delta_weight", "another weight", lambda _: vf.delta_weight(DORA, PAIR, 64, ones(32, 63)), r"got \(32, 63\)")
bad("init_params", "another weight", weighted(ones(31, 64)), r"\(32, in\), got \(31, 64\)")
bad("init_params", "a quantized weight", weighted(vf.quantize_8bit(ones(32, 64))), "got Quantized8bit; pass dequantize")
bad("norm_statistics", "a number", lambda _: norm_statistics(1.0, PAIR), "got float; pass dequantize")
bad("norm_statistics", "a wider layer", lambda _: norm_statistics(ones(32, 99), PAIR), r"of shape \(r, >= 99\)")
bad("norm_statistics", "integers", lambda _: norm_statistics(ones(32, 64), {"vera_A": ones(4, 64).int()}), "int32")
bad("norm_statistics", "no projections", lambda _: norm_statistics(ones(32, 64), {}), "got NoneType")
bad("fold_layer", "VeRA", lambda _: fold_layer(LAYER, COMPLETE), "must have the keys .*'magnitude'")


@pytest.mark.parametrize("case", bad.rows)
def test_refuses(case, tmp_path):
    bad.check(case, tmp_path)
