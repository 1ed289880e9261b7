"""Models quantized and dequantized as a whole: which layers, and copies that share what stays as it is."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close
from transformers import BitsAndBytesConfig

import vera_func as vf
from vera_func.model.convert import quantize_model

from helpers import IDS, IN, OUT, llama, make_adapted, quantized, snapshot
from refused import QMODEL, Refused, small_model


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
def test_quantize_model_is_a_copy_that_shares_the_rest(quant):
    model = llama()
    before = snapshot(model)
    new = quantize_model(model, quant)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert new.lm_head.weight is model.lm_head.weight
    assert new.model.embed_tokens.weight is model.model.embed_tokens.weight
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    for name in names:
        q, _ = vf.from_bnb(new.get_submodule(name))
        weight = model.get_submodule(name).weight.detach()
        expected = vf.quantize_8bit(weight) if quant == "int8" else vf.quantize_4bit(weight, quant)
        assert_close(vf.dequantize(q), vf.dequantize(expected))


@pytest.mark.parametrize("base", ["nf4", "nested", "int8"])
def test_dequantized_model(base):
    """The same numbers without dequantizing: outputs and gradients, bit for bit; the model stays as it was."""
    model, adapted = make_adapted("llama", base)
    before = snapshot(model)
    dense = vf.dequantize_model(model, torch.float32)
    again = vf.adapt(dense, adapted.config)

    def loss(params, apply):
        return apply(params, adapted.frozen, input_ids=IDS).logits.square().mean()

    for apply in (again.apply, adapted.apply):
        value = loss(adapted.params, apply)
        grads = torch.func.grad(loss)(adapted.params, apply)
        if apply is again.apply:
            expected = value, grads
    assert_close((value, grads), expected, rtol=0, atol=0)
    assert_close(snapshot(model), before, rtol=0, atol=0)
    assert not any(hasattr(module.weight, "quant_state") for module in dense.modules() if hasattr(module, "weight"))
    assert dense.lm_head.weight is model.lm_head.weight
    assert not hasattr(dense.config, "quantization_config")


SIZES = {"vocab_size": 67, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
BART = {
    **{"vocab_size": 67, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64},
    **{"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
T5 = {"vocab_size": 67, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
LABELS = {"num_labels": 3, "pad_token_id": 0}
# Class -> options, and the layers that have to stay dense.
HEADS = {
    "LlamaForCausalLM": (SIZES, {"lm_head"}),
    "GPTNeoXForCausalLM": (SIZES, {"embed_out", "lm_head"}),  # renamed within transformers 5
    "BertForMaskedLM": (SIZES, {"cls.predictions.decoder"}),
    "WhisperForConditionalGeneration": (WHISPER, {"proj_out"}),
    "BartForConditionalGeneration": (BART, {"lm_head"}),
    "T5ForConditionalGeneration": (T5, {"lm_head"}),
    "LlamaForSequenceClassification": (SIZES | LABELS, {"score"}),
    "BertForSequenceClassification": (SIZES | LABELS, {"classifier"}),
    "LlamaForTokenClassification": (SIZES | LABELS, {"score", "classifier"}),
    "BertForQuestionAnswering": (SIZES, {"qa_outputs"}),
    "RobertaForSequenceClassification": (SIZES | LABELS, {"classifier.dense", "classifier.out_proj"}),
    "CLIPModel": ({}, set()),
}


def make(name):
    options, _ = HEADS[name]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    config = model_class.config_class(**options)
    if name == "CLIPModel":
        small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = model_class.config_class(
            text_config=small | {"vocab_size": 67}, vision_config=small | {"image_size": 8, "patch_size": 4},
            projection_dim=64,
        )  # fmt: skip
    return model_class(config).eval()


def dense_layers(model):
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


class TestHeads:
    @pytest.mark.parametrize("name", HEADS)
    def test_what_transformers_leaves_dense_stays_dense(self, name, tmp_path):
        model = make(name)
        model.save_pretrained(tmp_path)
        theirs = type(model).from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
        )
        dense = dense_layers(vf.quantize_model(model, "nf4"))
        assert dense_layers(theirs) <= dense
        _, heads = HEADS[name]
        assert dense - dense_layers(theirs) <= heads
        assert heads & dense_layers(model) <= dense

    def test_tied_weights_stay_dense_and_tied(self):
        for name in ("BertForMaskedLM", "WhisperForConditionalGeneration", "BartForConditionalGeneration"):
            model = make(name)
            new = vf.quantize_model(model, "nf4")
            assert new.get_output_embeddings().weight is new.get_input_embeddings().weight
            assert new.get_output_embeddings().weight is model.get_output_embeddings().weight

    @pytest.mark.parametrize("skip", [None, ["q_proj", "lm_head"]], ids=str)
    @pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
    def test_is_saved_and_read_back(self, quant, skip, tmp_path):
        model = make("LlamaForCausalLM")
        new = vf.quantize_model(model, quant, skip)
        new.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert dense_layers(again) == dense_layers(new)
        for name, module in new.named_modules():
            if isinstance(module, nn.Linear) and name not in dense_layers(new):
                weights = [vf.dequantize(vf.from_bnb(each)[0]) for each in (module, again.get_submodule(name))]
                assert torch.equal(*weights)
        assert not hasattr(model.config, "quantization_config")

    def test_a_skip_list_replaces_the_rule(self):
        model = make("BertForMaskedLM")
        new = vf.quantize_model(model, "nf4", skip=["query"])
        assert dense_layers(new) == {"bert.encoder.layer.0.attention.self.query"}
        assert not new.config.tie_word_embeddings
        assert model.config.tie_word_embeddings

    @pytest.mark.parametrize("quant", ["nf4", "int8"])
    @pytest.mark.parametrize(
        ("name", "task", "head"),
        [
            ("LlamaForSequenceClassification", "SEQ_CLS", "score"),
            ("BertForSequenceClassification", "SEQ_CLS", "classifier"),
            ("BertForQuestionAnswering", "QUESTION_ANS", "qa_outputs"),
        ],
    )
    def test_a_quantized_head_cannot_be_trained(self, name, task, head, quant):
        config = vf.VeraConfig(r=4, task_type=task)
        model = make(name)
        with pytest.raises(ValueError, match=rf"'{head}.weight'.*quantized.*skip=\['{head}'\]"):
            vf.adapt(vf.quantize_model(model, quant, skip=["nothing"]), config)
        params = vf.adapt(vf.quantize_model(model, quant), config).params
        assert torch.equal(params[f"{head}.weight"], model.get_submodule(head).weight)
        assert f"{head}.weight" in vf.adapt(vf.quantize_model(model, quant, skip=[head]), config).params

    def test_a_head_in_another_storage(self):
        """Bytes that are viewed as bfloat16 look like a weight that could be trained."""
        model = make("LlamaForSequenceClassification")
        model.score = vf.to_bnb(vf.quantize_4bit(model.score.weight.data, quant_storage=torch.bfloat16))
        with pytest.raises(ValueError, match=r"'score.weight'.*quantized"):
            vf.adapt(model, vf.VeraConfig(r=4, task_type="SEQ_CLS"))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.out = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64, bias=False)
        self.out.weight = self.embed.weight
        self.again = self.body

    def forward(self, x):
        return self.out(self.again(self.body(self.embed(x))))


class TestPlainModules:
    def test_a_bare_layer(self):
        layer = nn.Linear(64, 32)
        q, bias = vf.from_bnb(vf.quantize_model(layer, "nf4"))
        assert torch.equal(q.packed, vf.quantize_4bit(layer.weight.detach()).packed)
        assert torch.equal(bias, layer.bias)

    def test_ties_and_shared_modules(self):
        model = Tied()
        new = vf.quantize_model(model, "int8")
        assert new.out.weight is new.embed.weight is model.embed.weight
        assert hasattr(new.body, "state")
        assert new.again is new.body
        assert dense_layers(new) == {"out"}

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
    def test_the_mode_is_that_of_the_layer_replaced(self, quant, training):
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)).train(training)
        model[0].train(not training)
        new = vf.quantize_model(model, quant)
        assert [module.training for module in new.modules()] == [training, not training, training]
        again = vf.dequantize_model(new)
        assert [module.training for module in again.modules()] == [training, not training, training]

    def test_attention_reads_its_weights(self):
        """`nn.MultiheadAttention` never calls its output layer, and in eval mode nobody calls the others."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
        new = vf.quantize_model(layer, "nf4")
        assert type(new.self_attn.out_proj) is type(layer.self_attn.out_proj)
        x = torch.randn(2, 3, 64)
        with torch.no_grad():
            expected = vf.dequantize_model(new, torch.float32)(x)
            assert (new.train(False)(x) - expected).norm() < 0.02 * expected.norm()
            assert (expected - layer(x)).norm() > 1e-3 * expected.norm()

    def test_a_subclass_with_arithmetic_of_its_own(self):
        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        class Written(nn.Linear):
            def forward(self, x):
                return x @ self.weight.T + self.bias

        class Routed(nn.Linear):
            def forward(self, x, experts):
                return super().forward(x)[experts]

        model = nn.Sequential(Doubled(64, 64), Written(64, 64), Routed(64, 64), nn.Linear(64, 64))
        new = vf.quantize_model(model, "int8")
        assert [hasattr(layer, "state") for layer in new] == [False, True, False, True]

    def test_computed_weights_stay(self):
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT)), nn.Linear(OUT, IN))
        new = vf.quantize_model(model, "int8")
        assert "original0" in dict(new[0].parametrizations.weight.named_parameters())

    def test_nothing_is_left(self):
        for model in (quantized(nn.Sequential(nn.Linear(IN, OUT)), "nf4"), nn.Sequential(nn.ReLU())):
            with pytest.raises(ValueError, match=r"no nn.Linear to quantize"):
                vf.quantize_model(model, "nf4")

    def test_other_formats(self):
        with pytest.raises(ValueError, match=r"'nf4', 'fp4', 'int8'.*got 'int4'"):
            vf.quantize_model(nn.Linear(IN, OUT), "int4")


