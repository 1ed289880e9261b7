"""Describe adapter directories, adapter banks and model folders, as dicts and tables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.keys import SCALES, VECTORS, adapted_modules, join_key, own_parameters, split_key
from ..data.assets import quiet_transformers
from ..data.models import Base, describe_base
from ..data.sources import Source, base_of, load_adapters, open_source
from ..io.bank import open_bank
from ..io.checkpoint import read_files
from ..io.config import CONFIG, WEIGHTS
from ..io.peft_keys import key_from_peft
from ..merging.model import model_merge_report
from ..merging.report import MergeReport
from ..model.config import VeraConfig
from ..model.convert import dense_share, quantizable_layers
from ..model.linears import linear_sizes, widest_sizes
from ..model.targets import resolve
from .groups import format_of
from .report import merge_advice


def inspect_path(
    path: str,
    *,
    model: str | None = None,
    quant: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    to: str | None = None,
    names: Sequence[str] | None = None,
    r: int = 256,
    targets: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Describe an adapter directory, an adapter bank or a model folder.

    Args:
        path: The directory, bank or folder.
        model: Base model of the adapter, for a report on merging; None means no report on merging.
        quant: Quantization format of the base model; None means the format used in training.
        dtype: Dtype of the base model's arithmetic.
        device: Device of the base model.
        to: Format of the merged weights; None means the format of the base model.
        names: Names of adapters in the bank; None means all adapters. The merge report covers the first adapter only.
        r, targets: For a model folder, the rank and the target modules of a new adapter; see `VeraConfig`.

    Raises:
        ValueError: If a file is damaged, or if an option does not apply to the path.
        FileNotFoundError: If the path does not exist, or is a folder without an adapter or a model.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if folder.is_dir() and not (folder / CONFIG).is_file() and (folder / "config.json").is_file():
        return _inspect_model(folder, r, targets)
    if model is None and (to or quant or dtype):
        raise ValueError("--to, --quant and --dtype have no effect without --model: pass --model as well.")
    if names and not folder.is_file():
        raise ValueError(f"--name selects adapters of a bank, but {path} is a folder: leave out --name.")
    source = open_source(bank=path, names=names, model=model) if folder.is_file() else open_source(path, model=model)
    found = _inspect_adapters(folder, source)
    if model is not None:
        found["merge"] = _inspect_merge(source, base_of(source, quant, dtype, device), to)
    return found


def summarize_reports(modules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Average merge reports over layers, grouped by the last component of the layer name, such as `q_proj`.

    Example:
        >>> summarize_reports([{"module": "0.q", "kept": 0.5, "error": 1.0, "size": 0.25},
        ...                    {"module": "1.q", "kept": 1.0, "error": 0.5, "size": 0.25}])
        [{'modules': 'q', 'count': 2, 'kept': 0.75, 'kept_least': 0.5, 'error': 0.75, 'size': 0.25}]
    """
    rows = []
    for kind, group in _by_kind(modules, lambda row: row["module"]).items():
        mean = {name: sum(row[name] for row in group) / len(group) for name in ("kept", "error", "size")}
        least = min(row["kept"] for row in group)
        rows.append({"modules": kind, "count": len(group), "kept": mean["kept"], "kept_least": least, **mean})
    return rows


def _inspect_adapters(path: Path, source: Source) -> dict[str, Any]:
    """Describe the adapters in an adapter directory or a bank."""
    assert source.config is not None
    if path.is_file():
        bank = open_bank(path)
        stacked, projections, size = bank.read(source.names), bank.frozen(), path.stat().st_size
    else:
        (stacked, projections), size = _read_adapter(path), (path / WEIGHTS).stat().st_size
    return {
        "path": str(path),
        "kind": "bank" if path.is_file() else "adapter",
        "method": "DVoRA" if source.config.use_dora else "VeRA",
        "adapters": len(source.names),
        "names": source.names,
        "model": source.config.base_model_name_or_path,
        "quant": source.metadata.quant,
        "labels": source.metadata.labels or source.metadata.label_sets,
        "prompt": source.metadata.prompt,
        "trained_on": source.metadata.kind,
        "data": source.metadata.data,
        "r": source.config.r,
        "projection_key": source.config.projection_prng_key,
        "projections_stored": bool(projections),
        "trained": sum(value[0].numel() for value in stacked.values()),
        "bytes": size,
        "modules": _norms(stacked),
    }


