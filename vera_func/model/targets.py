"""Find the modules that a configuration targets, and the model's own parameters to train.

The matching rules are those of PEFT.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.keys import MARKS, SCALES, VECTORS, is_vector, split_key
from ..core.shapes import require_dict
from ..quant.bnb import is_bnb_linear
from .config import HEADS, VeraConfig, is_all_linear
from .expressions import Expression
from .linears import linear_sizes, returns_tensor
from .tree import held_parameters


# Default targets of a configuration without `target_modules`, by `model.config.model_type`.
DEFAULT_TARGETS: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(
        (
            *("bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama", "llama4", "mistral"),
            *("mixtral", "opt", "phi", "qwen2", "qwen3", "stablelm"),
        ),
        ("q_proj", "v_proj"),
    ),
    **dict.fromkeys(("bert", "electra", "layoutlm", "roberta", "xlm-roberta"), ("query", "value")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("RefinedWeb", "RefinedWebModel", "bloom", "chatglm", "falcon", "gpt_neox"), ("query_key_value",)),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}


def resolve(model: nn.Module, config: VeraConfig, *, strict: bool = True) -> tuple[list[str], VeraConfig]:
    """Return the names of the targeted modules, in the model's order, and the resolved configuration.

    In the resolved configuration, a `target_modules` of None or "all-linear" is replaced by names. If PEFT would apply
    `layers_to_transform` differently, a list in `target_modules` is also replaced by names. With `strict=False`,
    entries of a list may match no module, as is possible in files from PEFT.

    Raises:
        ValueError: If no module matches, if an entry of `target_modules` matches no module, if a match is not a linear
            layer, or if there are no default targets for the model's type.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> resolve(model, VeraConfig(r=2, target_modules=["0"]))[0]
        ['0']
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}.")
    if not isinstance(config, VeraConfig):
        raise ValueError(f"config must be vera_func's VeraConfig, got {type(config).__name__}.")
    targets = config.target_modules
    is_default = targets is None
    if targets is None:
        targets = _default_targets(model)
        config = dataclasses.replace(config, target_modules=targets)
    modules = dict(model.named_modules())
    if isinstance(targets, str) and is_all_linear(targets):
        names, spell_out = _in_layers(_all_linear(model, config), config), True
    else:
        names = _matching(modules, targets, config)
        # Without a pattern, PEFT does not find the index of a layer whose list is at the root of the model.
        by_index = config.layers_to_transform is not None and not config.layers_pattern
        spell_out = by_index and any(re.match(r"[^.]+\.\d+\.", name) for name in names)
    if names and spell_out:
        spelled = exact_targets(model, names, config)
        config = dataclasses.replace(config, target_modules=spelled, layers_to_transform=None, layers_pattern=None)
    if not names:
        raise ValueError(f"no module matches target_modules={targets!r}. {_linear_ends(model)}")
    if strict and not is_default and not isinstance(targets, str):
        idle = [t for t in targets if not any(name == t or name.endswith("." + t) for name in modules)]
        if idle:
            raise ValueError(f"target_modules has {idle}, but no module name ends in these. {_linear_ends(model)}")
    heads = HEADS.get(config.task_type or "", ())
    idle = [s for s in config.modules_to_save or () if s not in heads and not any(_contains(n, s) for n in modules)]
    if strict and idle:
        raise ValueError(f"modules_to_save has {idle}, but no modules of the model have these names.")
    for name in names:
        _require_adaptable(name, modules[name])
    return names, config


