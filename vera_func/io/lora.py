"""Export a VeRA adapter as a LoRA, for tools without VeRA support: a PEFT directory, or a GGUF file for llama.cpp.

The factors of the LoRA give exactly the update ΔW = B' A' of the adapter:

    A' = lambda_d ∘ A,  B' = lambda_b ∘ B
"""

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..core.keys import MAGNITUDE, join_key, own_parameters, split_key
from ..model.config import VeraConfig
from ..model.linears import is_conv1d, linear_sizes, widest_sizes
from ..model.targets import adapted_layers, exact_targets, resolve
from ..model.tree import unwrap
from .check import check_adapter
from .config import CONFIG, WEIGHTS
from .files import replacing
from .gguf_lora import write_gguf
from .hub import adapter_folder
from .servers import refusals, warning_text


class LoraExport(NamedTuple):
    """Result of `export_lora`.

    Attributes:
        path: The directory or GGUF file that was written.
        error: Relative truncation error ‖ΔW - B'A'‖ / ‖ΔW‖ of each layer, by module name. The error of an exact
            export is 0.
    """

    path: Path
    error: dict[str, float]


def export_lora(
    path: str | os.PathLike[str],
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    config: VeraConfig,
    model: nn.Module,
    *,
    rank: int | None = None,
    format: str = "peft",
) -> LoraExport:
    """Write an adapter as a LoRA for PEFT, vLLM, SGLang or llama.cpp. By default, the LoRA is exact.

    A DVoRA adapter becomes a LoRA with `use_dora=True`, which PEFT loads. The servers vLLM, SGLang and llama.cpp do not
    support `use_dora`: for these servers, merge a DVoRA adapter with `merge`.

    If `rank` is below `config.r`, the LoRA is the truncated singular value decomposition of ΔW. ΔW is not materialized.
    The main cost per layer is two QR decompositions, of matrices with shapes (out, r) and (in, r).

    A warning names the servers that would refuse the LoRA directory, each with the reason and a remedy. For example,
    vLLM refuses ranks above 16 by default, and no server supports trained heads or biases.
    `vera_func.io.servers.check_lora` reports the refusals of any LoRA directory.

    Args:
        path: The directory to write, created if it does not exist. For GGUF, a file name that ends in `.gguf`, or a
            directory for the file `adapter.gguf`.
        params: Params of a single adapter.
        frozen: The projections.
        config: The configuration that `adapt` returned.
        model: The base model, which determines the layer sizes.
        rank: Rank of the LoRA; None means `config.r`.
        format: "peft", or "gguf" for llama.cpp (`--lora`). GGUF needs the package gguf, a model of the type llama,
            mistral or qwen2, and an adapter without trained heads, trained biases or DVoRA.

    Returns:
        The path that was written, and the relative truncation error of each layer.

    Raises:
        ValueError: If the adapter holds NaN or inf, or does not fit the model; if `rank` or `format` is invalid; or if
            `format` is "gguf" and llama.cpp can't load the adapter.
        FileExistsError: If the directory already contains a VeRA adapter.

    Example:
        >>> import tempfile
        >>> from vera_func import adapt
        >>> model = nn.Sequential(nn.Linear(8, 6))
        >>> adapted = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_lora(folder, *adapted[1:], model).error
        {'0': 0.0}

    Reference:
        https://arxiv.org/abs/2106.09685 (LoRA); section 3.2 of https://arxiv.org/abs/2310.11454.
    """
    if format not in ("peft", "gguf"):
        raise ValueError(f"format must be 'peft' or 'gguf', got {format!r}.")
    check_adapter(params, frozen, config)
    rank = config.r if rank is None else rank
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= config.r:
        raise ValueError(f"rank must be an integer from 1 to {config.r}, the rank of the adapter, got {rank!r}.")
    model = unwrap(model)
    factors, error = lora_factors(params, frozen, model, rank)
    own = own_parameters(params)
    if format == "gguf":
        if own:
            raise ValueError(
                f"llama.cpp does not support trained heads or biases, such as {own[0]!r}: merge the adapter."
            )
        if config.use_dora:
            raise ValueError("llama.cpp does not support DoRA and would ignore the magnitudes: merge the adapter.")
        path = Path(path)
        file = path if path.suffix == ".gguf" else path / "adapter.gguf"
        write_gguf(file, factors, model)
        return LoraExport(file, error)
    tensors: dict[str, Tensor] = {}
    for name, (lora_A, lora_B) in factors.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = lora_A, lora_B
        if config.use_dora:
            tensors[f"{name}.lora_magnitude_vector"] = params[join_key(name, MAGNITUDE)]
    for key in own:
        owner, leaf = split_key(key)
        tensors[f"{owner}.base_layer.{leaf}" if owner in factors else key] = params[key]
    fields = _lora_config(config, rank, list(factors), model)
    folder = adapter_folder(path, "default")
    _write_peft(folder, fields, tensors)
    if (text := warning_text(refusals(fields, tensors))) is not None:
        warnings.warn(text, stacklevel=2)
    return LoraExport(folder, error)