def _read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the params (a stack of one adapter) and the stored projections of an adapter directory, without a model."""
    _, tensors = read_files(folder)
    projections = {key: value for key, value in tensors.items() if ".vera_A" in key or ".vera_B" in key}
    stacked = {key_from_peft(key) or key: value[None] for key, value in tensors.items() if key not in projections}
    return stacked, projections


def _inspect_merge(source: Source, base: Base, to: str | None) -> dict[str, Any]:
    """Report how much of the first adapter's update a merge retains."""
    adapted, _ = load_adapters(source, base.model)
    reports = model_merge_report(adapted, None if to is None else format_of(to))
    return {
        "name": source.names[0],
        "base": describe_base(base),
        "to": to or base.quant,
        "advice": merge_advice(reports),
        "modules": summarize_reports(describe_reports(reports)),
    }


def _inspect_model(folder: Path, r: int, targets: Sequence[str] | None) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder)
        stored: Any = getattr(config, "quantization_config", None) or {}
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):  # only sizes are needed
            model = AutoModelForCausalLM.from_config(config)
    names, _ = resolve(model, VeraConfig(r=r, target_modules=list(targets) if targets else None))
    modules = dict(model.named_modules())
    sizes = {name: linear_sizes(module) for name, module in modules.items()}
    widest_in, widest_out = widest_sizes(model, names)
    linear = [(name, *size) for name, size in sizes.items() if size is not None]
    rows = []
    for kind, group in _by_kind(linear, lambda row: row[0]).items():
        adapted = [row for row in group if row[0] in names]
        rows.append(
            {
                "modules": kind,
                "count": len(group),
                "in": ", ".join(str(size) for size in dict.fromkeys(row[1] for row in group)),
                "out": ", ".join(str(size) for size in dict.fromkeys(row[2] for row in group)),
                "weights": sum(row[1] * row[2] for row in group),
                "would_adapt": len(adapted),
                "would_train": sum(row[2] + r for row in adapted),
            }
        )
    dense = dense_share(model, quantizable_layers(model))
    return {
        "path": str(folder),
        "kind": "model",
        "type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(getattr(config, "dtype", None) or "").removeprefix("torch.") or None,
        "quantization": stored.get("bnb_4bit_quant_type" if stored.get("load_in_4bit") else "quant_method"),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "stays_dense": dense.total,  # share of the weights that quantize_model does not quantize
        "fused_experts": dense.fused or None,  # share of the weights that are in 3-D parameters of experts
        "r": r,
        "would_train": sum(row["would_train"] for row in rows),
        "projections": r * (widest_in + widest_out),
        "modules": rows,
    }


def _norms(stacked: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Count layers and average the norms of the adapter's vectors, grouped by the last component of the layer name."""
    # Sorted, since the order in a safetensors file is arbitrary.
    layers = sorted(adapted_modules(stacked))
    rows = []
    for kind, group in _by_kind(layers, lambda name: name).items():
        row: dict[str, Any] = {"modules": kind, "count": len(group)}
        for leaf in (*VECTORS, *(name for name in SCALES if join_key(group[0], name) in stacked)):
            norms = torch.stack([stacked[join_key(name, leaf)].float().norm(dim=1) for name in group])
            row |= {f"{leaf}_norm": norms.mean().item(), f"{leaf}_norm_most": norms.max().item()}
        rows.append(row)
    own = own_parameters(stacked)
    return rows + [{"modules": key, "count": 1} for key in own]


def _by_kind(items: Iterable[Any], name_of: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(split_key(name_of(item))[1], []).append(item)
    return groups


def describe_reports(reports: Mapping[str, MergeReport]) -> Sequence[dict[str, Any]]:
    """Convert merge reports to rows, one per layer.

    Example:
        >>> describe_reports({"q_proj": MergeReport(0.5, 0.25, 0.125)})[0]["kept"]
        0.5
    """
    return [{"module": name, **report._asdict()} for name, report in reports.items()]
