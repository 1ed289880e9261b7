"""`to_module`: an ordinary module for trainers, which shares the base."""

import pytest
import torch
from torch.testing import assert_close

import vera_func as vf

from helpers import (
    FORMATS,
    language,
    randomized,
    relative_error,
    snapshot,
    tokens,
)
from refused import (
    ADAPTED,
    PARAMS,
    STACK,
    Refused,
)


R = 8
BERT, QV = "bert.encoder.layer", ("query", "value")
LANGUAGE = [
    *(("llama", base) for base in ("dense", *FORMATS)),
    ("gpt2", "dense"),
    ("bert", "dense"),
    ("bert", "nested"),
]


# transformers 5 renames it.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("name", "base"), [("llama", "dense"), ("llama", "nested"), ("gpt2", "dense")])
def test_gradient_checkpointing(name, base, reentrant):
    _, adapted = language(name, base)
    gradients = []
    for checkpointing in (False, True):
        module = vf.to_module(adapted).train()
        if checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": reentrant})
            module.enable_input_require_grads()
            calls = count_calls(module)
        module(input_ids=tokens(), use_cache=False).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    assert set(calls.values()) == {2}  # every layer ran again in backward
    for key in adapted.params:
        assert relative_error(gradients[1][key], gradients[0][key]) < 1e-5, key


def count_calls(module):
    calls = {}
    for name, layer in module.named_modules():
        if isinstance(layer, vf.Linear | vf.Linear4bit):
            calls[name] = 0

            def count(layer, args, name=name):
                calls[name] += 1

            layer.register_forward_pre_hook(count)
    return calls


class TestToModule:
    def test_shares_the_base_and_copies_the_vectors(self):
        model, adapted = language("llama", "dense")
        module = vf.to_module(adapted)
        assert module.model.norm.weight.data_ptr() == model.model.norm.weight.data_ptr()
        before = snapshot(adapted.params)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
        module(input_ids=tokens()).logits.square().mean().backward()
        optimizer.step()
        assert_close(snapshot(adapted.params), before, rtol=0, atol=0)
        params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        assert not torch.equal(
            params["model.layers.0.self_attn.q_proj.lambda_b"], before[0]["model.layers.0.self_attn.q_proj.lambda_b"]
        )
        assert torch.equal(
            adapted.apply(params, adapted.frozen, input_ids=tokens()).logits, module(input_ids=tokens()).logits
        )

    def test_uses_the_given_projections(self):
        _, adapted = language("llama", "dense")
        adapted = adapted._replace(frozen=randomized(adapted.frozen))
        expected = adapted.apply(*adapted[1:3], input_ids=tokens()).logits
        assert torch.equal(vf.to_module(adapted)(input_ids=tokens()).logits, expected)

    def test_modules_are_independent(self):
        _, adapted = language("gpt2", "dense")
        first, second = vf.to_module(adapted), vf.to_module(adapted._replace(params=randomized(adapted.params, 5)))
        expected = first(input_ids=tokens()).logits
        second(input_ids=tokens()).logits.sum().backward()
        assert torch.equal(first(input_ids=tokens()).logits, expected)
        assert torch.equal(adapted.apply(*adapted[1:3], input_ids=tokens()).logits, expected)
        assert all(p.grad is None for p in first.parameters())


# What is refused

bad = Refused()

bad("to_module", "a stack", lambda _: vf.to_module(ADAPTED._replace(params=STACK)), "is stacked; a module holds one")
bad("to_module", "no vectors", lambda _: vf.to_module(ADAPTED._replace(params={})), "lacks 4 of its 4 keys")
bad("to_module", "no projections", lambda _: vf.to_module(ADAPTED._replace(frozen={})), r"'vera_B', got \[\]")
bad(
    "to_module",
    "a list",
    lambda _: vf.to_module(ADAPTED._replace(params=PARAMS | {"0.lambda_b": [1.0] * 5})),
    "got list",
)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
