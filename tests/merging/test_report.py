"""What a merge retains of an update, in the weights and in the outputs of a layer."""

import pytest
import torch
from torch import ones

import vera_func as vf

from refused import LAYER, NAN, PAIR, Q4, Refused, X
from weights import IN, make_adapter, make_weight


@pytest.mark.parametrize("size", [0.003, 0.01, 0.03, 0.1, 0.3])
def test_report_measures_what_is_kept(size):
    weight = make_weight(512, 512)
    x = torch.randn(300, 512, generator=torch.Generator().manual_seed(2))
    params, frozen = make_adapter(size, weight, r=64)
    delta = vf.delta_weight(params, frozen, 512).double()
    for q in (vf.quantize_4bit(weight), vf.quantize_8bit(weight)):
        moved = (vf.dequantize(vf.merge_quantized(q, params, frozen)) - vf.dequantize(q)).double()
        report = vf.merge_report(q, params, frozen, x)
        assert report.kept == pytest.approx(((moved * delta).sum() / delta.square().sum()).item(), abs=1e-3)
        assert report.error == pytest.approx(((moved - delta).norm() / delta.norm()).item(), rel=1e-3)
        assert report.size == pytest.approx(size, rel=0.02)
        y, wanted = x.double() @ moved.T, x.double() @ delta.T
        assert report.output_error == pytest.approx(((y - wanted).norm() / wanted.norm()).item(), rel=1e-3)
        assert report.output_kept == pytest.approx(((y * wanted).sum() / wanted.square().sum()).item(), abs=1e-3)


@pytest.mark.parametrize(
    "x", [torch.zeros(3, IN), torch.ones(0, IN), torch.full((3, IN), 1e38)], ids=["0", "none", "far"]
)
def test_inputs_without_an_effect_that_could_be_kept_are_refused(x):
    params, frozen = make_adapter(0.01, make_weight())
    with pytest.raises(ValueError, match="effect on the inputs is zero or not finite"):
        vf.merge_report(vf.quantize_4bit(make_weight()), params, frozen, x)


# What was measured once on normal weights of this size: a property of the two grids, not of a machine.
KEPT = {0.003: (0.02, 0.22), 0.01: (0.02, 0.90), 0.03: (0.24, 0.99), 0.1: (0.88, 1.0), 0.3: (0.99, 1.0)}


@pytest.mark.parametrize("size", KEPT)
def test_small_updates_vanish(size):
    kept = []
    for seed in range(3):
        weight = 0.02 * torch.randn(1024, 1024, generator=torch.Generator().manual_seed(seed))
        params, frozen = make_adapter(size, weight, r=64, lambda_d=0.1, seed=seed)
        formats = vf.quantize_4bit(weight), vf.quantize_8bit(weight)
        kept.append([vf.merge_report(q, params, frozen).kept for q in formats])
    # The mean of a few draws, since the tail of lambda_b decides over what is above half a step.
    assert torch.tensor(kept).mean(0).tolist() == pytest.approx(KEPT[size], abs=0.03)


def test_inputs_of_any_number_of_axes_are_tokens():
    weight, x = make_weight(), torch.randn(12, IN, generator=torch.Generator().manual_seed(2))
    params, frozen = make_adapter(0.1, weight)
    q = vf.quantize_4bit(weight)
    assert vf.merge_report(q, params, frozen, x.reshape(2, 6, IN)) == vf.merge_report(q, params, frozen, x)
    assert vf.merge_report(q, params, frozen, x[0]) == vf.merge_report(q, params, frozen, x[:1])


# What is refused

bad = Refused()
bad(
    "merge_report",
    "a zero update",
    lambda _: vf.merge_report(Q4, vf.init_params(4, 32), PAIR),
    "retained fraction is undefined",
)

for what, inputs in (("no inputs", ones(0, 64)), ("inputs of NaN", X * NAN), ("inputs of 0", X * 0)):
    bad(
        "merge_report",
        what,
        lambda _, x=inputs: vf.merge_report(Q4, LAYER, PAIR, x),
        "effect on the inputs is zero or not finite",
    )

bad(
    "merge_report",
    "one row for all",
    lambda _: vf.merge_report(Q4, LAYER, PAIR, merged=ones(64)),
    r"merged has shape \(64,\), but",
)
bad(
    "merge_report",
    "transposed",
    lambda _: vf.merge_report(Q4, LAYER, PAIR, merged=ones(64, 32)),
    r"merged has shape \(64, 32\)",
)
for what, inputs in (("inputs of another width", X[:, 1:]), ("a scalar input", ones(()))):
    bad(
        "merge_report",
        what,
        lambda _, x=inputs: vf.merge_report(Q4, LAYER, PAIR, x),
        r"inputs must have shape \(\*tokens, 64\), got",
    )


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