def exact_targets(model: nn.Module, names: Sequence[str], config: VeraConfig) -> tuple[str, ...] | str:
    """Return `target_modules` that match exactly the given modules, here and in PEFT.

    The result is the names themselves, or a regular expression if the name of another module ends in one of the names.
    Modules in `config.modules_to_save` are never matched.

    Example:
        >>> model = nn.ModuleDict({"proj": nn.Linear(2, 3), "block": nn.ModuleDict({"proj": nn.Conv1d(2, 3, 1)})})
        >>> exact_targets(model, ["proj"], VeraConfig()), exact_targets(model, ["block.proj"], VeraConfig())
        ('(proj)', ('block.proj',))
    """
    if not all(names):  # the model itself is the layer
        return ".*"
    modules = [name for name, _ in model.named_modules()]
    found = _matching(modules, names, dataclasses.replace(config, layers_to_transform=None, layers_pattern=None))
    return tuple(names) if {*found} == {*names} else f"({'|'.join(map(re.escape, names))})"


def trained_with(model: nn.Module, config: VeraConfig, targets: Sequence[str]) -> list[str]:
    """Return the names of the model's own parameters that are trained: biases, and parameters of `modules_to_save`.

    Raises:
        ValueError: If a module of `modules_to_save` is quantized or has parameters named like adapter vectors.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        >>> trained_with(model, VeraConfig(target_modules=["0"], modules_to_save=["1"]), ["0"])
        ['1.weight', '1.bias']
    """
    own: dict[str, None] = {}
    modules = dict(model.named_modules())
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    # If a head is tied to the embeddings, the embeddings' weight has a second name in the head.
    for name, parameter in held_parameters(model):
        module, leaf = split_key(name)
        whole = module in modules and _is_saved(module, config)
        if whole and leaf in (*VECTORS, *SCALES, *MARKS):
            raise ValueError(
                f"modules_to_save trains {name!r}, which is named like an adapter vector: rename this parameter."
            )
        if whole and (not parameter.is_floating_point() or (leaf == "weight" and is_bnb_linear(modules[module]))):
            skip = [saved for saved in config.modules_to_save or () if _contains(module, saved)]
            raise ValueError(
                f"modules_to_save trains {name!r}, but it is quantized ({parameter.dtype}). Leave it dense: "
                f"quantize_model(model, quant, skip={skip}), or BitsAndBytesConfig(llm_int8_skip_modules={skip}) in "
                "transformers."
            )
        is_bias = leaf == "bias" and (config.bias == "all" or (config.bias != "none" and module in targets))
        if whole:
            own[name] = None
        elif is_bias:  # a tied bias is trained under its first name, even if the layer of this name is not adapted
            own[first_names[id(parameter)]] = None
    return list(own)


def _require_adaptable(name: str, module: nn.Module) -> None:
    if linear_sizes(module) is None:
        if type(module).__module__.startswith("vera_func."):
            raise ValueError(
                f"target module {name!r} is a layer of a model from to_module, not of its base model: pass the "
                "base model."
            )
        raise ValueError(
            f"target module {name!r} is a {type(module).__name__}; only nn.Linear, bitsandbytes' linear "
            "layers and transformers' Conv1D can be adapted."
        )
    if any(map(is_lazy, module.parameters())):
        raise ValueError(f"target module {name!r} has no weight yet: run the model once, then adapt it.")
    if not returns_tensor(module):
        raise ValueError(
            f"target module {name!r} is a {type(module).__name__}, which does not return a tensor, so no "
            "update can be added to its output. Remove it from target_modules."
        )


def _matching(names: Iterable[str], targets: str | Sequence[str], config: VeraConfig) -> list[str]:
    names = [name for name in names if not _is_saved(name, config)]
    if isinstance(targets, str):
        expression = Expression("target_modules", targets)
        return [name for name in names if expression.fullmatch(name)]
    ending = [name for name in names if any(name.endswith("." + target) for target in targets)]
    found = {*_in_layers(ending, config), *targets}
    return [name for name in names if name in found]


def _in_layers(names: Sequence[str], config: VeraConfig) -> list[str]:
    layers = config.layers_to_transform
    if layers is None:
        return list(names)
    patterns = config.layers_pattern or (r"[^.]*",)
    # The first number in a name is the layer index; a later number may be the index of an expert.
    expressions = [
        Expression("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<_index>\d+)\.")
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    ]
    return [name for name in names if _layer_index(name, expressions) in layers]  # type: ignore[operator]


