"""Read and write adapters in PEFT's directory format: `adapter_config.json` and `adapter_model.safetensors`.

Adapters written by PEFT load here, and adapters written here load in PEFT, with identical values. Pickle files are not
supported. Each file is written atomically. The weights file also contains the configuration. If a save was interrupted
before `adapter_config.json` was replaced, `load_adapter` uses the configuration in the weights file.
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

from ..core.keys import MAGNITUDE, PROJECTIONS, adapted_modules, is_vector, split_key
from ..core.shapes import require_finite, require_float, require_product_dtype
from ..model.adapt import Adapted, draw_projections
from ..model.apply import Apply
from ..model.build import make_apply
from ..model.config import VeraConfig
from ..model.linears import layer_device, widest_sizes
from ..model.targets import resolve, trained_with
from ..model.tree import unwrap
from .card import CARD, card_text
from .check import DTYPES, check_adapter
from .config import CONFIG, WEIGHTS, config_from_json, config_to_json
from .files import parse_json, read_safetensors, replacing, sort_metadata, written_by
from .hub import adapter_folder, find_adapter
from .peft_keys import is_copy, key_from_peft, key_to_peft


def save_adapter(
    path: str | os.PathLike[str],
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    config: VeraConfig,
    *,
    adapter_name: str = "default",
    card: bool = False,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write an adapter as a PEFT directory, for `load_adapter` and `PeftModel.from_pretrained(model, path)`.

    PEFT does not support DVoRA, and refuses the `peft_type` "DVERA" of DVoRA adapters. `export_lora` converts a DVoRA
    adapter to a LoRA that PEFT loads.

    Args:
        path: The directory to write, created if it does not exist.
        params: Params of a single adapter, with the keys that `adapt` returned.
        frozen: The projections, written only if `config.save_projection` is True.
        config: The configuration that `adapt` returned, with explicit target modules.
        adapter_name: Name of the adapter. An adapter with a name other than "default" is written to a sub-folder of
            that name.
        card: Whether to write a model card, `README.md`, which describes the adapter and how to load it. An existing
            card is replaced.
        metrics: Evaluation results for the card, by name.

    Returns:
        The directory that was written.

    Raises:
        ValueError: If params are stacked, hold NaN or inf, or do not fit the projections; if the target modules are not
            explicit; if a metric is not a number; or if metrics are given without `card=True`. All arguments are
            checked before a file is written.

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
    if metrics and not card:
        raise ValueError("metrics were given, but card is False: pass card=True to write them to the model card.")
    readme = card_text(params, config, metrics) if card else None
    layers = {*adapted_modules(params)}
    tensors = {key_to_peft(key, layers): value for key, value in params.items()}
    if config.save_projection:
        tensors |= {f"base_model.{name}": frozen[name] for name in ("vera_A", "vera_B")}
    text = json.dumps(config_to_json(config), indent=2, sort_keys=True)
    data = save(
        {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()},
        {"format": "pt", "vera_func.config": text, "vera_func.version": written_by()},
    )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as file:
        file.write_bytes(data)
        sort_metadata(file)
    with replacing(folder / CONFIG) as file:
        file.write_text(text)
    if readme is not None:
        with replacing(folder / CARD) as file:
            file.write_text(readme, encoding="utf-8")
    return folder


def load_adapter(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    adapter_name: str = "default",
    revision: str | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    int8_activations: bool = False,
    product_dtype: torch.dtype | None = None,
    ignore_unknown: bool = False,
) -> Adapted:
    """Load an adapter from a PEFT directory or the Hugging Face hub, and make `model` a pure function.

    If `save_projection` is false in the configuration of the adapter, the projections are drawn from the seed in that
    configuration. If the weights of `model` are 16-bit, the drawn projections are rounded to 16 bits, as in PEFT.

    Args:
        path: A directory, or a repository of the hub such as `"user/repo"`. An existing local path takes precedence
            over a repository of the same name. The package huggingface_hub caches repositories, also for offline use.
        model: The base model, which is not modified.
        adapter_name: Name of the adapter. An adapter with a name other than "default" is read from the sub-folder of
            that name.
        revision: Branch, tag or commit of the repository. None means the main branch.
        subfolder: Folder of the adapter in the directory or repository.
        dtype: Dtype of the vectors and projections, and therefore of the adapter's arithmetic. The default, float32, is
            also the default in PEFT. If `dtype` is None, tensors keep the dtypes of the file.
        int8_activations: See `adapt`.
        product_dtype: See `adapt`. The product dtype is not stored in adapter files.
        ignore_unknown: Whether to ignore unknown tensors and configuration fields, for example those of a newer version
            of PEFT. As in PEFT, a warning names the ignored entries.

    Returns:
        `(apply, params, frozen, config)`, as from `adapt`.

    Raises:
        FileNotFoundError: If the directory contains no adapter, or the hub has no such repository, revision or file.
        ConnectionError: If the hub can't be reached, and the cache does not contain the files.
        ValueError: If a file is damaged, belongs to another PEFT method, or does not fit the model. The message names
            the file and the tensor or field.

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
    require_product_dtype(product_dtype)
    folder = find_adapter(path, adapter_name, revision=revision, subfolder=subfolder)
    config, tensors = read_files(folder, ignore_unknown=ignore_unknown)
    file = folder / WEIGHTS
    model = unwrap(model)
    try:
        targets, config = resolve(model, config, strict=False)
        trained = trained_with(model, config, targets)
        apply = make_apply(
            model, config, targets, trained, int8_activations=int8_activations, product_dtype=product_dtype
        )
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} does not fit this model: {error}") from error
    params, projections = _split_tensors(file, tensors, apply, ignore_unknown)
    frozen = _projections_of(file, projections, config, model, targets)
    device = frozen["vera_A"].device
    vectors = {}
    for key, value in params.items():
        to = vector_dtype(key, dtype or value.dtype) if is_vector(key) else model.get_parameter(key).dtype
        vectors[key] = value.to(device, to)
    if dtype is not None:
        frozen = {name: tensor.to(dtype) for name, tensor in frozen.items()}
    require_no_overflow(file, vectors | frozen)
    order = {key: i for i, key in enumerate(apply.slots)}
    return Adapted(apply, dict(sorted(vectors.items(), key=lambda item: order[item[0]])), frozen, config)


