"""A task: the prompt, its answers, and losses and scores that are each adapter's own."""

import pytest
import torch
from torch.testing import assert_close

import vera_func as vf
from vera_func.cli import demo
from vera_func.data.examples import read_examples
from vera_func.data.models import load_base
from vera_func.data.task import check_prompt, encode_examples, loss_of, make_task, score_of


def test_stacked_losses_and_scores_are_each_adapters_own(folder, reviews):
    """Batches of one row, too, which `vmap_adapters` leaves to broadcast."""
    base = load_base(str(folder), "nf4", torch.float32)
    examples = read_examples(reviews)[:13]
    task = make_task(base, ["bad", "good"])
    rows = encode_examples(base, task, examples)
    adapted = vf.adapt(base.model, vf.VeraConfig(r=8))
    generator = torch.Generator().manual_seed(0)
    many = [
        {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in adapted.params.items()} for _ in range(3)
    ]
    stacked = vf.stack_adapters(many)
    for size in (1, 4, 13):
        together = score_of(adapted, task, stacked, rows, batch_size=size)
        for i, params in enumerate(many):
            alone = score_of(adapted, task, params, rows, batch_size=5)
            assert together.accuracy[i] == alone.accuracy
            assert_close(together.loss[i], alone.loss, rtol=1e-4, atol=1e-5)
    batch = demo.train_batches(rows, 4, seed=0)(0)
    losses = loss_of(adapted, task, stacked=True)(stacked, batch)
    for i, params in enumerate(many):
        assert_close(losses[i], loss_of(adapted, task)(params, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", "{text}{text}", "Review", "{text} {label}", "{0} {text}", "{text", "{text}"])
def test_prompts_without_one_place_for_a_text(prompt):
    with pytest.raises(ValueError, match=r"\{text\} in it once"):
        check_prompt(prompt)
