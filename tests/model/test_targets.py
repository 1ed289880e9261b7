"""Which modules a configuration means: PEFT's rules, and an error where PEFT ignores half of what was asked."""

import copy

import peft
import pytest
import torch
from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from torch import nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Llama4ForCausalLM,
    Llama4TextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import vera_func as vf
from vera_func import private
from vera_func.model.targets import DEFAULT_TARGETS, resolve, trained_with

from helpers import bert, gpt2, llama, quantized, randomized, tokens


def distilbert():
    config = DistilBertConfig(vocab_size=67, dim=64, hidden_dim=128, n_layers=2, n_heads=4, num_labels=3)
    return DistilBertForSequenceClassification(config)


def t5():
    config = T5Config(vocab_size=67, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def masked_bert():
    sizes = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    return BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4))


class Experts(nn.Module):
    """Two numbered levels: a layer's index, and that of an expert in it."""

    def __init__(self):
        super().__init__()
        layers = [nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])}) for _ in range(3)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(3, 3)})

    def forward(self, x):
        return self.model["head"](x)


def shared_bias():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].bias = model[0].bias
    return model


MODELS = {
    "llama": llama,
    "llama nf4": lambda: quantized(llama(), "nf4"),
    "llama int8": lambda: quantized(llama(), "int8"),
    "gpt2": gpt2,
    "bert": bert,
    "distilbert": distilbert,
    "t5": t5,
    "masked bert": masked_bert,
    "experts": Experts,
    "shared bias": shared_bias,
}
QV = ["q_proj", "v_proj"]
TARGETED = [
    ("llama", {"target_modules": QV}),
    ("llama", {"target_modules": frozenset(["q_proj"])}),  # one, so that its name has one order
    ("llama", {"target_modules": ["self_attn.q_proj"]}),
    ("llama", {"target_modules": ["model.layers.0.mlp.up_proj"]}),
    ("llama", {"target_modules": ["model.layers.0.mlp.up_proj", "k_proj"]}),
    ("llama", {"target_modules": ["lm_head"]}),
    ("llama nf4", {"target_modules": QV}),
    ("llama int8", {"target_modules": QV}),
    ("gpt2", {"target_modules": ["c_attn"]}),
    ("gpt2", {"target_modules": ["mlp.c_proj", "c_attn"]}),
    # A string is a regular expression for the whole name.
    ("llama", {"target_modules": r".*\.(q|k)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.1\..*_proj"}),
    ("llama", {"target_modules": "lm_head"}),
    ("llama", {"target_modules": r".*q_proj|.*\.1\..*v_proj"}),
    ("bert", {"target_modules": r".*\.(query|intermediate\.dense)"}),
    # All linear layers but the output embeddings, and but the head of a classifier.
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "All-Linear", "task_type": "CAUSAL_LM"}),
    ("llama nf4", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION"}),
    ("bert", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    ("t5", {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
    ("experts", {"target_modules": "all-linear"}),
    # Layers by index.
    ("llama", {"target_modules": QV, "layers_to_transform": 1}),
    ("llama", {"target_modules": QV, "layers_to_transform": 0}),
    ("llama", {"target_modules": QV, "layers_to_transform": [0, 1]}),
    ("llama", {"target_modules": QV, "layers_to_transform": [1, 7]}),
    ("llama", {"target_modules": QV, "layers_to_transform": []}),
    ("llama", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    ("llama", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": []}),
    ("llama", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": ""}),
    ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": "h"}),
    ("bert", {"target_modules": ["query"], "layers_to_transform": 1, "layers_pattern": "layer"}),
    ("t5", {"target_modules": ["q"], "layers_to_transform": [1]}),
    ("t5", {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    ("llama", {"target_modules": ["model.layers.0.mlp.up_proj", "k_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["k_proj", "lm_head"], "layers_to_transform": 1}),
    ("experts", {"target_modules": ["0", "1"], "layers_to_transform": [2]}),
    ("experts", {"target_modules": ["experts.1"], "layers_to_transform": [2]}),
    # What is trained whole is not adapted.
    ("llama", {"target_modules": QV, "modules_to_save": ["v_proj"]}),
    ("llama", {"target_modules": r".*\.(q|v)_proj", "modules_to_save": ["layers.0"]}),
    ("llama", {"target_modules": QV, "modules_to_save": ["self_attn.v_proj", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    # The usual layers of the model's type.
    ("llama", {}),
    ("gpt2", {}),
    ("bert", {}),
    ("t5", {}),
    ("llama", {"layers_to_transform": [1]}),
]
# What is trained beside the vectors.
TRAINED = [
    *((model, {"bias": bias}) for model in ("llama", "gpt2", "bert") for bias in ("all", "vera_only", "lora_only")),
    ("masked bert", {"bias": "all"}),  # one of its biases has two names
    ("shared bias", {"target_modules": ["0"], "bias": "vera_only"}),
    ("shared bias", {"target_modules": ["2"], "bias": "vera_only"}),  # of which the first layer is not adapted
    ("shared bias", {"target_modules": ["2"], "bias": "all"}),
    ("bert", {"task_type": "SEQ_CLS"}),
    ("bert", {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "pooler"]}),
    ("bert", {"task_type": "TOKEN_CLS", "bias": "all"}),
    ("bert", {"task_type": "SEQ_CLS", "bias": "vera_only"}),
    ("bert", {"modules_to_save": ["LayerNorm"]}),
    ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    ("llama", {"modules_to_save": ["layers.1.mlp"]}),
    ("llama nf4", {"modules_to_save": ["lm_head"]}),
    # Two names of one weight; PEFT trains a copy for the one that was named.
    ("gpt2", {"modules_to_save": ["lm_head"]}),
    ("gpt2", {"modules_to_save": ["wte"]}),
    ("t5", {"modules_to_save": ["shared"]}),
]


# PEFT has no way to keep two copies equal, and says so.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(("model", "fields"), [*TARGETED, *TRAINED], ids=str)
def test_means_what_it_means_to_peft(model, fields):
    theirs = peft.get_peft_model(MODELS[model](), peft.VeraConfig(r=2, fan_in_fan_out=model == "gpt2", **fields))
    ours = MODELS[model]()
    names, config = resolve(ours, vf.VeraConfig(r=2, **fields))
    assert names == [name for name, _ in ours.named_modules() if name in theirs.base_model.targeted_module_names]
    assert len(names) == len(theirs.base_model.targeted_module_names)

    trained = set()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad and "vera_lambda" not in name:
            for part in ("base_model.model.", ".default", ".base_layer", ".modules_to_save", ".original_module"):
                name = name.replace(part, "", 1)
            trained.add(name)
    assert set(trained_with(ours, config, names)) == trained


def test_default_targets_are_those_of_peft():
    theirs = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
    assert {k: v if isinstance(v, str) else set(v) for k, v in DEFAULT_TARGETS.items()} == {
        k: v if isinstance(v, str) else set(v) for k, v in theirs.items()
    }


@pytest.mark.parametrize("fields", [{}, {"target_modules": "all-linear", "layers_to_transform": [1]}], ids=str)
def test_resolved_targets_are_spelled_out(fields):
    names, config = resolve(llama(), vf.VeraConfig(**fields))
    assert not isinstance(config.target_modules, str)
    # So that the file means the same modules, here and in PEFT, without the model's type.
    theirs = peft.VeraConfig(r=2, target_modules=list(config.target_modules))
    assert set(names) == set(peft.get_peft_model(llama(), theirs).base_model.targeted_module_names)


@pytest.mark.parametrize("fields", [{}, {"layers_pattern": "layers"}], ids=str)
def test_layers_at_the_root_mean_the_same_to_peft(fields):
    model = llama().model  # names such as "layers.1.self_attn.q_proj"
    config = vf.VeraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], **fields)
    names, config = resolve(model, config)
    assert names == ["layers.1.self_attn.q_proj"]
    fields = {name: getattr(config, name) for name in ("layers_to_transform", "layers_pattern")}
    theirs = peft.VeraConfig(r=2, target_modules=list(config.target_modules), **fields)
    assert peft.get_peft_model(llama().model, theirs).base_model.targeted_module_names == names


def test_all_linear_obeys_the_layers():
    # PEFT adapts all layers, and says nothing.
    fields = {"target_modules": "all-linear", "layers_to_transform": [1]}
    names, _ = resolve(llama(), vf.VeraConfig(**fields))
    assert len(names) == 7
    assert all(".1." in name for name in names)
    theirs = peft.get_peft_model(llama(), peft.VeraConfig(r=2, **fields))
    assert len(theirs.base_model.targeted_module_names) == 14


class Ambiguous(nn.Module):
    """The full name of one layer is how the names of others end: a convolution, and the output head."""

    def __init__(self):
        super().__init__()
        self.proj, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.block = nn.ModuleDict({"proj": nn.Conv1d(6, 6, 1), "out": nn.Linear(6, 6)})

    def get_output_embeddings(self):
        return self.block["out"]

    def forward(self, x):
        return self.block["out"](self.out(self.block["proj"](self.proj(x)[..., None])[..., 0]))


def test_names_in_which_other_names_end(tmp_path):
    model, x = Ambiguous(), torch.ones(2, 6)
    adapted = vf.adapt(model, vf.VeraConfig(r=2, target_modules="all-linear"))
    params = randomized(adapted.params)
    assert adapted.apply.targets == ("proj", "out")
    vf.save_adapter(tmp_path / "vera", params, adapted.frozen, adapted.config)
    loaded = vf.load_adapter(tmp_path / "vera", model)
    expected = adapted.apply(params, adapted.frozen, x)
    assert torch.equal(loaded.apply(loaded.params, loaded.frozen, x), expected)
    theirs = peft.PeftModel.from_pretrained(Ambiguous(), tmp_path / "vera")
    assert set(theirs.base_model.targeted_module_names) == {"proj", "out"}
    # In a LoRA directory as well.
    vf.export_lora(tmp_path / "lora", params, adapted.frozen, adapted.config, model)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora")
    assert set(theirs.base_model.targeted_module_names) == {"proj", "out"}
    assert_close(theirs(x), expected)
    pool = vf.pool_adapters([adapted._replace(params=params), adapted])
    assert resolve(model, pool.config)[0] == ["proj", "out"]


def test_a_layer_without_a_weight_yet():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="'0' has no weight yet: run the model once"):
        vf.adapt(model, vf.VeraConfig(r=2, target_modules="all-linear"))


def test_a_trained_parameter_with_the_name_of_a_vector():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.magnitude = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.magnitude

    model = nn.Sequential(nn.Linear(3, 3), Scale())
    assert vf.adapt(model, vf.VeraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"modules_to_save trains '1\.magnitude', which is named .* rename"):
        vf.adapt(model, vf.VeraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))


def test_a_name_to_save_begins_at_a_dot():
    # PEFT would train `pre_classifier`, too, because its name ends in "classifier".
    model = distilbert()
    names, config = resolve(model, vf.VeraConfig(target_modules=["q_lin"], task_type="SEQ_CLS"))
    assert trained_with(model, config, names) == ["classifier.weight", "classifier.bias"]


def test_a_bare_linear_layer_is_a_model():
    model = nn.Linear(3, 5)
    assert resolve(model, vf.VeraConfig(target_modules=".*"))[0] == [""]
    assert list(vf.adapt(model, vf.VeraConfig(r=2, target_modules=".*")).params) == ["lambda_b", "lambda_d"]


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("llama", {"target_modules": ["query"]}, r"no module matches target_modules=\('query',\).*'q_proj'"),
        ("llama", {"target_modules": ["proj"]}, "no module matches"),  # an ending begins at a dot
        ("llama", {"target_modules": "q_proj"}, "no module matches target_modules='q_proj'"),  # an expression is whole
        ("llama", {"target_modules": r".*\.q_pro"}, "no module matches"),
        ("llama", {"target_modules": QV, "layers_to_transform": 7}, "no module matches"),
        ("llama", {"target_modules": QV, "layers_to_transform": 1, "layers_pattern": "h"}, "no module matches"),
        ("llama", {"target_modules": QV, "modules_to_save": ["self_attn"]}, "no module matches"),
        # PEFT takes these and passes over what it can't use.
        ("llama", {"target_modules": [*QV, "query"]}, r"target_modules has \['query'\], but no module"),
        ("llama", {"target_modules": QV, "modules_to_save": ["score"]}, r"modules_to_save has \['score'\], but no"),
        ("llama", {"modules_to_save": ["score"]}, r"modules_to_save has \['score'\], but no"),
        (
            "llama",
            {"target_modules": ["embed_tokens"]},
            "'model.embed_tokens' is a Embedding; only nn.Linear, bitsandbytes'",
        ),
        ("llama", {"target_modules": r".*self_attn"}, "'model.layers.0.self_attn' is a LlamaAttention"),
        ("experts", {}, "no default target_modules are known for model type None.*all-linear"),
    ],
)
def test_what_no_module_answers_to(model, fields, message):
    with pytest.raises(ValueError, match=message):
        resolve(MODELS[model](), vf.VeraConfig(**fields))


def test_layers_of_to_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module = vf.to_module(vf.adapt(model, vf.VeraConfig(r=2, target_modules=["0"])))
    assert resolve(module, vf.VeraConfig(target_modules=["1"]))[0] == ["1"]
    with pytest.raises(
        ValueError, match=r"target module '0' is a layer of a model from to_module.*pass the base model"
    ):
        resolve(module, vf.VeraConfig(target_modules=["0"]))


def test_idle_entries_of_a_file_are_let_pass():
    fields = {"target_modules": ["q_proj", "query"], "modules_to_save": ["score"]}
    names, _ = resolve(llama(), vf.VeraConfig(**fields), strict=False)
    assert len(names) == 2


def test_a_layer_that_returns_a_tuple():
    """All linear layers of Llama 4 but its routers, which return scores and logits."""
    sizes = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Llama4TextConfig(**sizes, **heads, intermediate_size_mlp=64, num_local_experts=2)
    model = Llama4ForCausalLM(config).eval()
    apply, params, frozen, config = vf.adapt(model, vf.VeraConfig(r=2, target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in config.target_modules} >= {"q_proj", "up_proj"}
    assert torch.equal(apply(params, frozen, input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    with pytest.raises(ValueError, match=r"'.*\.router' is a Llama4Router, which does not return a tensor"):
        vf.adapt(model, vf.VeraConfig(r=2, target_modules=["q_proj", "router"]))


def test_a_quantized_module_cannot_be_trained_whole():
    model = quantized(llama(), "nf4")
    config = vf.VeraConfig(target_modules=QV, modules_to_save=["o_proj"])
    with pytest.raises(ValueError, match=r"modules_to_save trains '.*o_proj\.weight', but it is quantized"):
        vf.adapt(model, config)


def test_layers_on_several_devices():
    # Tensors without data stand for those of two GPUs.
    with private.fake_tensors():
        model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
        for layer, device in ((model[0], "cuda:0"), (model[2], "cuda:1")):
            for name, parameter in [*layer.named_parameters()]:
                setattr(layer, name, nn.Parameter(parameter.detach().to(device)))
        message = r"must be on one device, but are on cuda:0 \(0\), cuda:1 \(2\). Load the model onto one"
        for fields in ({"target_modules": ["0", "2"]}, {"target_modules": ["0"], "modules_to_save": ["2"]}):
            with pytest.raises(ValueError, match=message):
                vf.adapt(model, vf.VeraConfig(r=4, **fields))
        # A layer without an adapter may be elsewhere.
        assert vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0"])).apply.targets == ("0",)
