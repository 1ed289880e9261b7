"""Evolution makes the steps of the formula, from seeds alone, whatever the chunks; see also `test_distributed.py`."""

import pytest
import torch
from torch import ones
from torch.testing import assert_close

import vera_func as vf
from vera_func.train.evolve import Evolution, centered_ranks
from vera_func.train.optim import adamw, adamw_init, adamw_update

from helpers import LargestTensor, build, normal, randomized, relative_error, tokens
from refused import ADAPTED, INF, NAN, Refused


START = {"a": normal(2, 3, seed=1), "b": normal(5, seed=2)}
TARGET = normal(11, seed=3)
OPTIONS = {"steps": 3, "sigma": 0.1, "learning_rate": 0.05, "seed": 0, "population": 12}


def flat(stacked):
    return torch.cat([leaf.flatten(1) for leaf in stacked.values()], 1)


def fitness(stacked):
    """The same bits for a member, whatever its neighbours: no sum over an axis that is not its own."""
    return -sum((flat(stacked)[:, i] - TARGET[i]).square() for i in range(11))


def same(one, other):
    return torch.equal(one.fitness, other.fitness) and all(torch.equal(one.params[k], other.params[k]) for k in START)


def test_the_step_of_the_formula():
    seen = []
    start = {key: p.double() for key, p in START.items()}
    run = vf.evolve(lambda stacked: seen.append(stacked) or fitness(stacked), start, **OPTIONS)
    assert len(seen) == 3
    params = flat({key: p[None] for key, p in start.items()})[0]
    for step, stacked in enumerate(seen):
        members = flat(stacked)
        assert_close(members[::2] + members[1::2], (2 * params).expand(6, 11))
        noise = (members[::2] - params) / 0.1
        scores = fitness(stacked)
        assert torch.equal(run.fitness[step], scores)
        # The share of members that are worse is the rank.
        shaped = (scores[:, None] > scores).sum(1).double() / 11 - 0.5
        params = params + 0.05 * (shaped[::2] - shaped[1::2]) @ noise / (12 * 0.1)
    assert_close(flat({key: p[None] for key, p in run.params.items()})[0], params)
    draws = torch.cat([flat(stacked)[::2] for stacked in seen])
    assert draws.std() > 0.05
    assert len(draws.unique(dim=0)) == 18


def test_perturbations_are_normal():
    seen = []
    zero = {"p": torch.zeros(10_000)}
    vf.evolve(lambda s: seen.append(s["p"][::2] / 0.1) or s["p"][:, 0], zero, **{**OPTIONS, "steps": 1})
    (e,) = seen
    assert abs(e.mean()) < 0.02
    assert abs(e.std() - 1) < 0.02
    assert (torch.corrcoef(e) - torch.eye(6)).abs().max() < 0.06


def test_ascends():
    run = vf.evolve(fitness, START, **{**OPTIONS, "steps": 200, "sigma": 0.05, "learning_rate": 0.02})
    assert run.fitness[-1].mean() > -0.1 > -1 > run.fitness[0].mean()


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 300])
def test_chunks_change_nothing(chunk_size):
    options = {**OPTIONS, "population": 256}
    whole = vf.evolve(fitness, START, **options)
    sizes = []
    parts = vf.evolve(lambda s: sizes.append(len(s["a"])) or fitness(s), START, chunk_size=chunk_size, **options)
    assert same(parts, whole)
    assert sum(sizes) == 3 * 256
    assert max(sizes) == min(chunk_size, 256)


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_chunks_of_a_model_equal_one_by_one(base):
    adapted = build("llama", base)
    ids, start = tokens(2, 5), randomized(adapted.params)
    many = vf.vmap_adapters(adapted.apply, in_dims=None)

    def likelihood(stacked):
        assert not torch.is_grad_enabled()
        return many(stacked, adapted.frozen, input_ids=ids).logits.log_softmax(-1)[..., 7].mean((1, 2))

    options = {"steps": 1, "sigma": 0.05, "learning_rate": 0.1, "seed": 0, "population": 8}
    one, some, whole = (vf.evolve(likelihood, start, chunk_size=size, **options) for size in (1, 3, 8))
    assert relative_error(some.fitness, one.fitness) < 1e-5
    assert relative_error(whole.fitness, one.fitness) < 1e-5
    for key in start:
        assert_close(whole.params[key], one.params[key], rtol=1e-5, atol=1e-6)
        assert not torch.equal(whole.params[key], start[key])


def test_perturbations_are_never_stored():
    start = {"p": torch.zeros(1000)}
    with LargestTensor() as largest:
        vf.evolve(lambda s: s["p"][:, :3].sum(1), start, chunk_size=4, **{**OPTIONS, "population": 64})
    assert largest.numel == 4000


