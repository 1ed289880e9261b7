"""The calibrated merge against exhaustive search, least squares, and what it promises."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from vera_func.merging.calibrate import (
    _nearest_plane,
    _next_kappa,
    _Problem,
    _Trial,
    calibrate_rows,
    gram,
    output_error,
    output_kept,
    stochastic_codes,
)


# The tables of bitsandbytes; fp4 is not sorted, and has two zeros.
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
FP4 = [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CODES = {"nf4": torch.tensor(NF4), "fp4": torch.tensor(FP4 + [-level for level in FP4])}


def make_case(out=7, blocks=3, blocksize=11, *, code="nf4", scale=0.02, rank=5, seed=0):
    """A random weight on the grid, an update of it, and the gram of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    in_ = blocks * blocksize

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = normal(499, rank) @ normal(rank, in_) + 0.1 * normal(499, in_)
    codes = torch.randint(16, (out, in_), generator=generator, dtype=torch.uint8)
    absmax = 0.5 + torch.rand(out, blocks, generator=generator)
    return codes, absmax, scale * normal(out, in_), {"code": CODES[code], "gram": gram(inputs)}


def grid_weight(codes, absmax, code):
    return code[codes.long()] * absmax.repeat_interleave(codes.shape[1] // absmax.shape[1], dim=1)


def damped(gram, damping=0.01):
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram))


def row_errors(codes, absmax, target, code, gram):
    residual = (grid_weight(codes, absmax, code) - target).double()
    return torch.einsum("oi,ij,oj->o", residual, gram.double(), residual)


def best_absmax(codes, target, code, gram):
    """The oracle: least squares for one row, block by block a column."""
    levels = code.double()[codes.long()]
    design = torch.block_diag(*levels.unflatten(0, (2, -1))).T  # (in, blocks)
    return torch.linalg.lstsq(design.T @ gram @ design, design.T @ gram @ target, driver="gelsd").solution


@pytest.mark.parametrize("seed", range(3))
def test_close_to_exhaustive_search(seed):
    code = torch.tensor([-1.0, -0.25, 0.5, 1.0])
    codes, absmax, delta, arrays = make_case(out=5, blocks=2, blocksize=2, rank=2, scale=0.3, seed=seed)
    codes, target_gram = codes % 4, damped(arrays["gram"])
    target = grid_weight(codes, absmax, code) + delta
    merged = calibrate_rows(codes, absmax, delta, code=code, gram=arrays["gram"], max_kappa=1.0)
    actual = row_errors(merged.codes, merged.absmax, target, code, target_gram)
    for row in range(5):
        errors = []
        for each in itertools.product(range(4), repeat=4):
            candidate = torch.tensor(each)
            scales = best_absmax(candidate, target[row].double(), code, target_gram.double())
            if (scales >= 0).all():
                new = candidate[None], scales[None].float(), target[row][None], code, target_gram
                errors.append(row_errors(*new).item())
        assert actual[row] >= min(errors) - 1e-6
        # Local search may stop short of the best, but it stays among the best of the 256 tables of codes.
        assert sum(error < actual[row] * 0.99 for error in errors) <= 8


@pytest.mark.parametrize("seed", range(3))
def test_no_step_of_one_code_is_left_that_gains_much(seed):
    codes, absmax, delta, arrays = make_case(out=5, blocks=2, blocksize=8, rank=9, scale=0.1, seed=seed)
    target, metric = grid_weight(codes, absmax, CODES["nf4"]) + delta, damped(arrays["gram"])
    merged = calibrate_rows(codes, absmax, delta, **arrays, max_kappa=1.0)
    actual = row_errors(merged.codes, merged.absmax, target, CODES["nf4"], metric)
    for row, j, step in itertools.product(range(5), range(16), (-1, 1)):
        candidate = merged.codes[row].long()
        candidate[j] = (candidate[j] + step).clamp(0, 15)
        scales = best_absmax(candidate, target[row].double(), CODES["nf4"], metric.double())
        if (scales >= 0).all():
            new = candidate[None], scales[None].float(), target[row][None], CODES["nf4"], metric
            assert row_errors(*new) >= actual[row] * 0.9


