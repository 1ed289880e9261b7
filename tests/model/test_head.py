"""The output head apart from the rest: the same numbers as the whole, and no work on logits that nobody asked for."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import vera_func as vf
from vera_func.model.head import head_logits, hidden_and_head, hidden_states, token_logits

from helpers import RANK, LargestTensor, bert, gpt2, left_padded, llama, quantized, row, tokens


TOKENS = [5, 66, 0]


def adapted_model(model, seed=0, **options):
    config = {"target_modules": ["q_proj", "v_proj"]} | options
    adapted = vf.adapt(model, vf.VeraConfig(r=RANK, **config))
    generator = torch.Generator().manual_seed(seed)
    params = {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in adapted.params.items()}
    return adapted._replace(params=params)


def masked_lm():
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(bert().config).eval()


def tied():
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def with_bias():
    model = llama()
    model.lm_head = nn.Linear(64, 67)
    return model.eval()


def inner_head():
    """A model that holds its head deeper in its tree."""
    model = llama()
    model.wrapped = nn.ModuleDict({"head": model.lm_head})
    del model.lm_head
    type(model)
    cls = type("Deeper", (type(model),), {
        "lm_head": property(lambda self: self.wrapped["head"]),
        "get_output_embeddings": lambda self: self.wrapped["head"],
    })  # fmt: skip
    model.__class__ = cls
    return model


# Model, and what is adapted and trained in it.
CASES = {
    "plain": (llama, {}),
    "nf4": (lambda: quantized(llama(), "nf4"), {}),
    "tied": (tied, {}),
    "bias": (with_bias, {}),
    "deeper": (inner_head, {}),
    "gpt2": (gpt2, {"target_modules": ["c_attn"]}),
    "masked": (masked_lm, {"target_modules": ["query"]}),
    "trained head": (llama, {"modules_to_save": ["lm_head"]}),
    "trained head with bias": (with_bias, {"modules_to_save": ["lm_head"]}),
    "trained tied head": (tied, {"modules_to_save": ["lm_head"]}),
    "adapted head": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "bfloat16": (lambda: llama(torch.bfloat16), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_some_logits_are_those_of_the_whole(case):
    make, options = CASES[case]
    apply, params, frozen, _ = adapted_model(make(), **options)
    batch = {"input_ids": tokens(), "attention_mask": left_padded(3, 7)}
    whole = apply(params, frozen, **batch).logits.detach()
    close = {"rtol": 0.05, "atol": 0.02} if case == "bfloat16" else {}
    with torch.no_grad():
        some = token_logits(apply, params, frozen, TOKENS, **batch)
        assert_close(some, whole[..., TOKENS], **close)
        hidden = hidden_states(apply, params, frozen, **batch)
        assert_close(head_logits(apply, params, frozen, hidden[:, -1:]), whole[:, -1:], **close)
        assert_close(head_logits(apply, params, frozen, hidden, TOKENS), some)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole(case):
    make, options = CASES[case]
    apply, params, frozen, _ = adapted_model(make(), **options)
    batch = {"input_ids": tokens(), "attention_mask": left_padded(3, 7)}

    def whole(params):
        return apply(params, frozen, **batch).logits[..., TOKENS].square().sum()

    def some(params):
        return token_logits(apply, params, frozen, TOKENS, **batch).square().sum()

    close = {"rtol": 0.1, "atol": 0.5} if case == "bfloat16" else {"rtol": 1e-4, "atol": 1e-4}
    right, got = torch.func.grad(whole)(params), torch.func.grad(some)(params)
    for key in params:
        assert_close(got[key], right[key], **close, msg=lambda message, key=key: f"{key}: {message}")


@pytest.mark.parametrize("case", ["nf4", "trained head", "trained head with bias", "adapted head"])
def test_an_adapter_for_each_row(case):
    make, options = CASES[case]
    model = make()
    many = [adapted_model(model, seed=i, **options) for i in range(3)]
    apply, frozen = many[0].apply, many[0].frozen
    rows = vf.select_adapters(vf.stack_adapters([one.params for one in many]), [2, 0, 1])
    ids = tokens()
    got = token_logits(apply, rows, frozen, TOKENS, input_ids=ids)
    for i, which in enumerate([2, 0, 1]):
        alone = token_logits(apply, many[which].params, frozen, TOKENS, input_ids=ids[i : i + 1])
        assert_close(got[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "compile", "compile grad"])
def test_transforms(transform):
    apply, params, frozen, _ = adapted_model(quantized(llama(attention="eager"), "nf4"))
    ids = tokens()

    def f(params):
        return token_logits(apply, params, frozen, TOKENS, input_ids=ids)

    def whole(params):
        return apply(params, frozen, input_ids=ids).logits[..., TOKENS]

    if transform == "vmap":
        stacked = vf.stack_adapters([params, {k: 2 * v for k, v in params.items()}])
        together = torch.func.vmap(f)(stacked)
        for i in range(2):
            assert_close(together[i], whole(row(stacked, i)), rtol=1e-4, atol=1e-5)
    elif transform == "jvp":
        assert_close(
            torch.func.jvp(f, (params,), (params,))[1], torch.func.jvp(whole, (params,), (params,))[1],
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    elif transform == "compile":
        assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(params), whole(params), rtol=1e-4, atol=1e-5)
    else:

        def loss(params):
            return f(params).square().sum()

        got = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(params)
        assert_close(got, torch.func.grad(loss)(params), rtol=1e-3, atol=1e-4)


def changed(how):
    """A model whose logits are not what its head returns."""
    if how in ("granite", "gemma2", "cohere"):
        import transformers

        sizes = {
            "vocab_size": 67, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0,
        }  # fmt: skip
        extra = {"granite": {"logits_scaling": 3.0}, "gemma2": {"final_logit_softcapping": 0.1, "head_dim": 16}}
        config = {"granite": "GraniteConfig", "gemma2": "Gemma2Config", "cohere": "CohereConfig"}[how]
        model = {"granite": "GraniteForCausalLM", "gemma2": "Gemma2ForCausalLM", "cohere": "CohereForCausalLM"}[how]
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**sizes, **extra.get(how, {}))).eval()
    if how == "hook":
        model = llama()
        model.lm_head.register_forward_hook(double)
        return model
    model = llama()
    cls = type(model)

    def forward(self, *args, **kwargs):
        output = cls.forward(self, *args, **kwargs)
        if how == "in place":
            output.logits.mul_(3.0)
        elif how == "needs all":
            output.logits[..., 66] = -5.0
        else:
            output.logits = output.logits[:, -1:]
        return output

    model.__class__ = type("Changed", (cls,), {"forward": forward})
    return model


def double(module, args, output):
    return 2 * output


@pytest.mark.parametrize("how", ["granite", "gemma2", "cohere", "hook", "in place", "needs all", "cut"])
def test_logits_that_the_model_changes(how):
    apply, params, frozen, _ = adapted_model(changed(how))
    ids = tokens()
    whole = apply(params, frozen, input_ids=ids).logits[..., TOKENS]
    for _ in range(2):
        assert torch.equal(token_logits(apply, params, frozen, TOKENS, input_ids=ids), whole)
    again = copy.deepcopy(apply)  # not yet examined
    with torch.inference_mode():
        assert_close(token_logits(again, params, frozen, TOKENS, input_ids=ids), whole)
    with pytest.raises(ValueError, match=r"logits of a \w+ are not the output of its head.*use the logits of"):
        hidden_states(apply, params, frozen, input_ids=ids)
    assert torch.equal(apply(params, frozen, input_ids=ids).logits[..., TOKENS], whole)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_inference_mode_changes_nothing():
    apply, params, frozen, _ = adapted_model(llama())
    ids = tokens()
    right = hidden_states(apply, params, frozen, input_ids=ids).detach()
    with torch.inference_mode():
        assert_close(hidden_states(apply, params, frozen, input_ids=ids), right)
        mapped = torch.func.vmap(lambda ids: hidden_states(apply, params, frozen, input_ids=ids))
        assert_close(mapped(ids[:, None])[:, 0], right)
    hidden, head = hidden_and_head(apply, params, frozen, input_ids=ids)
    assert torch.equal(hidden, right)
    assert head.shape == (67, 64)


def test_a_model_that_changes_its_logits_runs_once_a_call():
    model = changed("in place")
    runs = []
    model.model.embed_tokens.register_forward_hook(lambda *_: runs.append(1))
    apply, params, frozen, _ = adapted_model(model)
    for _ in range(3):
        token_logits(apply, params, frozen, TOKENS, input_ids=tokens())
    assert len(runs) == 4


def test_dropout_of_the_base_is_drawn_once():
    model = changed("in place").train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    apply, params, frozen, _ = adapted_model(model)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(token_logits(apply, params, frozen, TOKENS, input_ids=tokens()))
    torch.manual_seed(0)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], apply(params, frozen, input_ids=tokens()).logits[..., TOKENS])


def test_errors_of_the_model_are_its_own():
    apply, params, frozen, _ = adapted_model(llama())
    with pytest.raises(IndexError):
        token_logits(apply, params, frozen, TOKENS, input_ids=torch.full((1, 3), 1000))


def test_no_output_head():
    apply, params, frozen, _ = vf.adapt(nn.Sequential(nn.Linear(4, 4)), vf.VeraConfig(r=2, target_modules=["0"]))
    for call in (hidden_states, lambda *args: head_logits(*args, TOKENS)):
        with pytest.raises(ValueError, match=r"a Sequential has no output head: get_output_embeddings\(\)"):
            call(apply, params, frozen, torch.ones(2, 4))


@pytest.mark.parametrize("case", ["plain", "nf4", "tied", "trained head", "adapted head"])
def test_one_position_of_many_rows_copies_no_weight(case):
    """As `logits_to_keep=1` and `generate` ask for it: transformers gives the head a strided (b, 1, width)."""
    make, options = CASES[case]
    apply, params, frozen, _ = adapted_model(make(), **options)
    ids, head = tokens(11, 3), 67 * 64
    with torch.no_grad(), LargestTensor() as largest:
        last = apply(params, frozen, input_ids=ids, logits_to_keep=1).logits
    assert largest.numel < 2 * head
    assert_close(last[:, 0], apply(params, frozen, input_ids=ids).logits[:, -1].detach())
    with torch.no_grad(), LargestTensor() as largest:
        apply.generate(params, frozen, ids, max_new_tokens=1, do_sample=False)
    assert largest.numel < 2 * head


def test_only_the_tokens_asked_for_are_multiplied():
    apply, params, frozen, _ = adapted_model(llama())
    calls = {}

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                calls[out.shape[-1:]] = True
            return out

    with torch.no_grad(), Products():
        token_logits(apply, params, frozen, TOKENS, input_ids=tokens())
    assert (3,) in calls
    assert (67,) not in calls


def test_a_copy_and_a_pickle(tmp_path):
    import pickle

    apply, params, frozen, _ = adapted_model(llama())
    right = token_logits(apply, params, frozen, TOKENS, input_ids=tokens())
    for again in (copy.deepcopy(apply), pickle.loads(pickle.dumps(apply))):
        assert torch.equal(token_logits(again, params, frozen, TOKENS, input_ids=tokens()), right)
