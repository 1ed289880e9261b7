"""Save a quantized model as one file, and load it without quantizing again.

The file contains every parameter and buffer of the model, so the file can be loaded into a model on the meta device:

    save_quantized("model.safetensors", model)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    model = load_quantized("model.safetensors", skeleton)

The format is safetensors. A quantized weight is stored as several tensors, such as `{layer}.packed` and
`{layer}.absmax`; other parameters and buffers are stored under their names. The metadata contains two JSON
objects: the static fields of each quantized weight, such as its block size, and the additional names of tied
parameters.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import private
from ..core.keys import join_key
from ..core.shapes import require_finite
from ..model.describe import describe_quantization, describe_ties
from ..model.linears import linear_sizes
from ..model.tree import copy_tree, require_weights, unwrap
from ..quant.bnb import from_bnb, is_bnb_linear, to_bnb
from ..quant.value import Quantized, Spec4bit, Spec8bit, flatten, shape2, unflatten, validate
from .files import map_safetensors, parse_json, replacing, sort_metadata, unshared


FORMAT = "vera_func quantized model 1"
_FIELDS_4BIT = ("packed", "absmax", "nested.scale", "nested.code", "nested.offset")
_FIELDS_8BIT = ("codes", "scale")
Model = TypeVar("Model", bound=nn.Module)


def save_quantized(path: str | os.PathLike[str], model: nn.Module) -> Path:
    """Write all parameters and buffers of a quantized model as one safetensors file, atomically.

    Non-persistent buffers are included. The file does not contain the configuration or the tokenizer of a transformers
    model: call `model.config.save_pretrained` and `tokenizer.save_pretrained`.

    Args:
        path: The file to write. An existing file is replaced.
        model: A model with bitsandbytes layers, as from `quantize_model`.

    Returns:
        The path.

    Raises:
        ValueError: If the model has no quantized layer, or if weights are offloaded.
        OSError: If the file can't be written. An existing file is then kept.

    Example:
        >>> import tempfile
        >>> from vera_func import quantize_model
        >>> model = quantize_model(nn.Sequential(nn.Linear(64, 32)), "nf4")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save_quantized(f"{folder}/model.safetensors", model)
        ...     load_quantized(file, nn.Sequential(nn.Linear(64, 32)))[0]
        Linear4bit(in_features=64, out_features=32, bias=True)
    """
    model = unwrap(model)
    require_weights(model, "save")
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    packed = set()
    for name, module in model.named_modules():
        if is_bnb_linear(module):
            packed.add(id(module.weight))
            leaves, spec = flatten(from_bnb(module)[0])
            fields = _FIELDS_8BIT if isinstance(spec, Spec8bit) else _FIELDS_4BIT
            tensors |= {join_key(name, field): leaf for field, leaf in zip(fields, leaves, strict=False)}
            layers[name] = {key: _to_json(value) for key, value in spec._asdict().items()}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer to save; use quantize_model first.")
    aliases = {}
    for name, tensor in _named_tensors(model):
        if id(tensor) in packed:
            continue
        if first.setdefault(id(tensor), name) == name:
            tensors[name] = tensor.detach()
        else:
            aliases[name] = first[id(tensor)]
    metadata = {"format": FORMAT, "layers": json.dumps(layers), "aliases": json.dumps(aliases)}
    path = Path(path)
    with replacing(path) as file:
        save_file(unshared(tensors), file, metadata)
        sort_metadata(file)
    return path


def load_quantized(path: str | os.PathLike[str], model: Model) -> Model:
    """Return a copy of `model` with the parameters and buffers of a file from `save_quantized`, bit for bit.

    The file is memory-mapped, so dense weights are read on first use. The file, and not `model`, determines which
    layers are quantized. Parameters that are tied in the file are tied in the copy. Each parameter is loaded to the
    device of the corresponding parameter of `model`. If that device is the meta device, the parameter is loaded to the
    CPU. The copy keeps the training mode and the `requires_grad` flags of `model`.

    Args:
        path: The file.
        model: A model of the same architecture, which is not modified. To save memory, create the model on the meta
            device, under `with torch.device("meta")`.

    Raises:
        ValueError: If the file is damaged or belongs to another model. The message names the file and the tensor.
        OSError: If the file can't be read.

    Example:
        >>> import tempfile
        >>> from vera_func import quantize_model
        >>> with torch.device("meta"):
        ...     skeleton = nn.Sequential(nn.Linear(64, 32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save_quantized(f"{folder}/model", quantize_model(nn.Sequential(nn.Linear(64, 32)), "nf4"))
        ...     model = load_quantized(file, skeleton)
        >>> model[0].weight.device, skeleton[0].weight.device
        (device(type='cpu'), device(type='meta'))
    """
    path, model = Path(path), unwrap(model)
    metadata, tensors = map_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} does not contain a quantized model: expected a file from vf.save_quantized.")
    values = _read_values(path, metadata, tensors)
    modules = dict(model.named_modules())
    for name, q in values.items():
        sizes = linear_sizes(modules[name]) if name in modules else None
        if sizes != q.shape[::-1]:
            needed = "has no such linear layer" if sizes is None else f"needs shape {sizes[::-1]}"
            raise ValueError(
                f"{path}: the layer {name!r} has shape {q.shape}, but the {type(model).__name__} {needed}."
            )
    memo = _replacements(path, model, tensors, _aliases(path, metadata), set(values))

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if name not in values:
            return None
        bias = getattr(module, "bias", None)
        weight: Any = module.weight
        q = values[name] if weight.is_meta else values[name].to(weight.device)
        return to_bnb(q, None if bias is None else memo[id(bias)])

    new = copy_tree(model, replace, memo)
    for name, module in new.named_modules():
        private.skip_fused_encoder_path(module)
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(
                    f"{join_key(name, key)!r} of the {type(model).__name__} is on the meta device and is neither a "
                    "parameter nor a buffer, so the file has no value for this tensor: create the model without "
                    "torch.device('meta')."
                )
    if hasattr(new, "save_pretrained"):
        describe_quantization(new)
        describe_ties(new)
    return cast(Model, new)


def _read_values(path: Path, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> dict[str, Quantized]:
    """Return the quantized weights by layer name, and remove their tensors from `tensors`."""
    layers = parse_json(path, metadata.get("layers", ""))
    values: dict[str, Quantized] = {}
    if not isinstance(layers, dict):
        raise ValueError(f"{path}: the metadata 'layers' must be a JSON object, got {type(layers).__name__}.")
    for name, static in layers.items():
        try:
            static = {key: _from_json(key, value) for key, value in static.items()}
            spec = Spec8bit(**static) if "threshold" in static else Spec4bit(**static)
            fields = _FIELDS_8BIT if isinstance(spec, Spec8bit) else _FIELDS_4BIT
            present = [field for field in fields if join_key(name, field) in tensors]
            q = unflatten([tensors.pop(join_key(name, field)) for field in present], spec)
            validate(q)
            for leaf in flatten(q)[0][1:]:
                require_finite("a scale", leaf, "quantize the model again")
        except (ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"{path}: the layer {name!r} is damaged: {error}") from error
        values[name] = q
    return values


def _aliases(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    aliases = parse_json(path, metadata.get("aliases", ""))
    if not isinstance(aliases, dict) or not all(isinstance(name, str) for name in aliases.values()):
        raise ValueError(f"{path}: the metadata 'aliases' must be a JSON object of names.")
    return aliases


def _replacements(
    path: Path, model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], quantized: set[str]
) -> dict[int, Any]:
    """Return a memo for `copy_tree`: a dict from the id of each parameter and buffer of the model to its new value."""
    memo: dict[int, Any] = {}
    source: dict[int, str] = {}
    loaded: dict[str, Tensor] = {}
    weights = {id(getattr(model.get_submodule(name), "weight", None)) for name in quantized}
    for name, old in _named_tensors(model):
        key = name if name in tensors else aliases.get(name, name)
        if key not in tensors:
            if id(old) in weights:
                continue
            if isinstance(old, nn.Parameter) or old.is_meta:
                needed = f"of shape {tuple(old.shape)}, which the {type(model).__name__} needs"
                raise ValueError(f"{path} lacks {name!r} {needed}.")
            memo[id(old)] = old
            continue
        new = tensors[key]
        if new.shape != old.shape:
            raise ValueError(f"{path}: {name!r} has shape {tuple(new.shape)}, but the model needs {tuple(old.shape)}.")
        if source.setdefault(id(old), key) != key:
            raise ValueError(
                f"{path}: {source[id(old)]!r} and {key!r} are stored separately, but are tied in the model: pass a "
                "model in which the two parameters are not tied."
            )
        if key not in loaded:
            new = new if old.is_meta else new.to(old.device)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad and new.is_floating_point())
            loaded[key] = new
        memo[id(old)] = loaded[key]
    if unknown := sorted(tensors.keys() - loaded.keys()):
        raise ValueError(f"{path} has {unknown[0]!r}, but the {type(model).__name__} has no such parameter or buffer.")
    return memo


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers with their names. A tied parameter is repeated under each of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _to_json(value: Any) -> Any:
    return str(value)[6:] if isinstance(value, torch.dtype) else value


def _from_json(key: str, value: Any) -> Any:
    if key in ("dtype", "compute_dtype") and value is not None:
        dtype = getattr(torch, str(value), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key} must be the name of a dtype, such as 'bfloat16', got {value!r}.")
        return dtype
    return shape2(value) if key == "shape" else value