def test_same_seeds_same_bits_and_nothing_else_matters():
    torch.manual_seed(0)
    first, before = vf.evolve(fitness, START, **OPTIONS), torch.get_rng_state()
    torch.manual_seed(1)
    assert same(vf.evolve(fitness, START, **OPTIONS), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(vf.evolve(fitness, START, **{**OPTIONS, "seed": 1}), first)
    assert torch.equal(START["a"], normal(2, 3, seed=1))


@pytest.mark.parametrize("optimizer", [None, adamw(0.01)])
def test_resuming_is_exact(optimizer):
    options = {**OPTIONS, "optimizer": optimizer}
    seen = []
    whole = vf.evolve(fitness, START, **{**options, "steps": 5}, on_step=seen.append)
    assert [len(run.fitness) for run in seen] == [1, 2, 3, 4, 5]
    assert same(vf.evolve(fitness, START, **{**options, "steps": 5}, resume=seen[1]), whole)
    assert same(vf.evolve(fitness, START, **{**options, "steps": 5}, resume=whole), whole)


def test_an_optimizer_gets_the_negative_estimate():
    plain = vf.evolve(fitness, START, **{**OPTIONS, "steps": 1, "learning_rate": 1.0})
    grads = {key: START[key] - p for key, p in plain.params.items()}
    expected, _ = adamw_update(grads, adamw_init(START), START, learning_rate=0.01)
    run = vf.evolve(fitness, START, **{**OPTIONS, "steps": 1, "learning_rate": None, "optimizer": adamw(0.01)})
    for key in START:
        assert_close(run.params[key], expected[key], rtol=1e-4, atol=1e-5)
    assert run.state.step == 1


def test_batches_and_16_bit_params():
    seen = []
    run = vf.evolve(
        lambda stacked, batch: seen.append(batch) or fitness(stacked),
        {key: p.bfloat16() for key, p in START.items()},
        lambda step: 10 * step,
        chunk_size=6,
        **OPTIONS,
    )
    assert seen == [0, 0, 10, 10, 20, 20]
    assert run.params["a"].dtype == torch.bfloat16


def test_ranks():
    values = torch.tensor([2.0, 5.0, 2.0, -INF, 5.0, 5.0, 7.0])
    less = (values[:, None] > values).sum(1).double()
    ties = (values[:, None] == values).sum(1).double() - 1
    assert_close(centered_ranks(values), (less + ties / 2) / 6 - 0.5)
    assert torch.equal(centered_ranks(ones(4)), torch.zeros(4, dtype=torch.float64))
    run = vf.evolve(lambda s: ones(len(s["a"])), START, **OPTIONS)
    assert all(torch.equal(run.params[key], START[key]) for key in START)


bad = Refused()


def refused(what, message, fitness=fitness, params=START, **change):
    bad("evolve", what, lambda _: vf.evolve(fitness, params, **{**OPTIONS, **change}), message)


refused("an odd population", "population must be an even number, .*got 7", population=7)
refused("no population", "population must be an even number, .*got 0", population=0)
refused("half a population", "population must be an even number, .*got 2.0", population=2.0)
for name in ("sigma", "learning_rate"):
    for value in ("1", True, ones(())):
        refused(f"{name}={value!r}", f"{name} must be a positive, finite number", **{name: value})
refused("no report", "on_step must be a function of the state, got int", on_step=3)
refused("what adapt returns", "got Adapted: pass its attribute params", params=ADAPTED)
refused("a list of params", "params must be a dict of tensors, got list", params=[ones(3)])
refused("a number in params", r"params\['a'\] must be a tensor, got float", params={"a": 1.0})
refused("complex numbers", "must return real numbers, got torch.complex64", fitness=lambda s: fitness(s) * 1j)
refused("no function", "fitness must be a function of stacked params, got NoneType", fitness=None)
refused("batches in a list", "batches must be a function of the step, got list", batches=[1])
refused("no params", "params is empty", params={})
refused("integers", "only floating-point tensors", params={"p": ones(3, dtype=torch.long)})
refused("NaN", r"of 12 of 12 members is not finite at step 0 \(first: member 0\)", fitness=lambda s: NAN * ones(12))
refused("infinity", "is not finite at step 0", fitness=lambda s: fitness(s) * INF)
refused(
    "a mean", r"fitness must return one value per adapter \(shape \(12,\)\), got shape \(\)", fitness=lambda s: ones(())
)
refused("a float", r"fitness must return .*got float", fitness=lambda s: 1.0)
refused("a column", r"\(12,\)\), got shape \(12, 1\)", fitness=lambda s: ones(12, 1))
refused("no rate", "evolve needs a learning_rate", learning_rate=None)
refused("a negative rate", "learning_rate must be a positive", learning_rate=-0.1)
refused("no sigma", "sigma must be a positive", sigma=0.0)
refused("sigma of NaN", "sigma must be a positive", sigma=NAN)
refused("no seed", "seed must be an integer, got None", seed=None)
refused("negative steps", "steps must be an integer, at least 0, got -1", steps=-1)
refused("no chunk", "chunk_size must be an integer, at least 1, got 0", chunk_size=0)
refused("no optimizer", "optimizer must be a pair of pure functions", optimizer=3)
RUN = Evolution(START, (), torch.zeros(4, 12, dtype=torch.float64))
refused("fewer steps", r"steps must be at least 4 \(.*\), got 3", resume=RUN)
refused("another run", "other params, another optimizer or another population", resume=RUN, population=10)
refused("other params", "other params, another optimizer", resume=RUN._replace(params={"a": ones(2)}))
refused("another optimizer", "other params, another optimizer", resume=RUN, optimizer=adamw(0.1))
refused("a dict", "resume must be an Evolution returned by evolve, got dict", resume=START)
bad(
    "evolve",
    "inside a transform",
    lambda _: torch.func.grad(lambda p: vf.evolve(fitness, p, **OPTIONS).params["a"].sum())(START),
    "call it outside of transforms",
)
bad("centered_ranks", "one value", lambda _: centered_ranks(ones(1)), r"n at least 2, got shape \(1,\)")
bad("centered_ranks", "a column", lambda _: centered_ranks(ones(3, 1)), r"must have shape \(n,\)")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
