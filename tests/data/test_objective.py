"""Losses and scores of adapters on rows, against a loop over rows in float64."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import vera_func as vf
from vera_func.data.batches import Item, Part, batch_order, collate_items, evaluation_batches, training_batches
from vera_func.data.objective import loss_of_rows, reference_logprobs, score_rows, sequence_losses
from vera_func.data.tokens import TokenRows
from vera_func.train.distributed import mean_over_micro_batches
from vera_func.train.gradient import gradient_of

from helpers import llama, randomized


def make_rows(lengths, width=1, seed=0):
    """Random sequences whose second half is the target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 67, (sum(lengths),), generator=generator).int()
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    labels = ids.clone()
    for start, length in zip(offsets.tolist(), lengths, strict=False):
        labels[start : start + length // 2] = -100
    return TokenRows(ids, labels, offsets, width, torch.arange(len(lengths) // width))


LENGTHS = [5, 9, 3, 7, 7, 4, 12, 2, 6, 8]


@pytest.fixture(scope="module")
def adapted():
    made = vf.adapt(llama(torch.float64), vf.VeraConfig(r=8, target_modules="all-linear"))
    return made._replace(params={k: v.double() for k, v in randomized(made.params, scale=0.3).items()})


def oracle(adapted, params, rows):
    """-log p of the targets of each sequence, one after another."""
    found = []
    for start, end in zip(rows.offsets.tolist(), rows.offsets.tolist()[1:], strict=False):
        ids, labels = rows.ids[start:end].long(), rows.labels[start:end]
        logp = adapted.apply(params, adapted.frozen, input_ids=ids[None]).logits[0].log_softmax(-1)
        found.append(-sum(logp[t - 1, ids[t]] for t in range(1, len(ids)) if labels[t] != -100))
    return torch.stack(found)


def targets(rows):
    return torch.tensor([rows.num_targets(i) for i in range(len(rows.groups))])


def test_language_losses(adapted):
    rows = make_rows(LENGTHS)
    part = Part(rows, torch.arange(len(LENGTHS)))
    items = [Item(0, row, 1 / int(targets(rows).sum())) for row in range(len(LENGTHS))]
    batch = collate_items([part], items)
    expected = oracle(adapted, adapted.params, rows)
    assert_close(sequence_losses(adapted, adapted.params, batch, stacked=False), expected)
    mean = expected.sum() / targets(rows).sum()
    loss = loss_of_rows(adapted)
    assert_close(loss(adapted.params, batch).double(), mean, rtol=1e-6, atol=0)
    grads = vf.grad(loss)(adapted.params, batch)
    right = vf.grad(lambda params: oracle(adapted, params, rows).sum() / targets(rows).sum())(adapted.params)
    for key, value in grads.items():
        assert_close(value, right[key], rtol=1e-6, atol=1e-9)
    scores = score_rows(adapted, adapted.params, [part], stacked=False).row(0)
    assert scores == pytest.approx({"loss": mean.item(), "perplexity": math.exp(mean.item())}, rel=1e-6)


def test_packed_rows_have_the_losses_of_their_documents(adapted):
    rows = make_rows(LENGTHS)
    packed = rows.pack(torch.arange(len(LENGTHS)), 14)
    assert len(packed.packed) < len(LENGTHS)
    items = [Item(0, row) for row in range(len(packed.packed))]
    batch = collate_items([Part(packed, torch.arange(len(packed.packed)))], items, dtype=torch.float64)
    found = sequence_losses(adapted, adapted.params, batch, stacked=False)
    alone = oracle(adapted, adapted.params, rows)
    assert_close(found, torch.stack([alone[row].sum() for row in packed.packed]))


def preference(adapted, params, reference, rows, beta):
    """Losses and margins of pairs by the formula."""
    policy, base = (-oracle(adapted, p, rows).reshape(-1, 2) for p in (params, reference))
    margins = beta * ((policy - base)[:, 0] - (policy - base)[:, 1])
    return torch.log1p(torch.exp(-margins)), margins


def test_preferences(adapted):
    rows = make_rows(LENGTHS, width=2)
    reference = randomized(adapted.params, seed=5, scale=0.3)
    part = Part(rows, torch.arange(5), beta=0.3)
    logprobs = reference_logprobs(adapted, reference, part)
    assert_close(logprobs, -oracle(adapted, reference, rows).reshape(-1, 2))
    part = part._replace(reference=logprobs)
    losses, margins = preference(adapted, adapted.params, reference, rows, 0.3)
    batch = collate_items([part], [Item(0, row, 1 / 5) for row in range(5)])
    loss = loss_of_rows(adapted)
    assert_close(loss(adapted.params, batch).double(), losses.mean(), rtol=1e-6, atol=0)
    found = score_rows(adapted, adapted.params, [part], stacked=False).row(0)
    expected = {"loss": losses.mean(), "accuracy": (margins > 0).double().mean(), "margin": margins.mean()}
    assert found == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-5)
    assert 0 < found["accuracy"] < 1


@pytest.mark.parametrize("width", [1, 2])
def test_adapters_with_rows_and_betas_of_their_own(adapted, width):
    """In one forward each has the loss that it has alone, in any number of micro-batches."""
    lengths = [LENGTHS, [4, 6, 5, 3, 9, 9, 2, 8], [7, 3, 2, 5]]
    many = [make_rows(one, width, seed) for seed, one in enumerate(lengths)]
    params = [randomized(adapted.params, seed, 0.3) for seed in range(3)]
    parts = [Part(rows, torch.arange(len(rows.groups)), beta) for rows, beta in zip(many, (0.1, 0.5, 2.0), strict=True)]
    if width == 2:
        parts = [part._replace(reference=reference_logprobs(adapted, adapted.params, part)) for part in parts]
    steps = [2, 1, 2]  # the second one stops after a step
    stacked, loss = vf.stack_adapters(params), loss_of_rows(adapted, 3)
    for count in (1, 2, 5):
        batches = training_batches(
            parts, steps, 4, seed=0, micro_batches=count, collate=partial(collate_items, parts, dtype=torch.float64)
        )
        for step in range(2):
            mean = partial(mean_over_micro_batches, weight=lambda _: 1.0)
            grads, losses = mean(lambda batch: gradient_of(loss, stacked, (3,), False, batch), batches(step))
            for i, part in enumerate(parts):
                if step >= steps[i]:
                    assert losses[i] == 0
                    assert not any(value[i].any() for value in grads.values())
                    continue
                own = partial(collate_items, [part])
                (batch,) = training_batches([part], [2], 4, seed=0, micro_batches=1, collate=own)(step)
                assert_close(losses[i], loss_of_rows(adapted)(params[i], batch), rtol=1e-6, atol=0)
                right = vf.grad(loss_of_rows(adapted))(params[i], batch)
                for key, value in grads.items():
                    assert_close(value[i], right[key], rtol=1e-5, atol=1e-8)
    together = score_rows(adapted, stacked, parts, stacked=True)
    for i, part in enumerate(parts):
        assert together.row(i) == pytest.approx(score_rows(adapted, params[i], [part], stacked=False).row(0), rel=1e-6)


def test_dropout_depends_on_the_step(adapted):
    made = vf.adapt(llama(torch.float64), vf.VeraConfig(r=8, vera_dropout=0.5))
    params, rows = randomized(made.params, scale=0.3), make_rows(LENGTHS)
    batch = collate_items([Part(rows, torch.arange(5))], [Item(0, row) for row in range(5)])
    loss = loss_of_rows(made, dropout_seed=3)
    first = loss(params, {**batch, "step": 0, "micro_batch": 0})
    assert loss(params, {**batch, "step": 0, "micro_batch": 0}) == first
    others = [loss(params, {**batch, "step": step, "micro_batch": micro}) for step, micro in ((1, 0), (0, 1))]
    assert len({first.item(), *(other.item() for other in others)}) == 3


def test_an_order_visits_every_row_once_in_an_epoch():
    order = batch_order(list(range(20)), 4, seed=1, window=2)
    for epoch in range(3):
        batches = [order(5 * epoch + i) for i in range(5)]
        assert sorted(i for batch in batches for i in batch) == list(range(20))
    assert order(0) != order(5)
    with pytest.raises(ValueError, match="3 training examples do not fill a batch of 4"):
        batch_order([1, 1, 1], 4, seed=0)


def test_evaluation_batches_are_bounded():
    rows = make_rows([5, 9, 30, 7, 7])
    groups = evaluation_batches([Item(0, row) for row in range(5)], [Part(rows, torch.arange(5))], 20)
    assert sorted(item.row for group in groups for item in group) == list(range(5))
    assert [[item.row for item in group] for group in groups] == [[0, 3], [4, 1], [2]]