@settings(max_examples=20, deadline=None)
@given(
    out=st.integers(1, 7),
    blocks=st.integers(1, 3),
    blocksize=st.sampled_from([1, 2, 5, 13]),
    code=st.sampled_from(["nf4", "fp4"]),
    scale=st.sampled_from([1e-4, 0.02, 0.5]),
    seed=st.integers(0, 99),
)
def test_error_never_rises(out, blocks, blocksize, code, scale, seed):
    codes, absmax, delta, arrays = make_case(out, blocks, blocksize, code=code, scale=scale, seed=seed)
    target, metric = grid_weight(codes, absmax, arrays["code"]) + delta, damped(arrays["gram"])
    merged = calibrate_rows(codes, absmax, delta, **arrays, max_kappa=1.0)
    after = row_errors(merged.codes, merged.absmax, target, arrays["code"], metric)
    assert (after <= row_errors(codes, absmax, target, arrays["code"], metric) * (1 + 1e-4) + 1e-9).all()
    assert merged.absmax.shape == absmax.shape
    assert (merged.absmax >= 0).all()
    assert merged.codes.max() < 16


@pytest.mark.parametrize("code", CODES)
def test_absmax_is_the_least_squares_solution(code):
    codes, absmax, delta, arrays = make_case(code=code)
    target, metric = grid_weight(codes, absmax, arrays["code"]) + delta, damped(arrays["gram"]).double()
    merged = calibrate_rows(codes, absmax, delta, **arrays, max_kappa=1.0)
    levels = arrays["code"][merged.codes.long()].double()
    residual = target.double() - grid_weight(merged.codes, merged.absmax.double(), arrays["code"].double())
    slope = (levels * (residual @ metric)).unflatten(1, (3, 11)).sum(2)
    before = (levels * (delta.double() @ metric)).unflatten(1, (3, 11)).sum(2)
    assert slope.norm() < 1e-3 * before.norm()


@pytest.mark.parametrize("blocksize", [31, 79])
def test_never_worse_than_gptq(blocksize):
    codes, absmax, delta, arrays = make_case(out=31, blocks=2, blocksize=blocksize, rank=17, scale=0.1)
    code = arrays["code"]
    target, metric = grid_weight(codes, absmax, code) + delta, damped(arrays["gram"]).double()
    order = metric.diagonal().argsort(descending=True)
    factor = torch.linalg.cholesky(torch.linalg.inv(metric[order][:, order]), upper=True)
    left, rounded = target.double()[:, order], torch.empty(31, 2 * blocksize, dtype=torch.uint8)
    for i, column in enumerate(order):
        grid = code * absmax[:, column // blocksize, None]
        rounded[:, column] = (left[:, i, None] - grid).abs().argmin(1)
        wrong = left[:, i] - grid.gather(1, rounded[:, column, None].long())[:, 0]
        left[:, i:] -= wrong[:, None] * factor[i, i:] / factor[i, i]
    problem = _Problem(metric.float(), order, factor.float(), code, (code[1:] + code[:-1]) / 2, blocksize)
    assert torch.equal(_nearest_plane(problem, target, absmax).indices, rounded.long())
    merged = calibrate_rows(codes, absmax, delta, **arrays, max_kappa=1.0)
    after, gptq = (
        row_errors(*grid, target, code, metric) for grid in ((merged.codes, merged.absmax), (rounded, absmax))
    )
    assert (after <= gptq).all()
    assert after.sum() < 0.6 * gptq.sum()


def test_order_and_duplicates_of_levels_do_not_matter():
    codes, absmax, delta, arrays = make_case(code="fp4")
    levels = arrays["code"].unique()
    ranks = torch.searchsorted(levels, arrays["code"])[codes.long()].byte()
    merged = calibrate_rows(codes, absmax, delta, **arrays)
    ranked = calibrate_rows(ranks, absmax, delta, **arrays | {"code": levels})
    assert torch.equal(arrays["code"][merged.codes.long()], levels[ranked.codes.long()])
    assert torch.equal(merged.absmax, ranked.absmax)


@pytest.mark.parametrize("code", CODES)
def test_overshoot_keeps_the_effect(code):
    codes, absmax, delta, arrays = make_case(out=31, blocksize=32, code=code, scale=0.008, rank=17)
    least = calibrate_rows(codes, absmax, delta, **arrays, max_kappa=1.0)
    merged = calibrate_rows(codes, absmax, delta, **arrays)
    assert least.kappa == 1
    assert least.kept < 0.9
    assert 0.95 < merged.kept < 1.05
    assert 1 < merged.kappa <= 4
    assert merged.error < 1


def test_the_next_overshoot():
    def next_kappa(largest, *tried):  # pairs (kappa, kept)
        return _next_kappa([_Trial(*pair, error=0.0, point=None) for pair in tried], largest)

    assert next_kappa(4.0, (1.0, 0.5)) == pytest.approx(0.5**-0.8)
    assert next_kappa(4.0, (1.0, 0.5), (2.0, 0.8)) == pytest.approx(2 * 0.8**-0.8)
    assert next_kappa(1.5, (1.0, 0.5)) == 1.5
    assert next_kappa(99.0, (1.0, 0.0)) == pytest.approx(0.1**-0.8)
    assert next_kappa(4.0, (1.0, 1.3)) == 1
    # Of those below and above the nearest ones, whatever their overshoot.
    assert next_kappa(4.0, (1.0, 0.9), (1.2, 0.8), (3.0, 1.1), (2.0, 1.4)) == pytest.approx(2.0)
    assert next_kappa(4.0, (1.0, 0.8), (2.0, 1.0)) == 2


def test_what_is_kept_well_is_left_as_it_is():
    codes, absmax, delta, arrays = make_case(scale=0.03)
    least, merged = (calibrate_rows(codes, absmax, delta, **arrays, max_kappa=kappa) for kappa in (1.0, 4.0))
    assert 0.98 < least.kept < 0.995
    assert merged.kappa == 1
    assert torch.equal(merged.codes, least.codes)


def test_reports_what_it_returns():
    codes, absmax, delta, arrays = make_case()
    delta[3] = 0
    merged = calibrate_rows(codes, absmax, delta, **arrays)
    change = grid_weight(merged.codes, merged.absmax, CODES["nf4"]) - grid_weight(codes, absmax, CODES["nf4"])
    assert_close(merged.kept, output_kept(change, delta, arrays["gram"]), **CLOSE)
    assert_close(merged.error, output_error(change, delta, arrays["gram"]), **CLOSE)


def test_measures_equal_their_formulas():
    _, _, delta, _ = make_case()
    generator = torch.Generator().manual_seed(2)
    change, x = torch.randn(7, 33, generator=generator), torch.randn(33, 101, generator=generator)
    added, done = delta @ x, change @ x
    assert_close(output_kept(change, delta, gram(x.T)), ((done * added).sum() / added.square().sum()).item(), **CLOSE)
    assert_close(output_error(change, delta, gram(x.T)), ((done - added).norm() / added.norm()).item(), **CLOSE)
    assert output_error(delta, delta, gram(x.T)) == 0
    assert output_kept(delta, delta, gram(x.T)) == 1


def test_gram_is_the_weighted_mean_of_outer_products():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 3, generator=generator, dtype=torch.float64)
    assert_close(gram(x), (torch.einsum("abi,abj->ij", x, x) / 35).float())
    w = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    assert_close(gram(x, w), (torch.einsum("ab,abi,abj->ij", w, x, x) / w.sum()).float())
    # Weighing 0 leaves out, and weights are relative.
    mask = w > 0.5
    assert_close(gram(x, 7 * mask), gram(x[mask]))