def lora_factors(
    params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], model: nn.Module, rank: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """Return the LoRA factors A' (rank, in), B' (out, rank) and the relative truncation error, by layer name.

    Args:
        params: Params of a single adapter.
        frozen: The projections.
        model: The base model.
        rank: Rank of the LoRA.

    Raises:
        ValueError: If the adapter does not fit the model, or a factor overflows.

    Example:
        >>> params = {"0.lambda_b": torch.ones(6), "0.lambda_d": torch.ones(4)}
        >>> frozen = {"vera_A": torch.ones(4, 8), "vera_B": torch.ones(6, 4)}
        >>> factors, error = lora_factors(params, frozen, nn.Sequential(nn.Linear(8, 6)), rank=1)
        >>> [tuple(factor.shape) for factor in factors["0"]]
        [(1, 8), (6, 1)]
    """
    layers = adapted_layers(model, params)
    widest = widest_sizes(model, layers)[0]
    if frozen["vera_A"].shape[1] < widest:
        shape = tuple(frozen["vera_A"].shape)
        raise ValueError(
            f"vera_A must have at least {widest} columns, the input size of the widest layer, got {shape}."
        )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    error: dict[str, float] = {}
    for name, vectors in layers.items():
        sizes = linear_sizes(model.get_submodule(name))
        assert sizes is not None, name
        in_features, out_features = sizes
        lora_A = vectors["lambda_d"][:, None] * frozen["vera_A"][:, :in_features]  # (r, in)
        lora_B = vectors["lambda_b"][:, None] * frozen["vera_B"][:out_features]  # (out, r)
        error[name] = 0.0
        if rank < len(lora_A):
            lora_A, lora_B, error[name] = truncate(lora_A, lora_B, rank)
        if not (lora_A.isfinite().all() and lora_B.isfinite().all()):
            raise ValueError(f"the LoRA factors of {name!r} overflow {lora_A.dtype}; nothing was written.")
        factors[name] = lora_A, lora_B
    return factors, error


def _write_peft(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    old = folder / CONFIG
    if old.is_file() and re.search(r'"peft_type":\s*"D?VERA"', old.read_text(errors="replace")):
        raise FileExistsError(f"{folder} contains a VeRA adapter, which the LoRA would replace: choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    cpu = {f"base_model.model.{key}": t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    text, data = json.dumps(fields, indent=2, sort_keys=True), save(cpu, {"format": "pt"})
    with replacing(folder / CONFIG) as config_file, replacing(folder / WEIGHTS) as file:
        config_file.write_text(text)
        file.write_bytes(data)
        # The files are replaced one after the other. The old configuration is removed first, so that a crash can't
        # leave it beside new weights.
        old.unlink(missing_ok=True)


def _short_targets(layers: list[str], model: nn.Module) -> list[str] | str:
    """Return `target_modules`: short names such as "q_proj" if they match only `layers`, else the exact names."""
    ends = sorted({split_key(name)[1] for name in layers})
    if not all(ends):  # the model itself is the layer
        return layers
    exact = exact_targets(model, sorted(layers), VeraConfig())
    try:
        found = resolve(model, VeraConfig(target_modules=ends), strict=False)[0]
    except ValueError:  # these ends also match a module that is not a linear layer
        found = []
    return ends if {*found} == {*layers} else exact if isinstance(exact, str) else list(exact)


def _lora_config(config: VeraConfig, rank: int, targets: list[str], model: nn.Module) -> dict[str, Any]:
    """Return the content of `adapter_config.json` for PEFT's LoRA."""
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,  # PEFT scales by lora_alpha / r = 1
        "lora_dropout": 0.0,
        "use_dora": config.use_dora,
        "target_modules": _short_targets(targets, model),
        "bias": "lora_only" if config.bias.endswith("_only") else config.bias,
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(name)) for name in targets),
        "modules_to_save": None if config.modules_to_save is None else list(config.modules_to_save),
        "task_type": config.task_type,
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
    }


def truncate(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Approximate BA by the best product B'A' of the given rank; return A', B' and the error ‖BA - B'A'‖ / ‖BA‖.

    Args:
        lora_A: A, of shape (r, in).
        lora_B: B, of shape (out, r).
        rank: Rank of the approximation.

    Example:
        >>> A, B = torch.eye(2, 3), torch.diag(torch.tensor([3.0, 4.0]))
        >>> truncate(A, B, 1)[2]
        0.6000000238418579
    """
    q_A, r_A = torch.linalg.qr(lora_A.double().T)  # (in, k), (k, r)
    q_B, r_B = torch.linalg.qr(lora_B.double())  # (out, l), (l, r)
    U, S, Vh = torch.linalg.svd(r_B @ r_A.T, full_matrices=False)
    total = S.norm()
    if total == 0:
        return torch.zeros_like(lora_A[:rank]), torch.zeros_like(lora_B[:, :rank]), 0.0
    root = torch.zeros(rank, dtype=S.dtype, device=S.device)
    root[: S.numel()] = S[:rank].sqrt()
    left = nn.functional.pad(q_B @ U[:, :rank], (0, max(0, rank - S.numel())))
    right = nn.functional.pad(q_A @ Vh[:rank].T, (0, max(0, rank - S.numel())))
    error = (S[rank:].norm() / total).float().item()
    return (right * root).T.to(lora_A.dtype), (left * root).to(lora_B.dtype), error
