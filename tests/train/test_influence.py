"""Influence equals dense formulas in float64, and predicts what steps and left-out examples do."""

import pytest
import torch
from torch import ones
from torch.func import grad, hessian
from torch.testing import assert_close

import vera_func as vf
from vera_func.train.influence import fisher_influence, tracin

from helpers import make_layer, normal
from refused import NAN, Refused


def gradients(n, seed):
    return {"a": normal(n, 2, 3, seed=seed, dtype=torch.float64), "b": normal(n, 4, seed=seed + 1, dtype=torch.float64)}


def flat(grads):
    return torch.cat([leaf.flatten(1) for leaf in grads.values()], 1)


def test_tracin_sums_products_over_checkpoints():
    train, test = [gradients(7, seed) for seed in (0, 2)], [gradients(3, seed) for seed in (4, 6)]
    expected = sum(rate * flat(a) @ flat(b).T for rate, a, b in zip([0.1, 0.3], train, test, strict=True))
    assert_close(tracin(train, test, [0.1, 0.3]), expected)
    assert_close(tracin(iter(train), iter(test), [0.1, 0.3]), expected)
    assert_close(
        tracin(train[:1], [{k: v.float() for k, v in test[0].items()}], [1.0]), flat(train[0]) @ flat(test[0]).T
    )


def test_tracin_predicts_the_change_by_a_step():
    params, frozen, weight, x = make_layer(in_=7, out=5, r=3)
    loss_rows = lambda rows, x: vf.vera_forward(rows, frozen, x, lambda x: x @ weight.T).square().sum(1)
    rate = 1e-9
    found = tracin(*[[vf.per_example_grads(loss_rows, params, x)]] * 2, [rate])
    one = lambda p, x: loss_rows(p, x[None]).sum()
    for i in range(3):
        stepped = {
            key: p - rate * g for (key, p), g in zip(params.items(), grad(one)(params, x[i]).values(), strict=True)
        }
        change = torch.stack([one(params, row) - one(stepped, row) for row in x])
        assert_close(found[i], change, rtol=1e-4, atol=0)


@pytest.mark.parametrize("n", [3, 30])  # fewer examples than parameters, and more
def test_the_inverse_of_fisher(n):
    train, test = gradients(n, 0), gradients(4, 2)
    G = flat(train)
    fisher = G.T @ G / n + 0.3 * torch.eye(G.shape[1], dtype=torch.float64)
    expected = G @ torch.linalg.inv(fisher) @ flat(test).T
    assert_close(fisher_influence(train, test, damping=0.3), expected, rtol=1e-9, atol=1e-9)


def test_influence_predicts_an_example_left_out():
    # The mean of a Gaussian; for whitened examples the Fisher matrix at the optimum is the Hessian, the identity.
    x = normal(500, 2, dtype=torch.float64)
    x = torch.linalg.solve(torch.linalg.cholesky(torch.cov(x.T, correction=0)), x.T - x.mean(0)[:, None]).T
    loss = lambda p, x: (p["p"] - x).square().sum() / 2
    mean = {"p": x.mean(0)}
    assert_close(hessian(lambda p: loss(p, x) / len(x))(mean)["p"]["p"], torch.eye(2, dtype=torch.float64))
    rows = lambda rows, x: (rows["p"] - x).square().sum(1) / 2
    test = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    both = [vf.per_example_grads(rows, mean, part) for part in (x, test)]
    predicted = fisher_influence(*both, damping=1e-9)[:, 0] / len(x)
    for i in range(5):
        without = {"p": torch.cat([x[:i], x[i + 1 :]]).mean(0)}
        assert_close(predicted[i], loss(without, test) - loss(mean, test), rtol=0.02, atol=2e-5)


bad = Refused()
G = gradients(3, 0)


def refused(function, what, call, message):
    bad(function, what, lambda _: call(), message)


refused("tracin", "no checkpoints", lambda: tracin([], [], []), "are empty: pass at least one checkpoint")
refused("tracin", "one rate", lambda: tracin([G], [G], 0.1), "learning_rates must be a list .*, got float")
refused("tracin", "a rate of NaN", lambda: tracin([G], [G], [NAN]), "learning_rates must be finite numbers, got nan")
refused("tracin", "rates of adapters", lambda: tracin([G], [G], [ones(2)]), "learning_rates must be finite numbers")
for n in (1, 2):  # one row would broadcast
    fewer = {key: leaf[:n] for key, leaf in G.items()}
    message = rf"the same examples, but .* \(3, 3\) at one checkpoint and \({n}, 3\)"
    refused("tracin", f"{n} of 3 examples", lambda g=fewer: tracin([G, g], [G, G], [0.1, 0.1]), message)
refused("tracin", "integers", lambda: tracin([{"a": ones(3).long()}], [G], [0.1]), r"train_grads\['a'\] .* torch.int64")
refused("tracin", "too few rates", lambda: tracin([G, G], [G, G], [0.1]), "one entry per checkpoint")
refused("tracin", "one dict", lambda: tracin(G, G, [0.1, 0.1]), "must be a dict of gradients .*, got str")
refused("tracin", "other keys", lambda: tracin([G], [{"a": G["a"]}], [0.1]), "only one of them has 'b'")
refused(
    "tracin",
    "another shape",
    lambda: tracin([G], [{**G, "a": ones(3, 2)}], [0.1]),
    r"train_grads\['a'\] has shape \(3, 2, 3\), but test_grads\['a'\] has shape \(3, 2\)",
)
BROKEN = {key: leaf.clone() for key, leaf in G.items()}
BROKEN["a"][1] = NAN
TWICE = {key: torch.cat([leaf, leaf]) for key, leaf in G.items()}
for what, train, test, damping, message in (
    ("gradients of NaN", BROKEN, G, 1.0, r"1 of 3 train examples are not finite \(first: example 1\)"),
    ("tests of NaN", G, BROKEN, 1.0, r"1 of 3 test examples are not finite \(first: example 1\)"),
    ("a text", G, G, "1", "damping must be a positive"),
    ("a singular matrix", TWICE, G, 1e-300, "pass a larger damping. The mean squared norm"),
):
    given = (train, test, damping)
    refused("fisher_influence", what, lambda g=given: fisher_influence(*g[:2], damping=g[2]), message)
refused("fisher_influence", "no damping", lambda: fisher_influence(G, G, damping=0.0), "damping must be a positive")
refused("fisher_influence", "NaN", lambda: fisher_influence(G, G, damping=NAN), "damping must be a positive")
refused(
    "fisher_influence",
    "no examples",
    lambda: fisher_influence({"a": ones(0, 2)}, G, damping=1.0),
    "train_grads has no examples",
)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
