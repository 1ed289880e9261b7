"""Adapters in PEFT's directory format: `adapter_config.json` and `adapter_model.safetensors`.

What PEFT wrote loads here, and what is written here loads in PEFT, to the same numbers. Only safetensors is
read. Each file is replaced as a whole, and the weights carry the configuration they were written with, so
that after a crash between the two files the adapter is still the old one or the new one.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..core.keys import MARKS, VECTORS, adapted_modules, is_vector, join_key, split_key
from ..core.shapes import require_float
from ..model.adapt import Adapted, draw_projections, make_apply
from ..model.config import VeraConfig
from ..model.targets import layer_device, linear_sizes, resolve, trained_with
from ..model.tree import unwrap
from .config import CONFIG, config_from_json, config_to_json
from .files import parse_json, read_safetensors, replacing


WEIGHTS = "adapter_model.safetensors"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PREFIX = "base_model.model."


def save_adapter(
    path: str | os.PathLike[str],
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    config: VeraConfig,
    *,
    adapter_name: str = "default",
) -> Path:
    """Write an adapter as a PEFT directory; `PeftModel.from_pretrained(model, path)` loads it.

    Args:
        path: The directory, made if needed. An adapter with another name than "default" goes into a sub-folder.
        params: Of a single adapter, as `adapt` returned them.
        frozen: The projections; written if `config.save_projection` is True.
        config: As `adapt` returned it, with the targets spelled out.
        adapter_name: Name of the adapter.

    Returns:
        The directory that was written.

    Raises:
        ValueError: If params are stacked, do not fit the projections, hold NaN or inf, or the targets are not
            spelled out; nothing is written then.

    Example:
        >>> import tempfile
        >>> from vera_func import adapt
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(p.name for p in save_adapter(folder, *adapted[1:]).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder = adapter_folder(path, adapter_name)
    check_adapter(params, frozen, config)
    layers = {*adapted_modules(params)}
    tensors = {_to_peft(key, layers): value for key, value in params.items()}
    if config.save_projection:
        tensors |= {f"base_model.{name}": frozen[name] for name in ("vera_A", "vera_B")}
    text = json.dumps(config_to_json(config), indent=2, sort_keys=True)
    data = save(
        {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()},
        {"format": "pt", "vera_func.config": text},
    )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as file:
        file.write_bytes(data)
    with replacing(folder / CONFIG) as file:
        file.write_text(text)
    return folder


def load_adapter(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | None = torch.float32,
    int8_activations: bool = False,
    ignore_unknown: bool = False,
) -> Adapted:
    """Read a PEFT directory into a pure function of `model`, and the adapter's params and projections.

    Without stored projections they are drawn again; over a 16-bit base that draw is rounded as PEFT rounds it.

    Args:
        path: The directory, or the one above it for an adapter with a name of its own.
        model: The base model; it stays as it was.
        adapter_name: Name of the adapter; other than "default", a sub-folder of `path`.
        dtype: Of vectors and projections, and so of the adapter's arithmetic. PEFT's default is float32
            whatever the file holds; None keeps the file's.
        int8_activations: See `adapt`.
        ignore_unknown: Whether to read a file with configuration fields or tensors that are unknown here, of a newer
            version of PEFT for instance, without these and with a warning, as PEFT does.

    Returns:
        `(apply, params, frozen, config)`, as from `adapt`.

    Raises:
        FileNotFoundError: If there is no adapter; the message says what is there instead.
        ValueError: If a file is damaged, of another PEFT method or does not fit the model; it names file and key.

    Example:
        >>> import tempfile
        >>> from vera_func import adapt
        >>> model = nn.Sequential(nn.Linear(8, 6))
        >>> adapted = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_adapter(folder, *adapted[1:])
        ...     loaded = load_adapter(folder, model)
        >>> loaded.params["0.lambda_d"]
        tensor([0.1000, 0.1000, 0.1000, 0.1000])

    Reference:
        https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    if dtype is not None:
        require_float("dtype", dtype)
    folder = adapter_folder(path, adapter_name)
    config, tensors = read_files(folder, ignore_unknown=ignore_unknown)
    file = folder / WEIGHTS
    model = unwrap(model)
    try:
        targets, config = resolve(model, config, strict=False)
        trained = trained_with(model, config, targets)
        apply = make_apply(
            model, config.r, targets, trained, vera_dropout=config.vera_dropout, int8_activations=int8_activations
        )
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} does not fit this model: {error}") from error
    params, projections = {}, {}
    for name, tensor in tensors.items():
        key = _from_peft(name)
        if name.startswith("base_model.vera_"):
            projections[name.removeprefix("base_model.")] = tensor
        elif key is None and not ignore_unknown:
            raise ValueError(f"{file} has the key {name!r}, which is no part of a VeRA adapter.")
        elif not _is_copy(name):
            params[key or name] = tensor
    # PEFT writes embeddings to which tokens were added, under each of their names where a head is tied to them.
    for alias, key in apply.tied.items():
        if alias in params:
            params.setdefault(key, params[alias])
    params |= {alias: params[key] for alias, key in apply.tied.items() if key in params and alias not in params}
    if ignore_unknown and (odd := sorted(params.keys() - apply.slots.keys())):
        warnings.warn(f"{file} has {len(odd)} unknown tensors, which are ignored, first {odd[0]!r}.", stacklevel=2)
        params = {key: value for key, value in params.items() if key in apply.slots}
    problems = [f"lacks {key!r}" for key, slot in apply.slots.items() if slot.required and key not in params]
    problems += [f"has {key!r}, unknown to this model and config" for key in params if key not in apply.slots]
    problems += [
        f"has {key!r} of shape {tuple(value.shape)}, which must be {apply.slots[key].shape} for this model"
        for key, value in params.items()
        if key in apply.slots and value.shape != apply.slots[key].shape
    ]
    if problems:
        count = f" ({len(problems)} problems of this kind)" if len(problems) > 1 else ""
        raise ValueError(f"{file} {problems[0]}{count}.")
    if config.save_projection:
        if projections.keys() != {"vera_A", "vera_B"}:
            raise ValueError(
                f"{file} lacks base_model.vera_A and base_model.vera_B, although save_projection is true in {CONFIG}."
            )
        _check_projections(file, projections, [linear_sizes(model.get_submodule(name)) for name in targets], config.r)
        device = layer_device(model.get_submodule(targets[0]))
        # safetensors gives them in no particular order.
        frozen = {name: projections[name].to(device) for name in ("vera_A", "vera_B")}
    else:
        if projections:
            warnings.warn(
                f"{file} holds projections, but save_projection is false in {CONFIG}: they are drawn from "
                "projection_prng_key, as PEFT does, and the stored ones are ignored.",
                stacklevel=2,
            )
        frozen = draw_projections(model, config, targets)
    device = frozen["vera_A"].device
    vectors = {key: value.to(device, _vector_dtype(key, value, model, dtype)) for key, value in params.items()}
    if dtype is not None:
        frozen = {name: tensor.to(dtype) for name, tensor in frozen.items()}
    for key, value in (*vectors.items(), *frozen.items()):
        if not value.isfinite().all():
            raise ValueError(f"{file}: {key!r} overflows {value.dtype}, into which it is read.")
    order = {key: i for i, key in enumerate(apply.slots)}
    return Adapted(apply, dict(sorted(vectors.items(), key=lambda item: order[item[0]])), frozen, config)


def adapter_folder(path: str | os.PathLike[str], adapter_name: str) -> Path:
    """Where PEFT keeps an adapter of this name below `path`."""
    reserved = (".", "..", CONFIG, WEIGHTS)
    if (
        not isinstance(adapter_name, str)
        or not adapter_name
        or {*adapter_name} & {*"/\\\0"}
        or adapter_name in reserved
    ):
        raise ValueError(f"adapter_name must be a plain name, got {adapter_name!r}.")
    return Path(path) if adapter_name == "default" else Path(path) / adapter_name


def read_files(folder: Path, *, ignore_unknown: bool = False) -> tuple[VeraConfig, dict[str, Tensor]]:
    """Configuration and tensors of an adapter directory, checked as files, with the file's own names.

    Raises:
        FileNotFoundError: If there is no adapter; the message says what is there instead.
        ValueError: If a file is damaged or of another PEFT method.
    """
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    for file in (config_file, weights_file):
        if not file.is_file():
            raise FileNotFoundError(_what_is_there(folder, file))
    metadata, tensors = read_safetensors(weights_file)
    fields = parse_json(config_file, config_file.read_text(errors="replace"))
    config = config_from_json(fields, str(config_file), ignore_unknown=ignore_unknown)
    written = metadata.get("vera_func.config")
    if written is not None:
        own = config_from_json(parse_json(weights_file, written), str(weights_file))
        if _tensor_fields(own) != _tensor_fields(config):
            # The two files were not replaced together: a save was interrupted in between.
            config = own
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{weights_file}: {name!r} is {tensor.dtype}, and must be one of {DTYPES}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{weights_file}: {name!r} holds NaN or inf; the adapter is broken.")
    return config, tensors


def check_adapter(params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], config: VeraConfig) -> None:
    """Refuse what is no adapter of these projections and this configuration, or is broken.

    Raises:
        ValueError: If the targets are not spelled out, or a vector or projection is missing, stacked, no tensor of
            floating-point numbers, of another rank, or holds NaN or inf.
    """
    if not isinstance(config, VeraConfig):
        raise ValueError(f"config must be vera_func's VeraConfig, got {type(config).__name__}.")
    if config.target_modules is None or str(config.target_modules).lower() == "all-linear":
        raise ValueError("config.target_modules must be spelled out; save the config that adapt returned.")
    if not adapted_modules(params):
        raise ValueError(f"params has no 'lambda_b' of any layer, only {sorted(params)[:3]}.")
    if frozen.keys() != {"vera_A", "vera_B"}:
        raise ValueError(f"frozen must have the keys 'vera_A' and 'vera_B', got {sorted(frozen)}.")
    for name, tensor in (*params.items(), *frozen.items()):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} must be a tensor, got {type(tensor).__name__}.")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name!r} is {tensor.dtype}, and must be one of {DTYPES}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{name!r} holds NaN or inf; nothing was written.")
    layers = {*adapted_modules(params)}
    for key, value in params.items():
        module, leaf = split_key(key)
        name = _to_peft(key, layers)
        if _from_peft(name) != key or _is_copy(name):
            raise ValueError(
                f"{key!r} is the name of a parameter inside of a layer's wrapper, which PEFT would read as something "
                "else or not at all. A parameter of the model has its name in the plain model, as in the params of "
                "adapt and among the parameters of to_module."
            )
        if leaf in MARKS:
            raise ValueError(f"{key!r} marks a sum of adapters, which PEFT's format can't hold; save them one by one.")
        if leaf == "lambda_d" and value.shape != (config.r,):
            raise ValueError(f"{key!r} must be ({config.r},), got {tuple(value.shape)}; see unstack_adapters.")
        if leaf == "lambda_b" and (value.dim() != 1 or value.shape[0] > frozen["vera_B"].shape[0]):
            raise ValueError(
                f"{key!r} must be (out,) with out <= {frozen['vera_B'].shape[0]}, got {tuple(value.shape)}; is it "
                "stacked? (unstack_adapters)"
            )
        other = join_key(module, {"lambda_b": "lambda_d", "lambda_d": "lambda_b"}.get(leaf, leaf))
        if other not in params:
            raise ValueError(f"params has {key!r}, but not {other!r}.")
    if frozen["vera_A"].shape[0] != config.r or frozen["vera_B"].shape[1] != config.r:
        raise ValueError(
            f"config.r is {config.r}, but vera_A {tuple(frozen['vera_A'].shape)} and vera_B "
            f"{tuple(frozen['vera_B'].shape)} have another rank."
        )


def _to_peft(key: str, layers: set[str]) -> str:
    layer, leaf = split_key(key)
    if leaf in VECTORS:
        leaf = f"vera_{leaf}"
    elif layer in layers:
        leaf = f"base_layer.{leaf}"
    return _PREFIX + join_key(layer, leaf)


def _from_peft(name: str) -> str | None:
    if not name.startswith(_PREFIX):
        return None
    layer, leaf = split_key(name.removeprefix(_PREFIX))
    if leaf in ("vera_lambda_b", "vera_lambda_d"):
        leaf = leaf.removeprefix("vera_")
    elif layer == "base_layer" or layer.endswith(".base_layer"):
        layer = layer.removesuffix("base_layer").removesuffix(".")
    return join_key(layer, leaf)


def _is_copy(name: str) -> bool:
    """Whether a file's tensor is one that PEFT does not read either: with bias="all" it writes a head's bias thrice."""
    return ".modules_to_save." in name or ".original_module." in name


def _check_projections(
    file: Path, frozen: Mapping[str, Tensor], sizes: Sequence[tuple[int, int] | None], r: int
) -> None:
    A, B = frozen["vera_A"], frozen["vera_B"]
    widest_in, widest_out = (max(widths) for widths in zip(*filter(None, sizes), strict=True))
    fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] == r
    if not fits or A.shape[1] < widest_in or B.shape[0] < widest_out:
        raise ValueError(
            f"{file} has vera_A {tuple(A.shape)} and vera_B {tuple(B.shape)}, which must be ({r}, >= {widest_in}) "
            f"and (>= {widest_out}, {r}) for this model."
        )


def _vector_dtype(key: str, value: Tensor, model: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    if is_vector(key):
        return dtype or value.dtype
    return model.get_parameter(key).dtype


def _tensor_fields(config: VeraConfig) -> tuple[Any, ...]:
    return (
        config.r,
        config.projection_prng_key,
        config.save_projection,
        config.bias,
        frozenset(config.modules_to_save or ()),
        config.target_modules if isinstance(config.target_modules, str) else frozenset(config.target_modules or ()),
        config.layers_to_transform,
        config.layers_pattern,
    )


def _what_is_there(folder: Path, file: Path) -> str:
    if folder.is_file():
        return f"there is no adapter directory {folder}: it is a file (a bank is opened by open_bank)."
    if not folder.is_dir():
        return f"there is no adapter directory {folder}."
    if (folder / "adapter_model.bin").is_file():
        return (
            f"{folder} has adapter_model.bin, a pickle, which is not read. Convert it once where you trust it: load it "
            "in PEFT and call save_pretrained(folder), which writes adapter_model.safetensors."
        )
    inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    hint = f" It holds the adapters {inside}: pass adapter_name." if inside else ""
    return f"{folder} has no {file.name}.{hint}"
