"""Adapters in llama.cpp's format: names, the order of the rows, and llama.cpp's own logits where it is installed."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

import vera_func as vf
from vera_func.io.gguf_lora import ARCHITECTURES, permute_rows
from vera_func.io.lora import lora_factors

from helpers import gpt2, randomized, relative_error
from refused import CONFIGURATION, FROZEN, PARAMS, Refused, small_model


CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
IDS = torch.randint(3, 67, (11,), generator=torch.Generator().manual_seed(0))


def causal(kind, **changes):
    """A tiny model, with fewer heads of keys than of queries."""
    config = CONFIGS[kind](
        vocab_size=67, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, sliding_window=None, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # large enough that the order of rows matters
        parameter.data = 1 + 0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else parameter * 8
    return model


def make_adapted(kind, targets=TARGETS):
    model = causal(kind)
    adapted = vf.adapt(model, vf.VeraConfig(r=8, target_modules=targets))
    return model, adapted._replace(params=randomized(adapted.params, scale=1.0))


def read(file):
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}


def unpermuted(weight, heads):
    """Row by row: llama.cpp rotates rows 2i and 2i + 1 of a head together, transformers i and i + half."""
    size = len(weight) // heads
    rows = [h * size + 2 * (i % (size // 2)) + i // (size // 2) for h in range(heads) for i in range(size)]
    return weight[rows]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_file_holds_the_factors_in_the_order_of_llama_cpp(kind, tmp_path):
    model, adapted = make_adapted(kind)
    report = vf.export_lora(tmp_path / "out", *adapted[1:], model, format="gguf")
    assert report.path == tmp_path / "out" / "adapter.gguf"
    assert set(report.error.values()) == {0.0}
    fields, tensors = read(report.path)
    architecture, permuted = ARCHITECTURES[kind]
    assert (fields["general.architecture"], fields["general.type"]) == (architecture, "adapter")
    assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 8.0)
    factors, _ = lora_factors(adapted.params, adapted.frozen, model, 8)
    assert len(tensors) == 2 * len(factors) == 28
    ends = dict(
        zip(TARGETS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), strict=True)
    )
    for layer, (lora_A, lora_B) in factors.items():
        _, _, block, _, end = layer.split(".")
        name = f"blk.{block}.{ends[end]}.weight"
        stored = tensors[f"{name}.lora_b"]
        if permuted and end in ("q_proj", "k_proj"):
            assert not torch.equal(stored, lora_B)
            stored = unpermuted(stored, {"q_proj": 4, "k_proj": 2}[end])
        assert torch.equal(tensors[f"{name}.lora_a"], lora_A)
        assert torch.equal(stored, lora_B)


def test_a_smaller_rank_scales_by_one(tmp_path):
    model, adapted = make_adapted("llama", ["v_proj"])
    report = vf.export_lora(tmp_path / "x.gguf", *adapted[1:], model, rank=3, format="gguf")
    assert report.path == tmp_path / "x.gguf"
    fields, tensors = read(report.path)
    assert fields["adapter.lora.alpha"] == 3.0
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(3, 64), (32, 3)}
    assert all(error > 0 for error in report.error.values())


def write_base(model, file, kind):
    """The model as a GGUF file without a vocabulary, in float32, as llama.cpp's converter writes it."""
    architecture, permuted = ARCHITECTURES[kind]
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[-2]
        if permuted and layer in heads:
            tensor = permute_rows(tensor, heads[layer])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def logits_of_llama_cpp(base, adapter=None):
    llama_cpp = pytest.importorskip("llama_cpp")
    # ggml's type 0 is float32: keys and values are not rounded.
    options = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "type_k": 0, "type_v": 0, "flash_attn": False}
    model = llama_cpp.Llama(base, lora_path=adapter, verbose=False, **options)
    model.eval(IDS.tolist())
    return torch.from_numpy(np.array(model.scores[: len(IDS)]))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_llama_cpp_gives_our_logits(kind, tmp_path):
    pytest.importorskip("llama_cpp")
    model, adapted = make_adapted(kind)
    base = write_base(model, tmp_path / "base.gguf", kind)
    file = vf.export_lora(tmp_path / "adapter.gguf", *adapted[1:], model, format="gguf").path
    with torch.no_grad():
        plain = model(IDS[None]).logits[0]
        ours = adapted.apply(adapted.params, adapted.frozen, IDS[None]).logits[0]
    assert relative_error(logits_of_llama_cpp(base), plain) < 1e-3
    assert relative_error(plain, ours) > 0.1  # the adapter does something
    assert relative_error(logits_of_llama_cpp(base, str(file)), ours) < 1e-3


bad = Refused()


def export(folder, model, adapted, **options):
    return vf.export_lora(folder / "lora", *adapted[1:], model, **({"format": "gguf"} | options))


def with_fields(kind, targets, **fields):
    model = causal(kind) if kind in CONFIGS else gpt2()
    return model, vf.adapt(model, vf.VeraConfig(r=4, target_modules=targets, **fields))


def tied():
    model = causal("llama")
    model.config.tie_word_embeddings = True
    return model, vf.adapt(model, vf.VeraConfig(r=4, target_modules=["lm_head"]))


bad(
    "export_lora",
    "another format",
    lambda t: vf.export_lora(t, PARAMS, FROZEN, CONFIGURATION, small_model(), format="onnx"),
    "format must be 'peft' or 'gguf', got 'onnx'",
)
bad(
    "export_lora",
    "GPT-2 in GGUF",
    lambda t: export(t, *with_fields("gpt2", ["c_attn"])),
    r"\['llama', 'mistral', 'qwen2'\], got 'gpt2'",
)
bad(
    "export_lora",
    "no config in GGUF",
    lambda t: vf.export_lora(t / "lora", PARAMS, FROZEN, CONFIGURATION, small_model(), format="gguf"),
    "got None: use format=.peft.",
)
bad(
    "export_lora",
    "a head in GGUF",
    lambda t: export(t, *with_fields("llama", ["q_proj"], modules_to_save=["lm_head"])),
    "not support trained heads or biases, such as 'lm_head.weight'",
)
bad("export_lora", "a tied head in GGUF", lambda t: export(t, *tied()), "'lm_head' is tied to the embeddings")


@pytest.mark.parametrize("case", bad.rows)
def test_bad_input_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
