"""Clipping bounds what an example can change, noise has the size that the accountant assumes, batches are Poisson's."""

import textwrap

import pytest
import torch
from torch import ones
from torch.testing import assert_close

import vera_func as vf
from vera_func.train import privacy
from vera_func.train.optim import adamw_init, adamw_update, global_norm
from vera_func.train.per_example import per_example_norms
from vera_func.train.privacy import poisson_indices

from helpers import normal, randomized, small
from refused import INF, NAN, Refused


def gradients(n=6, dtype=torch.float32):
    """The first three are large; the last is zero."""
    size = torch.tensor([30.0, 5.0, 3.0, 0.1, 0.01, 0.0])[:n]
    return {
        "a": (size[:, None, None] * normal(n, 2, 5, seed=1)).to(dtype),
        "b": (size[:, None] * normal(n, 3, seed=2)).to(dtype),
    }


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(grads):
    return torch.cat([leaf.double().flatten(1) for leaf in grads.values()], 1)


def test_clipping():
    grads = gradients()
    clipped = vf.clip_per_example(grads, 2.0)
    whole = flat(grads)
    expected = whole / (whole.norm(dim=1, keepdim=True) / 2.0).clamp(min=1)
    assert_close(flat(clipped), expected, rtol=1e-6, atol=1e-7)
    assert (per_example_norms(clipped) <= 2.0 * (1 + 1e-6)).all()
    for key, leaf in grads.items():
        assert torch.equal(clipped[key][3:], leaf[3:])
        assert not torch.equal(clipped[key][:3], leaf[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_stay_within_the_bound(dtype):
    clipped = vf.clip_per_example(gradients(dtype=dtype), 0.3)
    assert clipped["a"].dtype == torch.float32
    assert (per_example_norms(clipped) <= 0.3 * (1 + 1e-6)).all()


def test_large_gradients_do_not_overflow_and_zeros_have_a_derivative():
    grads = {"a": torch.tensor([[3e30, 4e30], [0.0, 0.0]], requires_grad=True)}
    clipped = vf.clip_per_example(grads, 1.0)["a"]
    assert_close(clipped.detach(), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    clipped[1].sum().backward()
    assert torch.equal(grads["a"].grad[1], ones(2))


def test_maps_over_adapters():
    many = {key: torch.stack([leaf, 2 * leaf]) for key, leaf in gradients().items()}
    found = torch.func.vmap(lambda grads: vf.clip_per_example(grads, 2.0))(many)
    for i in range(2):
        expected = vf.clip_per_example({key: leaf[i] for key, leaf in many.items()}, 2.0)
        assert_close({key: leaf[i] for key, leaf in found.items()}, expected)


def test_each_mapped_adapter_has_its_own_noise():
    grads = {key: torch.stack([leaf, leaf]) for key, leaf in gradients().items()}
    draw = lambda g: vf.private_step(g, 1.0, noise_multiplier=1.0, generator=generator())
    both = torch.func.vmap(draw, randomness="different")(grads)
    assert all(not torch.equal(leaf[0], leaf[1]) for leaf in both.values())


def test_a_private_step_is_a_clipped_mean_and_noise():
    grads, before = gradients(), gradients()
    step = vf.private_step(grads, 2.0, noise_multiplier=1.5, generator=generator(), batch_size=8)
    draws = generator()
    for key, leaf in vf.clip_per_example(grads, 2.0).items():
        noise = torch.randn(leaf.shape[1:], generator=draws)
        assert_close(step[key], (leaf.sum(0) + 1.5 * 2.0 * noise) / 8)
        assert torch.equal(grads[key], before[key])
    quiet = vf.private_step(grads, 1e9, noise_multiplier=0.0, generator=generator())
    assert_close(quiet, {key: leaf.mean(0) for key, leaf in grads.items()})
    draws = generator(3)
    again = [vf.private_step(grads, 2.0, noise_multiplier=1.0, generator=draws)["a"] for _ in range(2)]
    assert not torch.equal(*again)


def test_noise_has_its_size():
    step = vf.private_step(
        {"p": torch.zeros(0, 100_000)}, 3.0, noise_multiplier=2.0, generator=generator(), batch_size=10
    )
    assert abs(step["p"].std() / (3.0 * 2.0 / 10) - 1) < 0.02
    assert abs(step["p"].mean()) < 0.01


def test_leaving_an_example_out_changes_the_sum_by_at_most_the_bound():
    grads = gradients()
    whole = vf.private_step(grads, 2.0, noise_multiplier=1.0, generator=generator(), batch_size=1)
    for i in range(6):
        others = {key: torch.cat([leaf[:i], leaf[i + 1 :]]) for key, leaf in grads.items()}
        without = vf.private_step(others, 2.0, noise_multiplier=1.0, generator=generator(), batch_size=1)
        change = global_norm({key: whole[key] - without[key] for key in whole})
        assert change <= 2.0 * (1 + 1e-5)
        assert i > 2 or change >= 2.0 * (1 - 1e-5)


def test_poisson_batches():
    draw = lambda step, key=0: poisson_indices(step, num_examples=50, batch_size=10, key=key)
    batches = [draw(step) for step in range(2000)]
    assert torch.equal(batches[7], draw(7))
    assert not torch.equal(batches[7], draw(7, key=1))
    assert all((batch[1:] > batch[:-1]).all() for batch in batches)
    chosen = torch.zeros(2000, 50, dtype=torch.float64)
    for row, batch in zip(chosen, batches, strict=True):
        row[batch] = 1
    assert (chosen.mean(0) - 0.2).abs().max() < 5 * (0.2 * 0.8 / 2000) ** 0.5
    # Independent: sizes are binomial, and pairs of examples uncorrelated.
    assert abs(chosen.sum(1).var() / (50 * 0.2 * 0.8) - 1) < 0.15
    assert (torch.corrcoef(chosen.T) - torch.eye(50)).abs().max() < 6 / 2000**0.5
    assert len(poisson_indices(3, num_examples=4, batch_size=4, key=0)) == 4


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha:UserWarning")  # while it searches
@pytest.mark.slow
def test_the_recipe_of_the_docstring():
    pytest.importorskip("opacus")
    recipe = privacy.__doc__.partition("    from opacus")[2].partition("The guarantee")[0]
    text = textwrap.dedent("    from opacus" + recipe)
    adapted = small()
    x, y = normal(40, 7), normal(40, 3, seed=1)
    start = randomized(adapted.params)

    def loss_rows(rows, batch):
        return (adapted.apply(rows, adapted.frozen, batch[0]) - batch[1]).square().mean(1)

    names = {
        **{name: getattr(vf, name) for name in ("per_example_grads", "private_step")},
        "poisson_indices": poisson_indices, "adamw_init": adamw_init, "adamw_update": adamw_update, "torch": torch,
        "loss_rows": loss_rows, "params": start, "batch_of": lambda indices: (x[indices], y[indices]),
        "batch_size": 4, "num_examples": 40, "steps": 12,
    }  # fmt: skip
    exec(compile(text, privacy.__file__, "exec"), names)
    assert 7.5 <= names["epsilon"] <= 8.0
    assert names["params"].keys() == start.keys()
    assert all(leaf.isfinite().all() and not torch.equal(leaf, start[key]) for key, leaf in names["params"].items())


bad = Refused()
GOOD = gradients()
BROKEN = {"a": torch.tensor([[1.0], [NAN], [INF]])}


def step(grads=GOOD, max_norm=1.0, **options):
    return vf.private_step(grads, max_norm, **{"noise_multiplier": 1.0, "generator": generator(), **options})


for value in (0.0, -1.0, NAN, INF, ones(()), None, "1", True):
    bad(
        "clip_per_example",
        f"max_norm={value}",
        lambda _, v=value: vf.clip_per_example(GOOD, v),
        "max_norm must be a pos",
    )
bad("clip_per_example", "nothing", lambda _: vf.clip_per_example({}, 1.0), "got an empty dict")
bad("clip_per_example", "no rows", lambda _: vf.clip_per_example({"a": ones(())}, 1.0), "common leading axis")
bad("private_step", "no bound", lambda _: step(max_norm=0.0), "max_norm must be a positive")
bad(
    "private_step", "no generator", lambda _: step(generator=0), "must be a torch.Generator with a secret seed, got int"
)
for noise in (-1.0, NAN, INF, None, "1", ones(2)):
    bad(
        "private_step",
        f"a noise of {noise}",
        lambda _, n=noise: step(noise_multiplier=n),
        "noise_multiplier must be a finite number, at least 0, got",
    )
bad("private_step", "a batch of 0", lambda _: step(batch_size=0), "batch_size must be a positive")
bad("private_step", "an empty batch", lambda _: step({"a": ones(0, 3)}), "pass the expected number of examples")
bad("private_step", "NaN", lambda _: step(BROKEN), r"of 2 of 3 examples are not finite \(first: example 1\)")
for what, change, message in (
    ("no examples", {"num_examples": 0}, "batch_size must be at most num_examples"),
    ("more", {"batch_size": 11}, "batch_size must be at most num_examples"),
    ("none", {"batch_size": 0}, "batch_size must be a positive, finite number, got 0"),
    ("None", {"batch_size": None}, "batch_size must be a positive, finite number, got None"),
    ("a flag as key", {"key": True}, "must be integers, .*key=True"),
):
    options = {"num_examples": 10, "batch_size": 2, "key": 0, **change}
    bad("poisson_indices", what, lambda _, o=options: poisson_indices(0, **o), message)
bad(
    "poisson_indices",
    "a negative step",
    lambda _: poisson_indices(-1, num_examples=10, batch_size=2, key=0),
    "step at least 0, got step=-1",
)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
