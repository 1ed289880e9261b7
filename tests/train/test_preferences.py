"""DPO is its formula; one run trains an adapter for each beta, against a reference that can't move."""

import functools

import pytest
import torch
from torch import ones
from torch.func import grad, vmap
from torch.testing import assert_close

import vera_func as vf
from vera_func.model.head import hidden_and_head
from vera_func.train.losses import next_token_loss
from vera_func.train.preferences import dpo_loss

from helpers import llama, normal, quantized, randomized, snapshot, tokens
from refused import Refused


PAIRS, BETAS = 6, torch.tensor([0.05, 0.5, 2.0])
fit = functools.partial(vf.fit, steps=12, learning_rate=2e-2, progress=False)


class Preferences:
    """Pairs of answers to prompts of three tokens: the better answers hold even ids, the worse ones odd ids."""

    def __init__(self, base, **fields):
        self.model = quantized(llama(), base)
        self.adapted = vf.adapt(self.model, vf.VeraConfig(r=8, **({"target_modules": ["q_proj", "v_proj"]} | fields)))
        prompts, answers = tokens(PAIRS, 3), 2 * torch.randint(2, 33, (PAIRS, 4), generator=torch.Generator())
        self.ids = torch.cat([torch.cat([prompts, answers], 1), torch.cat([prompts, answers + 1], 1)])
        self.labels = self.ids.clone()
        self.labels[:, :3] = -100
        self.labels[::4, -1] = -100  # answers of different lengths
        self.forwards = 0

    def logprobs(self, params, frozen, input_ids, labels):
        self.forwards += 1
        return vf.sequence_logprobs(*hidden_and_head(self.adapted.apply, params, frozen, input_ids=input_ids), labels)

    @torch.no_grad()
    def reference(self, params, id=-1):
        rows = vf.select_adapters(params, [id] * len(self.ids))
        return self.logprobs(rows, self.adapted.frozen, self.ids, self.labels)

    def preference(self, stacked, batch, reference, betas):
        rows = torch.cat([batch, batch + PAIRS])
        each = vf.vmap_adapters(self.logprobs, in_dims=None)
        policy = each(stacked, self.adapted.frozen, self.ids[rows], self.labels[rows])
        return vf.dpo_loss(*policy.chunk(2, -1), *reference[rows].chunk(2), betas)

    def loss(self, reference, betas):
        return lambda stacked, batch: self.preference(stacked, batch, reference, betas).losses.mean(-1)


def batches(step):
    return torch.arange(3) + 3 * (step % 2)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}])
def test_one_run_trains_an_adapter_for_each_beta(base, fields):
    task = Preferences(base, **fields)
    stacked = vf.stack_adapters([task.adapted.params] * len(BETAS))
    (before,) = snapshot(task.model)
    reference = task.reference(stacked)
    plain = vf.next_token_loss(task.model(task.ids).logits, None, task.labels).total.detach()
    assert_close(reference, -plain, rtol=1e-4, atol=1e-4)

    task.forwards = 0
    run = fit(task.loss(reference, BETAS), stacked, batches, num_adapters=len(BETAS))
    assert task.forwards == 12  # none of them is the reference's
    # At first all margins are 0.
    assert run.losses[0].allclose(torch.tensor(0.6931, dtype=torch.float64), atol=1e-4)
    assert torch.equal(task.reference(run.params), reference)
    (after,) = snapshot(task.model)
    assert all(torch.equal(value, after[name]) for name, value in before.items() if isinstance(value, torch.Tensor))

    _, margins = task.preference(run.params, torch.arange(PAIRS), reference, BETAS)
    assert (margins > 0).float().mean(-1).min() > 0.9
    assert not torch.equal(margins[1] / BETAS[1], margins[2] / BETAS[2])
    for i, beta in enumerate(BETAS):
        alone = fit(task.loss(reference, beta[None]), vf.stack_adapters([task.adapted.params]), batches, num_adapters=1)
        assert_close(run.losses[:, i], alone.losses[:, 0], rtol=1e-4, atol=1e-5)
        for key in run.params:
            assert_close(run.params[key][i], alone.params[key][0], rtol=1e-3, atol=1e-4)