def test_beats_rounding_where_rounding_loses_everything():
    codes, absmax, delta, arrays = make_case(out=13, blocksize=32, scale=0.005, rank=7)
    weight = grid_weight(codes, absmax, CODES["nf4"])
    steps = (weight + delta)[..., None] - CODES["nf4"] * absmax.repeat_interleave(32, 1)[..., None]
    rounded = grid_weight(steps.abs().argmin(2).byte(), absmax, CODES["nf4"])
    assert output_kept(rounded - weight, delta, arrays["gram"]) < 0.2
    assert calibrate_rows(codes, absmax, delta, **arrays, max_kappa=1.0).error < 0.6


def test_zero_delta_is_the_identity():
    for code in CODES:
        codes, absmax, delta, arrays = make_case(code=code)
        merged = calibrate_rows(codes, absmax, 0 * delta, **arrays)
        assert torch.equal(merged.codes, codes)
        assert torch.equal(merged.absmax, absmax)
        assert merged[2:] == (1, 1, 0)
        delta[::2] = 0
        merged = calibrate_rows(codes, absmax, delta, **arrays)
        assert torch.equal(merged.codes[::2], codes[::2])
        assert torch.equal(merged.absmax[::2], absmax[::2])


def test_rows_are_independent():
    codes, absmax, delta, arrays = make_case()
    merged = calibrate_rows(codes, absmax, delta, **arrays, max_kappa=1.0)
    for i in range(7):
        row = calibrate_rows(codes[i : i + 1], absmax[i : i + 1], delta[i : i + 1], **arrays, max_kappa=1.0)
        assert_close(
            grid_weight(row.codes, row.absmax, CODES["nf4"]),
            grid_weight(merged.codes[i : i + 1], merged.absmax[i : i + 1], CODES["nf4"]),
            rtol=1e-3,
            atol=1e-3,
        )


