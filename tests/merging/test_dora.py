"""DVoRA merged into one layer and into models: the rescaled weight in 16, 8 and 4 bits, and what is retained."""

import pytest
import torch
from torch import ones
from torch.testing import assert_close

import vera_func as vf
from vera_func.core.dora import fold_layer, norm_statistics
from vera_func.merging.layer import merge_stochastic

from helpers import dora_weight, normal, quantized, randomized
from refused import LAYER, PAIR, Q4, Refused


QUANTIZERS = {
    "nf4": vf.quantize_4bit,
    "nested": lambda w: vf.quantize_4bit(w, double_quant=True),
    "fp4": lambda w: vf.quantize_4bit(w, "fp4"),
    "int8": vf.quantize_8bit,
}


def layer(name):
    """A quantized weight, an adapter that changes magnitudes and directions by some percent, and the right result."""
    q = QUANTIZERS[name](0.02 * normal(96, 128))
    weight = vf.dequantize(q, torch.float32)
    frozen = vf.init_projections(8, 128, 96)
    params = {"lambda_b": 0.1 * normal(96, seed=1), "lambda_d": 0.05 * normal(8, seed=2)}
    delta = vf.delta_weight(params, frozen, 128)
    params["magnitude"] = weight.norm(dim=1) * (1 - 0.1 * normal(96, seed=3).abs())
    return q, weight, params, frozen, dora_weight(params, weight, delta)


@pytest.mark.parametrize("folded", [False, True], ids=["magnitude", "folded"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_merged_weight_is_the_rescaled_one(name, folded):
    q, weight, params, frozen, right = layer(name)
    if folded:
        params = fold_layer(params, frozen | norm_statistics(weight, frozen))
    assert_close(vf.merge_dense(q, params, frozen, torch.float32), right, rtol=1e-5, atol=1e-7)
    assert_close(vf.merge_dense(q, params, frozen), right.bfloat16(), rtol=1e-2, atol=1e-5)
    assert_close(vf.merge_dense(weight, params, frozen, torch.float32), right, rtol=1e-5, atol=1e-7)
    merged = vf.dequantize(vf.merge_quantized(q, params, frozen), torch.float32)
    rounded = vf.dequantize(QUANTIZERS[name](right), torch.float32)
    assert (merged - rounded).norm() < 1e-3 * right.norm()  # a weight at the edge of two levels may take the other
    report = vf.merge_report(q, params, frozen)
    change, wanted = merged - weight, right - weight
    assert report.kept == pytest.approx(((change * wanted).sum() / wanted.square().sum()).item(), rel=1e-4)
    assert report.size == pytest.approx((wanted.norm() / weight.norm()).item(), rel=1e-4)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_fresh_adapter_changes_nothing(name):
    q = layer(name)[0]
    params = vf.init_params(8, 96, weight=vf.dequantize(q, torch.float32))
    assert vf.merge_quantized(q, params, vf.init_projections(8, 128, 96)) is q


def test_calibrated_and_stochastic():
    q, weight, params, frozen, right = layer("nf4")
    x = normal(2000, 9) @ normal(9, 128, seed=1)
    rounded, calibrated = (
        vf.merge_report(q, params, frozen, x, merged=merged)
        for merged in (vf.merge_quantized(q, params, frozen), vf.merge_calibrated(q, params, frozen, x))
    )
    assert calibrated.output_error < rounded.output_error / 2
    generator = torch.Generator().manual_seed(0)
    mean = sum(
        vf.dequantize(merge_stochastic(q, params, frozen, generator=generator), torch.float32) for _ in range(64)
    )
    # The levels of a block end at its largest weight, beyond which nothing is reached.
    assert (mean / 64 - right).norm() < (weight - right).norm() / 3


@pytest.mark.parametrize(("base", "to"), [("dense", None), ("nf4", torch.float32), ("int8", None), ("nf4", "int8")])
def test_reports_of_a_model(base, to):
    torch.manual_seed(0)
    model = quantized(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 64)), base)
    adapted = vf.adapt(model, vf.VeraConfig(r=8, target_modules=["0", "1"], use_dora=True))
    assert vf.model_merge_report(adapted, to) == {}
    params = adapted.params | {"1.magnitude": 1.2 * adapted.params["1.magnitude"]}  # lambda_b is still 0
    reports = vf.model_merge_report(adapted._replace(params=params), to)
    assert reports.keys() == {"1"}
    assert reports["1"].size == pytest.approx(0.2, rel=1e-3)
    params = randomized(params)
    merged = vf.merge(model, params, adapted.frozen, torch.float32)
    x = normal(5, 64)
    assert_close(merged(x), adapted.apply(params, adapted.frozen, x), rtol=1e-4, atol=1e-5)


bad = Refused()
WIDE, BOTH = {"magnitude": ones(31)}, {"magnitude": ones(32), "output_scale": ones(32)}
bad(
    "merge_quantized",
    "another magnitude",
    lambda _: vf.merge_quantized(Q4, LAYER | WIDE, PAIR),
    r"magnitude must have shape \(32,\), got \(31,\)",
)
bad(
    "merge_quantized", "two scales", lambda _: vf.merge_quantized(Q4, LAYER | BOTH, PAIR), "'magnitude', 'output_scale'"
)


@pytest.mark.parametrize("case", bad.rows)
def test_refuses(case, tmp_path):
    bad.check(case, tmp_path)
