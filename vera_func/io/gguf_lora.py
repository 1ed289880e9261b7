"""Write a LoRA as a GGUF adapter, the format of llama.cpp.

The converter of llama.cpp renames the layers of a model. For some architectures, the converter also permutes the rows
of the query and key weights. A rotary embedding rotates pairs of rows. The two rows of a pair are adjacent in
llama.cpp, and half a head apart in transformers. The rows of the LoRA factor B' (out, rank) must be permuted like the
rows of the weight. `ARCHITECTURES` lists the architectures whose row order is known and tested.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .files import replacing, written_by


# By `model.config.model_type`: the architecture in GGUF, and whether the rows of query and key are permuted.
ARCHITECTURES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False)}


def write_gguf(file: Path, factors: Mapping[str, tuple[Tensor, Tensor]], model: nn.Module) -> None:
    """Write the factors of a LoRA as a GGUF adapter, in float32 and with scale 1. The write is atomic.

    Args:
        file: The file to write. An existing file is replaced, and a missing folder is created.
        factors: The factors A' (rank, in) and B' (out, rank) of each layer, by module name.
        model: The base model, from transformers.

    Raises:
        ValueError: If the model's architecture is not supported, or a layer has no counterpart in llama.cpp.
        ModuleNotFoundError: If the package `gguf` is not installed.

    Reference:
        https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"GGUF export supports the model types {sorted(ARCHITECTURES)}, got {kind!r}: use format='peft', and "
            "convert the directory with llama.cpp's convert_lora_to_gguf.py."
        )
    architecture, permuted = ARCHITECTURES[kind]
    names = _names(factors, architecture, config)
    import gguf

    rank = next(iter(factors.values()))[0].shape[0]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads or config.num_attention_heads}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # llama.cpp scales by alpha / rank
        writer.add_description(f"VeRA adapter as a LoRA, written by {written_by()}")
        for name, (lora_A, lora_B) in factors.items():
            end = name.rpartition(".")[2]
            if permuted and end in heads:
                lora_B = permute_rows(lora_B, heads[end])
            for suffix, tensor in (("lora_a", lora_A), ("lora_b", lora_B)):
                writer.add_tensor(f"{names[name]}.{suffix}", tensor.detach().float().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def permute_rows(weight: Tensor, heads: int) -> Tensor:
    """Permute the rows of a query or key weight so that the two rows of a rotary pair are adjacent, as in llama.cpp.

    Args:
        weight: Weight of shape (heads * size, columns). In each head, rows i and i + size / 2 are a rotary pair.
        heads: Number of attention heads.

    Example:
        >>> import torch
        >>> permute_rows(torch.arange(8)[:, None], heads=2).flatten()
        tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _names(factors: Mapping[str, tuple[Tensor, Tensor]], architecture: str, config: Any) -> dict[str, str]:
    """Return the GGUF name of each layer's weight, by module name."""
    import gguf

    kind = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    names = {}
    for layer in factors:
        name = known.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"the layer {layer!r} has no counterpart in llama.cpp's architecture {architecture!r}.")
        if name == "output.weight" and getattr(config, "tie_word_embeddings", False):
            raise ValueError(f"the layer {layer!r} is tied to the embeddings, so llama.cpp has no such layer.")
        names[layer] = name
    return names