EXPERTS = {
    "MixtralForCausalLM": SIZES | {"num_key_value_heads": 2, "num_local_experts": 8},
    "Qwen3MoeForCausalLM": SIZES | {"num_key_value_heads": 2, "num_experts": 8, "moe_intermediate_size": 64},
}


class TestFusedExperts:
    def test_a_parametrized_convolution_is_none(self, recwarn):
        convolution = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(64, 64, 3))  # as in wav2vec 2.0
        vf.quantize_model(nn.Sequential(nn.Linear(64, 64), convolution), "nf4")
        assert not recwarn.list

    @pytest.mark.parametrize("name", EXPERTS)
    def test_the_share_that_stays_dense_is_said(self, name):
        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**EXPERTS[name]))
        experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
        assert experts
        weights = sum(p.numel() for p in model.parameters())
        quantized = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith(("q_proj", "o_proj")))
        quantized += sum(m.weight.numel() for n, m in model.named_modules() if n.endswith(("k_proj", "v_proj")))
        said = (
            f"{100 - 100 * quantized / weights:.0f} % of the weights stay in float32: {100 * experts / weights:.0f} %"
        )
        with pytest.warns(UserWarning, match=rf"{said}.*experts.gate_up_proj"):
            new = vf.quantize_model(model, "nf4")
        new.model.layers[0].extra = nn.Linear(1, 1, bias=False)
        with pytest.warns(UserWarning, match=said):  # as much is quantized already
            vf.quantize_model(new, "nf4")

    @pytest.mark.parametrize(
        "model",
        [nn.Sequential(nn.Conv1d(64, 64, 3), nn.Linear(3, 3)), nn.Sequential(nn.LSTM(64, 64), nn.Linear(64, 64))],
        ids=["convolution", "recurrent"],
    )
    def test_nothing_is_said_of_others(self, model):
        vf.quantize_model(model, "int8")  # a warning is an error here

    def test_copies_leave_the_model_alone(self):
        model = make("LlamaForCausalLM")
        before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
        config = copy.deepcopy(model.config.to_dict())
        vf.quantize_model(model, "nf4", skip=["q_proj"])
        assert model.config.to_dict() == config
        assert all(p.data_ptr() == before[name][0] for name, p in model.named_parameters())


# What is refused

bad = Refused()

bad("dequantize_model", "a state dict", lambda _: vf.dequantize_model(QMODEL.state_dict()), "got OrderedDict")
bad("dequantize_model", "integers", lambda _: vf.dequantize_model(QMODEL, torch.int8), "got torch.int8")
bad(
    "quantize_model",
    "unknown format",
    lambda _: vf.quantize_model(small_model(), "int3"),
    "must be one of .*got 'int3'",
)
bad("quantize_model", "no linears", lambda _: vf.quantize_model(nn.Sequential(nn.ReLU()), "nf4"), "no nn.Linear")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
