"""A task: the prompt, its answers, and losses and scores that are each adapter's own."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import vera_func as vf
from vera_func.data.examples import read_examples
from vera_func.data.models import load_base
from vera_func.data.prompts import Encoded, accepted_arguments, answer_loss, collate, train_batches
from vera_func.data.task import Task, check_prompt, encode_examples, logits_of, loss_of, make_task, score_of

from helpers import gpt2, llama


class Bare(torch.nn.Module):
    """A language model that takes token ids only, and knows nothing of an output head."""

    def __init__(self):
        super().__init__()
        self.embed, self.c_attn, self.head = torch.nn.Embedding(67, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 67)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.c_attn(self.embed(input_ids)).cumsum(1).tanh()))


def task_for(model):
    return Task(["a", "b", "c"], "{text}:", torch.tensor([9, 3, 66]), 0, accepted_arguments(model))


MODELS = {"llama": (llama, "q_proj"), "gpt2": (gpt2, "c_attn"), "bare": (Bare, "c_attn")}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_labels_at_the_end_of_the_prompt(name):
    """Whatever arguments the model takes. GPT-2 has absolute positions: padding must not move them."""
    make, target = MODELS[name]
    model = make().eval()
    task = task_for(model)
    adapted = vf.adapt(model, vf.VeraConfig(r=4, target_modules=[target]))
    params = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(0)) for k, v in adapted.params.items()}
    rows = [Encoded([3, 4, 5], 0), Encoded(list(range(9)), 1)]
    if name == "bare":
        rows = [Encoded([0] * 6 + rows[0].ids, 0), rows[1]]  # it has no mask
    batch = collate(rows)
    right = []
    for row in rows:
        whole = adapted.apply(params, adapted.frozen, torch.tensor([row.ids])).logits
        right.append(whole[0, -1, task.answers])
    right = torch.stack(right).detach()
    assert_close(logits_of(adapted, task)(params, batch), right, rtol=1e-4, atol=1e-5)
    loss = answer_loss(right, batch["label"])
    assert_close(loss_of(adapted, task)(params, batch), loss, rtol=1e-4, atol=1e-5)
    twice = vf.stack_adapters([params, params])
    assert_close(loss_of(adapted, task, stacked=True)(twice, batch), loss.expand(2), rtol=1e-4, atol=1e-5)


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
    batch = train_batches(rows, 4, seed=0)(0)
    losses = loss_of(adapted, task, stacked=True)(stacked, batch)
    for i, params in enumerate(many):
        assert_close(losses[i], loss_of(adapted, task)(params, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", "{text}{text}", "Review", "{text} {label}", "{0} {text}", "{text", "{text}"])
def test_prompts_without_one_place_for_a_text(prompt):
    with pytest.raises(ValueError, match=r"\{text\} exactly once"):
        check_prompt(prompt)