def _split_tensors(
    file: Path, tensors: Mapping[str, Tensor], apply: Apply, ignore_unknown: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the tensors of a file into params and projections; raise a ValueError if params do not fit the model."""
    params: dict[str, Tensor] = {}
    projections = {}
    for name, tensor in tensors.items():
        key = key_from_peft(name)
        if name.startswith("base_model.vera_"):
            projections[name.removeprefix("base_model.")] = tensor
        elif key is None and not ignore_unknown:
            raise ValueError(
                f"{file} has the tensor {name!r}, which does not belong to a VeRA adapter: to ignore the tensor, pass "
                "ignore_unknown=True."
            )
        elif not is_copy(name):
            params[key or name] = tensor
    # PEFT writes resized embeddings. If a head is tied to them, PEFT writes the values under both names.
    for alias, key in apply.schema.tied.items():
        if alias in params:
            params.setdefault(key, params[alias])
    params |= {alias: params[key] for alias, key in apply.schema.tied.items() if key in params and alias not in params}
    if ignore_unknown and (odd := sorted(params.keys() - apply.slots.keys())):
        warnings.warn(f"{file} has {len(odd)} unknown tensors, which are ignored, first {odd[0]!r}.", stacklevel=3)
        params = {key: value for key, value in params.items() if key in apply.slots}
    problems = [f"lacks {key!r}" for key in apply.schema.missing(params)]
    problems += [
        f"has {key!r}, but the adapted model has no such parameter" for key in params if key not in apply.slots
    ]
    problems += [
        f"has {key!r} of shape {tuple(value.shape)}, but this model needs the shape {apply.slots[key].shape}"
        for key, value in params.items()
        if key in apply.slots and value.shape != apply.slots[key].shape
    ]
    if problems:
        count = f" (the first of {len(problems)} problems)" if len(problems) > 1 else ""
        raise ValueError(f"{file} {problems[0]}{count}.")
    return params, projections


def _projections_of(
    file: Path, projections: Mapping[str, Tensor], config: VeraConfig, model: nn.Module, targets: Sequence[str]
) -> dict[str, Tensor]:
    """Return the projections of the file. If `config.save_projection` is False, draw them from the seed instead."""
    if not config.save_projection:
        if projections:
            warnings.warn(
                f"{file} contains projections, but save_projection is false in {CONFIG}: as in PEFT, the stored "
                "projections are ignored, and new ones are drawn from projection_prng_key.",
                stacklevel=3,
            )
        return draw_projections(model, config, targets)
    if projections.keys() != {"vera_A", "vera_B"}:
        stored = ", ".join(sorted(projections)) or "neither"
        raise ValueError(
            f"{file} must contain base_model.vera_A and base_model.vera_B, because save_projection is true in "
            f"{CONFIG}, got {stored}."
        )
    _check_projections(file, projections, widest_sizes(model, targets), config.r)
    device = layer_device(model.get_submodule(targets[0]))
    # The order of the keys is fixed here, because their order in the file is arbitrary.
    return {name: projections[name].to(device) for name in ("vera_A", "vera_B")}


def read_files(folder: Path, *, ignore_unknown: bool = False) -> tuple[VeraConfig, dict[str, Tensor]]:
    """Read and check the configuration and tensors of an adapter directory. The tensors keep PEFT's names.

    Raises:
        FileNotFoundError: If the directory contains no adapter.
        ValueError: If a file is damaged or belongs to another PEFT method.
    """
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    for file in (config_file, weights_file):
        if not file.is_file():
            raise FileNotFoundError(_missing_file(folder, file))
    metadata, tensors = read_safetensors(weights_file)
    fields = parse_json(config_file, config_file.read_text(errors="replace"))
    config = config_from_json(fields, str(config_file), ignore_unknown=ignore_unknown)
    written = metadata.get("vera_func.config")
    if written is not None:
        own = config_from_json(parse_json(weights_file, written), str(weights_file))
        if _tensor_fields(own) != _tensor_fields(config):
            # A save was interrupted after the weights file and before the configuration file.
            config = own
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{weights_file}: the dtype of {name!r} must be one of {DTYPES}, got {tensor.dtype}.")
        require_finite(f"{weights_file}: {name!r}", tensor, "the adapter is invalid")
    return config, tensors


def _check_projections(file: Path, frozen: Mapping[str, Tensor], widest: tuple[int, int], r: int) -> None:
    A, B = frozen["vera_A"], frozen["vera_B"]
    widest_in, widest_out = widest
    fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] == r
    if not fits or A.shape[1] < widest_in or B.shape[0] < widest_out:
        raise ValueError(
            f"{file}: for this model, vera_A must have shape ({r}, >= {widest_in}), got {tuple(A.shape)}, and "
            f"vera_B must have shape (>= {widest_out}, {r}), got {tuple(B.shape)}."
        )


def vector_dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the vector `key` in an adapter of dtype `dtype`. A magnitude has at least float32.

    Example:
        >>> vector_dtype("0.lambda_b", torch.bfloat16), vector_dtype("0.magnitude", torch.bfloat16)
        (torch.bfloat16, torch.float32)
    """
    return torch.promote_types(dtype, torch.float32) if split_key(key)[1] == MAGNITUDE else dtype


def require_no_overflow(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise an error if a finite value of a file became infinite when cast to another dtype.

    Raises:
        ValueError: If a value is not finite.

    Example:
        >>> require_no_overflow(Path("adapter"), {"0.lambda_b": torch.ones(2)})
    """
    for key, value in tensors.items():
        if not value.isfinite().all():
            own = not is_vector(key) and key not in PROJECTIONS
            cast = "convert the model to a wider dtype" if own else "pass a wider dtype"
            raise ValueError(f"{file}: {key!r} overflows {value.dtype}: {cast}.")


def _tensor_fields(config: VeraConfig) -> tuple[Any, ...]:
    return (
        config.r,
        config.projection_prng_key,
        config.save_projection,
        config.use_dora,
        config.bias,
        frozenset(config.modules_to_save or ()),
        config.target_modules if isinstance(config.target_modules, str) else frozenset(config.target_modules or ()),
        config.layers_to_transform,
        config.layers_pattern,
    )


def _missing_file(folder: Path, file: Path) -> str:
    if folder.is_file():
        return f"there is no adapter directory {folder}: the path is a file. To open an adapter bank, use open_bank."
    if not folder.is_dir():
        return f"there is no adapter directory {folder}."
    if (folder / "adapter_model.bin").is_file():
        return (
            f"{folder} has adapter_model.bin, a pickle, which is not supported. Convert it if you trust its source: "
            "load it in PEFT and call save_pretrained(folder), which writes adapter_model.safetensors."
        )
    inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    hint = f" Its sub-folders contain the adapters {inside}: pass adapter_name." if inside else ""
    return f"{folder} has no {file.name}.{hint}"