def _layer_index(name: str, expressions: Sequence[Expression]) -> int | None:
    found = (expression.match(name) for expression in expressions)
    return next((int(match["_index"]) for match in found if match and match["_index"]), None)


def _is_saved(name: str, config: VeraConfig) -> bool:
    return any(_contains(name, saved) for saved in config.modules_to_save or ())


def _contains(name: str, saved: str) -> bool:
    return f".{saved}." in f".{name}."


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if linear_sizes(module) is not None]


def _linear_ends(model: nn.Module) -> str:
    return f"The linear layers of this model end in {sorted({split_key(name)[1] for name in _linear_names(model)})}."


def _all_linear(model: nn.Module, config: VeraConfig) -> list[str]:
    find_head = getattr(model, "get_output_embeddings", None)  # transformers' convention
    head = find_head() if find_head is not None else None
    modules = dict(model.named_modules())
    names = [name for name in _linear_names(model) if modules[name] is not head and not _is_saved(name, config)]
    # nn.MultiheadAttention never calls its output projection.
    uncalled = [name for name in names if isinstance(modules.get(split_key(name)[0]), nn.MultiheadAttention)]
    return [name for name in names if name not in uncalled and returns_tensor(modules[name])]


def _default_targets(model: nn.Module) -> tuple[str, ...] | str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGETS:
        raise ValueError(
            f"no default target_modules are known for model type {model_type!r}; pass them, for instance "
            f"target_modules={sorted({split_key(name)[1] for name in _linear_names(model)})} or 'all-linear'."
        )
    return DEFAULT_TARGETS[model_type]


def adapted_layers(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group adapter vectors by module, `{name: {"lambda_b": ..., "lambda_d": ...}}`, and check that they fit the model.

    The vectors of a DVoRA layer include a magnitude or an output scale.

    Raises:
        ValueError: If a module is missing, can't be adapted or lacks one of its vectors, or if a value is not finite.

    Example:
        >>> import torch
        >>> params = {"0.lambda_b": torch.ones(6), "0.lambda_d": torch.ones(4)}
        >>> list(adapted_layers(nn.Sequential(nn.Linear(8, 6)), params))
        ['0']
    """
    require_dict("params", params)
    modules = dict(model.named_modules())
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in params.items():
        name, leaf = split_key(key)
        if leaf in MARKS:
            raise ValueError(
                f"params has {key!r}, so params are a sum of adapters, or come from a pool of VeRA and DVoRA adapters: "
                "merge or export the original adapters one by one."
            )
        if not isinstance(value, Tensor):
            raise ValueError(f"{key!r} must be a tensor, got {type(value).__name__}.")
        if not value.isfinite().all():
            raise ValueError(f"{key!r} holds NaN or inf: the adapter is invalid, and nothing was written.")
        if is_vector(key):
            if name not in modules or linear_sizes(modules[name]) is None:
                raise ValueError(f"params has {key!r}, but the model has no linear layer {name!r}.")
            layers.setdefault(name, {})[leaf] = value
    for name, vectors in layers.items():
        sizes = linear_sizes(modules[name])
        out = (sizes or (0, 0))[1:]
        scales = vectors.keys() & {*SCALES}
        fits = vectors.keys() - scales == {*VECTORS} and vectors["lambda_b"].shape == out and len(scales) <= 1
        if not fits or any(vectors[scale].shape != out for scale in scales):
            shapes = {leaf: tuple(value.shape) for leaf, value in vectors.items()}
            raise ValueError(
                f"{name!r} needs a lambda_b of shape {out} and a lambda_d of shape (r,), and for DVoRA a magnitude or "
                f"an output_scale of shape {out}, got {shapes}."
            )
    if not layers:
        raise ValueError(f"params must have the 'lambda_b' of at least one layer, got the keys {sorted(params)[:3]}.")
    return layers