def test_another_adapter_is_the_reference():
    task = Preferences("dense")
    first = vf.stack_adapters([randomized(task.adapted.params, scale=0.3)])
    reference = task.reference(first, id=0)
    assert not torch.equal(reference, task.reference(first))
    stacked = vf.stack_adapters([vf.unstack_adapters(first)[0]] * 2)  # training goes on from the reference
    _, margins = task.preference(stacked, torch.arange(PAIRS), reference, BETAS[:2])
    assert_close(margins, torch.zeros(2, PAIRS), rtol=0, atol=1e-4)
    run = fit(task.loss(reference, BETAS[:2]), stacked, batches, num_adapters=2)
    assert (run.losses[-1] < run.losses[0]).all()
    assert torch.equal(task.reference(first, id=0), reference)


def test_dpo_is_its_formula():
    chosen, rejected, reference_chosen, reference_rejected = (normal(5, seed=seed).double() for seed in range(4))
    losses, margins = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, 0.3)
    for i in range(5):
        reward = 0.3 * (chosen[i] - reference_chosen[i]), 0.3 * (rejected[i] - reference_rejected[i])
        assert_close(margins[i], reward[0] - reward[1])
        assert_close(losses[i], torch.log1p(torch.exp(reward[1] - reward[0])))


def test_dpo_with_a_beta_for_each_adapter():
    policy = normal(3, 5), normal(3, 5, seed=1)
    reference = normal(5, seed=2), normal(5, seed=3)
    betas = torch.tensor([0.05, 0.1, 0.5])
    together = dpo_loss(*policy, *reference, betas)
    mapped = vmap(dpo_loss, (0, 0, None, None, 0))(*policy, *reference, betas)
    for i, beta in enumerate(betas.tolist()):
        alone = dpo_loss(policy[0][i], policy[1][i], *reference, beta)
        for k in range(2):
            assert_close(together[k][i], alone[k])
            assert_close(mapped[k][i], alone[k])
    slope = grad(lambda beta: dpo_loss(*policy, *reference, beta).losses.sum())(betas)
    _, margins = together
    assert_close(slope, -(torch.sigmoid(-margins) * margins / betas[:, None]).sum(1))


def test_dpo_stays_finite():
    far = torch.tensor([1e4, -1e4])
    losses, _ = dpo_loss(far, -far, 0 * far, 0 * far, 1.0)
    assert_close(losses, torch.tensor([0.0, 2e4]))


# What is refused

bad = Refused()
bad(
    "dpo_loss",
    "pairs without partners",
    lambda _: dpo_loss(ones(3), ones(4), ones(3), ones(3), 0.1),
    r"rejected has shape \(4,\), but chosen has shape \(3,\)",
)
bad(
    "dpo_loss",
    "a reference of other adapters",
    lambda _: dpo_loss(ones(2, 3), ones(2, 3), ones(3, 3), ones(3), 0.1),
    r"reference_chosen has shape \(3, 3\), but chosen has shape \(2, 3\)",
)
bad(
    "dpo_loss",
    "a beta for each of other adapters",
    lambda _: dpo_loss(ones(2, 3), ones(2, 3), ones(3), ones(3), ones(3)),
    r"beta has shape \(3,\), but chosen has shape \(2, 3\): pass one value",
)


bad("dpo_loss", "beta of 0", lambda _: dpo_loss(ones(2), ones(2), ones(2), ones(2), 0.0), "beta must be a positive")
bad(
    "dpo_loss",
    "a loss instead of its sum",
    lambda _: dpo_loss(next_token_loss(ones(2, 5, 3), None, ones(2, 5).long()), ones(2), ones(2), ones(2), 0.1),
    "chosen must be a tensor of log-probabilities.* got TokenLoss",
)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
