"""What a merged model's configuration says of its weights: which are tied, and which layers are quantized."""

import copy
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import vera_func as vf

from helpers import randomized, relative_error


# Ties

IDS = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 67, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
BART = {
    **{"vocab_size": 67, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64},
    **{"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
T5 = {
    **{"vocab_size": 67, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    **{"decoder_start_token_id": 0, "pad_token_id": 0},
}
# Class -> options, what is adapted, the head, an embedding that it is tied to.
MODELS = {
    "LlamaForCausalLM": (SIZES | {"tie_word_embeddings": True}, "q_proj", "lm_head", "embed_tokens"),
    "GPT2LMHeadModel": ({"vocab_size": 67, "n_embd": 64, "n_layer": 1, "n_head": 4}, "c_attn", "lm_head", "wte"),
    "BertForMaskedLM": (SIZES, "query", "cls.predictions.decoder", "word_embeddings"),
    "BartForConditionalGeneration": (BART, "q_proj", "lm_head", "shared"),
    "T5ForConditionalGeneration": (T5, "q", "lm_head", "shared"),
    "UMT5ForConditionalGeneration": (T5, "q", "lm_head", "decoder.embed_tokens"),
}
# In T5's family `tie_word_embeddings` also says that the outputs are scaled.
KEEP_THE_FLAG = ("T5", "UMT5")
CASES = [
    *((name, what) for name in ("Llama", "Bart", "T5") for what in ("head", "embedding", "both", "adapted head")),
    *((name, what) for name in ("GPT2", "Bert", "UMT5") for what in ("head", "adapted head")),
]


def make(name):
    options, target, head, embedding = MODELS[name]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options)).eval()
    assert model.get_submodule(head).weight is model.get_input_embeddings().weight
    return model, target, head, embedding


def logits_of(model):
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def by_hand(model, params, frozen):
    """The oracle in float64: every place that is trained or adapted has a weight of its own."""
    model = copy.deepcopy(model).double()
    for key, value in params.items():
        name, _, leaf = key.rpartition(".")
        module = model.get_submodule(name)
        if leaf == "lambda_b":
            conv = isinstance(module, transformers.pytorch_utils.Conv1D)
            out_features, in_features = module.weight.shape[::-1] if conv else module.weight.shape
            A, B = frozen["vera_A"].double()[:, :in_features], frozen["vera_B"].double()[:out_features]
            delta = value.double()[:, None] * B @ (params[f"{name}.lambda_d"].double()[:, None] * A)
            module.weight = nn.Parameter(module.weight.detach() + (delta.T if conv else delta))
        elif leaf != "lambda_d":
            setattr(module, leaf, nn.Parameter(value.double()))
    return model


@pytest.mark.parametrize(("name", "what"), CASES)
def test_each_place_gets_its_own(name, what, tmp_path):
    name = next(full for full in MODELS if full.startswith(name))
    model, target, head, embedding = make(name)
    saved = {"head": [head], "embedding": [embedding], "both": [head, embedding]}.get(what)
    targets = [target, head] if what == "adapted head" else [target]
    adapted = vf.adapt(model, vf.VeraConfig(r=5, target_modules=targets, modules_to_save=saved))
    params, frozen = randomized(adapted.params, scale=0.3), adapted.frozen
    expected = logits_of(by_hand(model, params, frozen))
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        assert relative_error(adapted.apply(params, frozen, input_ids=IDS, **inputs).logits, expected) < 1e-5
    merged = vf.merge(model, params, frozen)
    assert relative_error(logits_of(merged), expected) < 1e-5
    assert merged.config.tie_word_embeddings == name.startswith(KEEP_THE_FLAG)
    merged.save_pretrained(tmp_path)
    assert relative_error(logits_of(type(model).from_pretrained(tmp_path).eval()), expected) < 1e-5
    merged.tie_weights()  # what transformers calls after it resizes embeddings
    if not name.startswith(KEEP_THE_FLAG):
        assert relative_error(logits_of(merged), expected) < 1e-5
    assert model.get_submodule(head).weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_equal_values_stay_tied(saved):
    model, target, *_ = make("LlamaForCausalLM")
    adapted = vf.adapt(model, vf.VeraConfig(r=5, target_modules=[target], modules_to_save=saved))
    merged = vf.merge(model, adapted.params, adapted.frozen)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings


@pytest.mark.parametrize("to", [torch.bfloat16, "nf4", "int8"])
def test_a_trained_head_in_another_format(to, tmp_path):
    model, target, *_ = make("LlamaForCausalLM")
    adapted = vf.adapt(model, vf.VeraConfig(r=5, target_modules=[target], modules_to_save=["lm_head"]))
    params = randomized(adapted.params)
    merged = vf.merge(model, params, adapted.frozen, to)
    dtype = to if isinstance(to, torch.dtype) else torch.float32
    assert torch.equal(merged.lm_head.weight, params["lm_head.weight"].to(dtype))
    assert torch.equal(merged.model.embed_tokens.weight, model.lm_head.weight.to(dtype))
    merged.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, merged.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, merged.model.embed_tokens.weight)