@pytest.mark.parametrize("out", [1, 7])
def test_inputs_are_not_modified_and_runs_agree(out):
    codes, absmax, delta, arrays = make_case(out)
    inputs = [codes, absmax, delta, *arrays.values()]
    before = [tensor.clone() for tensor in inputs]
    first, again = (calibrate_rows(codes, absmax, delta, **arrays) for _ in range(2))
    stochastic_codes(delta, arrays["code"], absmax, torch.Generator().manual_seed(0))
    assert all(map(torch.equal, inputs, before))
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.absmax, again.absmax)


def test_inputs_of_rank_one_and_dead_blocks():
    codes, absmax, delta, arrays = make_case()
    absmax[:, 1] = 0
    arrays["gram"] = torch.ones(33, 33)
    merged = calibrate_rows(codes, absmax, delta, **arrays, damping=1e-6)
    assert merged.error < 0.1
    assert merged.absmax.isfinite().all()


def test_an_error_that_rounds_below_zero_is_zero():
    gram = torch.tensor([[1.0, 1.0 + 2**-20], [1.0 + 2**-20, 1.0]])  # not quite semidefinite, as sums of products are
    delta, change = torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 0.0]])
    assert (change - delta) @ gram @ (change - delta).T < 0
    assert output_error(change, delta, gram) == 0.0


@settings(max_examples=10, deadline=None)
@given(code=st.sampled_from(list(CODES)), seed=st.integers(0, 99))
def test_stochastic_codes_are_unbiased(code, seed):
    generator = torch.Generator().manual_seed(seed)
    absmax = 0.5 + torch.rand(3, 2, generator=generator)
    target = (2 * torch.rand(3, 14, generator=generator) - 1) * absmax.repeat_interleave(7, 1)
    draws = target.repeat(999, 1), absmax.repeat(999, 1)
    codes = stochastic_codes(draws[0], CODES[code], draws[1], generator)
    mean = grid_weight(codes, draws[1], CODES[code]).unflatten(0, (999, 3)).mean(0)
    # A step is at most a third of 1.5, so a mean of 999 has a standard error of at most 0.008.
    assert_close(mean, target, rtol=0, atol=0.05)


@pytest.mark.parametrize("code", CODES)
def test_stochastic_codes_leave_the_grid_alone(code):
    codes, absmax, _, _ = make_case(code=code)
    absmax[0, 0] = 0
    weight = grid_weight(codes, absmax, CODES[code])
    again = stochastic_codes(weight, CODES[code], absmax, torch.Generator().manual_seed(0))
    assert again.dtype == torch.uint8
    assert_close(grid_weight(again, absmax, CODES[code]), weight)
    far = stochastic_codes(weight + 9, CODES[code], absmax, torch.Generator().manual_seed(0))
    assert_close(grid_weight(far, absmax, CODES[code]), absmax.repeat_interleave(11, 1))


def test_what_does_not_fit_is_refused():
    codes, absmax, delta, arrays = make_case()
    bad = {
        "straddle": {"absmax": absmax.repeat(1, 2)[:, :4]},
        "must have shapes": {"absmax": absmax[:3]},
        r"absmax \(7,\) must have shapes": {"absmax": absmax[:, 0]},
        "delta must have shape": {"delta": delta[:3]},
        "gram must have shape": {"gram": torch.eye(5)},
        "delta holds NaN or inf": {"delta": delta / 0},
        "absmax holds NaN or inf": {"absmax": absmax * torch.nan},
        "levels": {"code": torch.ones(3)},
        "damping must be positive": {"damping": 0.0},
        "max_kappa at least 1": {"max_kappa": 0.5},
        "gram must not be zero": {"gram": 0 * arrays["gram"]},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            calibrate_rows(**{"codes": codes, "absmax": absmax, "delta": delta, **arrays} | change)
    with pytest.raises(ValueError, match="straddle"):
        stochastic_codes(delta, CODES["nf4"], torch.ones(7, 2), torch.Generator())


@pytest.mark.parametrize(
    ("inputs", "weights"),
    [
        (torch.ones(0, 3), None),
        (torch.full((2, 3), torch.inf), None),
        (torch.ones(2, 3), torch.ones(3)),
        (torch.ones(2, 3), torch.zeros(2)),
        (torch.ones(2, 3), torch.tensor([1.0, -0.5])),
        (torch.ones(2, 3), torch.tensor([1.0, torch.nan])),
    ],
)
def test_gram_refuses_what_has_no_mean(inputs, weights):
    with pytest.raises(ValueError, match="token"):
        gram(inputs, weights)
