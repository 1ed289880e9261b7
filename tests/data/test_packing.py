"""Packed documents are as if each were alone: logits, losses, gradients."""

import hypothesis.strategies as st
import pytest
import torch
import transformers
from hypothesis import given, settings
from torch.testing import assert_close

import vera_func as vf
from vera_func.data.packing import is_packable, pack, packed_batch, split
from vera_func.model.head import hidden_and_head

from helpers import gpt2, llama, randomized, tokens


SIZES = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LENGTHS = [5, 2, 7, 3, 1, 4]
DOCUMENTS = [tokens(length, seed=i).tolist() for i, length in enumerate(LENGTHS)]
BATCH = [[DOCUMENTS[i] for i in row] for row in ([0, 1], [2, 3], [4, 5])]  # 7, 10 and 5 tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_do_not_see_each_other(make, attention, dtype):
    model = make(dtype, attention)
    batch = packed_batch([[(ids, ids) for ids in row] for row in BATCH], dtype=dtype)
    del batch["labels"]
    with torch.no_grad():
        logits = model(**batch).logits
        assert logits.isfinite().all()
        for i, row in enumerate(BATCH):
            begin = 0
            for ids in row:
                alone = model(input_ids=torch.tensor([ids])).logits[0]
                close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
                assert_close(logits[i, begin : begin + len(ids)], alone, **close)
                begin += len(ids)


RECURRENT = {
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2, "block_ff_dim": 128},
    "Mamba2ForCausalLM": {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
    "RwkvForCausalLM": {"attention_hidden_size": 64},
    "BloomForCausalLM": {"n_layer": 2, "n_head": 4},  # takes masks of two axes only
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_keep_documents_apart_are_told_from_others(dtype):
    models = {llama: True, gpt2: True}
    for name, options in RECURRENT.items():
        model_class = getattr(transformers, name)
        options = SIZES | {"num_attention_heads": 4} | options
        models[lambda dtype, make=model_class, options=options: make(make.config_class(**options)).to(dtype)] = False
    for make, expected in models.items():
        torch.manual_seed(0)
        model = make(dtype).eval()
        assert is_packable(lambda model=model, **inputs: model(**inputs).logits, 16, dtype=dtype) is expected


def test_losses_and_gradients_are_those_of_the_documents():
    apply, params, frozen, _ = vf.adapt(llama(), vf.VeraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    params = randomized(params)
    batch = packed_batch([[(ids, ids) for ids in row] for row in BATCH])
    labels = batch.pop("labels")

    def packed(params):
        total, count = vf.next_token_loss(*hidden_and_head(apply, params, frozen, **batch), labels)
        return total, count

    def alone(params):
        losses = []
        for ids in DOCUMENTS:
            one = torch.tensor([ids])
            losses.append(vf.next_token_loss(*hidden_and_head(apply, params, frozen, input_ids=one), one))
        return losses

    total, count = packed(params)
    right = [sum(alone(params)[i].total for i in row) for row in ([0, 1], [2, 3], [4, 5])]
    assert_close(total, torch.cat(right), rtol=1e-5, atol=1e-5)
    assert count.tolist() == [5 + 2 - 2, 7 + 3 - 2, 1 + 4 - 2]
    got = vf.grad(lambda params: packed(params)[0].sum())(params)
    right = vf.grad(lambda params: sum(loss.total.sum() for loss in alone(params)))(params)
    for key in params:
        assert_close(got[key], right[key], rtol=1e-4, atol=1e-5)


def test_each_packed_row_has_its_own_adapter():
    apply, params, frozen, _ = vf.adapt(llama(), vf.VeraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    many = [randomized(params, seed, 0.3) for seed in range(3)]
    batch = packed_batch([[(ids, ids) for ids in row] for row in BATCH])
    labels = batch.pop("labels")
    rows = vf.select_adapters(vf.stack_adapters(many), [2, 0, 1])
    total, _ = vf.next_token_loss(*hidden_and_head(apply, rows, frozen, **batch), labels)
    for i, which in enumerate([2, 0, 1]):
        alone, _ = vf.next_token_loss(*hidden_and_head(apply, many[which], frozen, **batch), labels)
        assert_close(total[i], alone[i])


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_document_and_wastes_little(lengths, max_length):
    rows = pack(lengths, max_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < tokens <= max_length for tokens in used)
    # Of two rows, one would not have been opened if it fitted into the other.
    assert all(one + other > max_length for k, one in enumerate(used) for other in used[:k])
    assert rows == pack(lengths, max_length)


def test_packing_many_documents_takes_little_time_and_space():
    lengths = torch.randint(1, 513, (20_000,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack(lengths, 512)
    assert len(rows) * 512 <= 1.01 * sum(lengths)


def test_split():
    document = list(range(11))
    assert split(document, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert split(document, 20) == [document]
    assert split([], 4) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack([3, 9], 8), "document 1 has 9 tokens, but must have 1 to 8: cut long documents with split"),
        (lambda: pack([0], 8), "document 0 has 0 tokens"),
        (lambda: pack([3], 0), "max_length must be a positive number of tokens, got 0"),
        (lambda: split([3], 2.5), "max_length must be a positive number of tokens, got 2.5"),
        (lambda: packed_batch([]), "a row has no documents, or a document has no tokens"),
        (lambda: packed_batch([[([3], [3])], []]), "a row has no documents, or a document has no tokens"),
        (lambda: packed_batch([[([3, 4], [3])]]), "2 tokens and 1 labels"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