def test_a_model_that_was_untied_stays():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    adapted = vf.adapt(model, vf.VeraConfig(r=5, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    params = randomized(adapted.params)
    merged = vf.merge(model, params, adapted.frozen)
    assert torch.equal(merged.lm_head.weight, params["lm_head.weight"])
    assert merged.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


# The skip list


class Config(PreTrainedConfig):
    model_type = "skip list"


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.q_proj, self.out_proj, self.proj = (nn.Linear(64, 64) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(64, 64) for _ in range(11))
        self.proj_in = nn.Linear(64, 64)
        self.post_init()

    def forward(self, x):
        x = self.out_proj(torch.tanh(self.q_proj(self.proj_in(x))))
        return self.proj(torch.tanh(sum(head(x) for head in self.heads)))


def skipped_in_5_0(name, patterns):
    """transformers 5.0 matches beginnings wherever they end; later versions at a dot."""
    return any(re.match(f"{key}\\.", name) or re.match(key, name) or name.endswith(key) for key in patterns)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("dense", "entries"),
    [
        (["proj"], [r"^proj$"]),
        (["heads.1"], [r"^heads\.1$"]),
        (["heads.3"], ["heads.3"]),
        (["proj", "heads.10", "out_proj"], [r"^proj$", "out_proj", "heads.10"]),
        (["proj", "q_proj", "out_proj", "proj_in"], ["q_proj", "out_proj", "proj", "proj_in"]),
    ],
    ids=str,
)
def test_a_merged_model_loads_again(dense, entries, quant, tmp_path):
    torch.manual_seed(0)
    plain = Model(Config()).eval()
    base = vf.quantize_model(plain, quant, skip=["nothing"])
    for name in dense:
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, plain.get_submodule(name))
    adapted = vf.adapt(base, vf.VeraConfig(r=8, target_modules=["q_proj"]))
    merged = vf.merge(base, randomized(adapted.params), adapted.frozen)
    written = merged.config.quantization_config.llm_int8_skip_modules
    assert sorted(written) == sorted(entries)
    names = [name for name, module in merged.named_modules() if isinstance(module, nn.Linear)]
    assert [name for name in names if skipped_in_5_0(name, written)] == [name for name in names if name in dense]
    merged.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    for name in names:
        assert type(again.get_submodule(name)) is type(merged.get_submodule(name)), name
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert relative_error(again.train()(x), merged.train()(x)) < 1e-6  # the dense product, no repacking


def test_distilbert(tmp_path):
    """A dense classifier beside a quantized pre_classifier."""
    sizes = {"vocab_size": 67, "dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 4, "num_labels": 3}
    torch.manual_seed(0)
    model = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes)).eval()
    base = vf.quantize_model(model, "nf4", skip=["classifier"])
    adapted = vf.adapt(base, vf.VeraConfig(r=8, target_modules=["q_lin"], task_type="SEQ_CLS"))
    params = randomized(adapted.params)
    vf.merge(base, params, adapted.frozen).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.classifier.weight, params["classifier.weight"])
    assert hasattr(again.pre_classifier.weight, "quant_state")
