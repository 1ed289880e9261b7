"""What to adapt: `VeraConfig` and the modules of a model that it targets.

The fields, their names and the matching rules are PEFT's, so that a configuration means the same here and there;
where PEFT takes a contradictory one and ignores half of it, this raises.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .bnb import is_bnb_linear


_Names = str | Sequence[str] | None

# Which linear layers are adapted where a configuration names none, by `model.config.model_type`.
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
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeraConfig:
    """Which layers of a model are adapted, and how; the fields of PEFT's `VeraConfig`.

    Attributes:
        r: Rank of the shared projections.
        target_modules: Modules to adapt: names or their endings after a dot (a sequence), a regular expression
            for the whole name (a string), "all-linear" (every linear layer but the output head), or None, the usual
            ones of the model's type.
        projection_prng_key: Seed of the shared projections.
        save_projection: Whether a saved adapter holds the projections, or only their seed. They can be
            redrawn exactly for a base of the same dtype; storing them is PEFT's default.
        vera_dropout: Probability with which an input of `A` is dropped, where an explicit generator asks
            for dropout (`apply.with_dropout`); nothing here looks at `module.training`.
        d_initial: Initial value of `lambda_d`.
        fan_in_fan_out: PEFT's mark for weights stored (in, out); found from the layer, and only kept for the file.
        bias: "none", "vera_only" (also train the biases of adapted layers) or "all" (every bias of the model).
        modules_to_save: Names or endings of further modules to train whole, such as a new classifier. The
            heads of `task_type` are added to them.
        init_weights: True starts at the base model; False draws `lambda_d` and sets `lambda_b = 1` (for tests).
        layers_to_transform: Indices of the layers to adapt, among those matched by an ending.
        layers_pattern: Name of the list of layers that the index is looked for in.
        task_type: None or one of "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS",
            "FEATURE_EXTRACTION".
        base_model_name_or_path: Noted in a saved adapter.
        revision: Noted in a saved adapter.

    Raises:
        ValueError: If a value is out of range or contradicts another; the message names the field.

    Example:
        >>> VeraConfig(r=64, target_modules=["q_proj", "v_proj"]).target_modules
        ('q_proj', 'v_proj')

    Reference:
        https://huggingface.co/docs/peft/package_reference/vera
    """

    r: int = 256
    target_modules: _Names = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: _Names = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        _require_integer("r", self.r)
        _require_integer("projection_prng_key", self.projection_prng_key)
        if not 0 < self.r < 2**31:
            wanted = "positive" if self.r <= 0 else "below 2**31"
            raise ValueError(f"r must be {wanted}, got {self.r}.")
        for name in ("save_projection", "fan_in_fan_out", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if not 0 <= _number("vera_dropout", self.vera_dropout) < 1:
            raise ValueError(f"vera_dropout must be at least 0 and below 1, got {self.vera_dropout}.")
        if not abs(_number("d_initial", self.d_initial)) <= torch.finfo(torch.float32).max:
            raise ValueError(f"d_initial must be finite in float32, got {self.d_initial}.")
        if self.bias not in ("none", "all") and not str(self.bias).endswith("_only"):
            raise ValueError(f"bias must be 'none', 'vera_only' or 'all', got {self.bias!r}.")
        if self.task_type is not None and self.task_type not in _TASKS:
            raise ValueError(f"task_type must be None or one of {_TASKS}, got {self.task_type!r}.")
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be a text or None, got {getattr(self, name)!r}.")
        self._set("target_modules", _names("target_modules", self.target_modules))
        self._set("layers_pattern", _names("layers_pattern", self.layers_pattern))
        saved = _names("modules_to_save", self.modules_to_save)
        if isinstance(saved, str):
            raise ValueError(f"modules_to_save must be a sequence of names, got the string {saved!r}.")
        heads = tuple(name for name in _HEADS.get(self.task_type or "", ()) if name not in (saved or ()))
        self._set("modules_to_save", (*(saved or ()), *heads) or None)
        layers = self.layers_to_transform
        if layers is not None:
            if not isinstance(layers, int | Sequence):
                raise ValueError(f"layers_to_transform must be an index or a sequence of them, got {layers!r}.")
            layers = [layers] if isinstance(layers, int) else list(layers)
            for index in layers:
                _require_integer("layers_to_transform", index)
            self._set("layers_to_transform", tuple(layers) or None)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layer indices are; give layers_to_transform, too.")
        if isinstance(self.target_modules, str):
            if self.layers_to_transform is not None and not _is_all_linear(self.target_modules):
                raise ValueError(
                    "layers_to_transform does not apply to a regular expression; put the indices into "
                    f"target_modules={self.target_modules!r}, or give a list of names."
                )
            _require_expression("target_modules", self.target_modules)
        patterns = self.layers_pattern or ()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            _require_expression("layers_pattern", pattern)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """`(in_features, out_features)` of a layer that can be adapted, or None.

    These are `nn.Linear`, bitsandbytes' linears and transformers' `Conv1D`.

    Example:
        >>> linear_sizes(nn.Linear(3, 5)), linear_sizes(nn.ReLU())
        ((3, 5), None)
    """
    if isinstance(module, nn.Linear):  # bitsandbytes' are, too
        return module.in_features, module.out_features
    if is_conv1d(module):
        weight: Any = module.weight
        in_features, out_features = weight.shape
        return in_features, out_features
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, a linear layer whose weight is (in, out).

    Example:
        >>> is_conv1d(nn.Linear(3, 5))
        False
    """
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)


def resolve(model: nn.Module, config: VeraConfig, *, strict: bool = True) -> tuple[list[str], VeraConfig]:
    """The names of the modules that a configuration targets, in the model's order, and that configuration
    with `target_modules` spelled out where it was None or "all-linear".

    Args:
        model: Any module.
        config: What to match.
        strict: Whether an entry of a list that matches nothing is an error; files that PEFT wrote may have one.

    Raises:
        ValueError: If nothing matches, an entry matches nothing, a match is not a linear layer, or the
            model's type has no default.

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
    if isinstance(targets, str) and _is_all_linear(targets):
        names = [name for name in _all_linear(model, config) if _in_layers(name, config)]
        config = dataclasses.replace(
            config, target_modules=tuple(names) if any(names) else ".*", layers_to_transform=None, layers_pattern=None
        )
    else:
        names = [name for name in modules if _matches(name, targets, config)]
    if not names:
        raise ValueError(f"no module matches target_modules={targets!r}. {_linear_ends(model)}")
    if strict and not is_default and not isinstance(targets, str):
        idle = [t for t in targets if not any(name == t or name.endswith("." + t) for name in modules)]
        if idle:
            raise ValueError(f"target_modules has {idle}, which no module of this model ends in. {_linear_ends(model)}")
    heads = _HEADS.get(config.task_type or "", ())
    idle = [s for s in config.modules_to_save or () if s not in heads and not any(_contains(n, s) for n in modules)]
    if strict and idle:
        raise ValueError(f"modules_to_save has {idle}, which no module of this model ends in.")
    for name in names:
        if linear_sizes(modules[name]) is None:
            raise ValueError(
                f"target module {name!r} is a {type(modules[name]).__name__}; nn.Linear, bitsandbytes' linears and "
                "transformers' Conv1D can be adapted."
            )
    return names, config


def trained_with(model: nn.Module, config: VeraConfig, targets: Sequence[str]) -> list[str]:
    """The model's own parameters that are trained beside the vectors: biases and `modules_to_save`.

    Args:
        model: Any module.
        config: Its `bias` and `modules_to_save`.
        targets: Names of the adapted modules.

    Raises:
        ValueError: If a module to save is quantized.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        >>> trained_with(model, VeraConfig(target_modules=["0"], modules_to_save=["1"]), ["0"])
        ['1.weight', '1.bias']
    """
    own = []
    modules = dict(model.named_modules())
    first_names = {name for name, _ in model.named_parameters()}
    # A head that shares its weight with the embeddings has a second name for it.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        whole = module in modules and _is_saved(module, config)
        if whole and not parameter.is_floating_point():
            raise ValueError(f"modules_to_save trains {name!r}, but it is quantized ({parameter.dtype}).")
        is_bias = leaf == "bias" and (config.bias == "all" or (config.bias != "none" and module in targets))
        if whole or (is_bias and name in first_names):
            own.append(name)
    return own


def _matches(name: str, targets: str | Sequence[str], config: VeraConfig) -> bool:
    if _is_saved(name, config):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return any(name.endswith("." + t) for t in targets) and _in_layers(name, config)


def _in_layers(name: str, config: VeraConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    patterns = config.layers_pattern or (r"[^.]*",)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # The first numbered part is the layer; a later one may be an expert of it.
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if found:
            return int(found[1]) in config.layers_to_transform  # type: ignore[operator]
    return False


def _is_saved(name: str, config: VeraConfig) -> bool:
    return any(_contains(name, saved) for saved in config.modules_to_save or ())


def _contains(name: str, saved: str) -> bool:
    return f".{saved}." in f".{name}."


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if linear_sizes(module) is not None]


def _linear_ends(model: nn.Module) -> str:
    return (
        f"The linear layers of this model end in {sorted({name.rpartition('.')[2] for name in _linear_names(model)})}."
    )


def _all_linear(model: nn.Module, config: VeraConfig) -> list[str]:
    find_head = getattr(model, "get_output_embeddings", None)  # transformers' convention
    head = find_head() if find_head is not None else None
    modules = dict(model.named_modules())
    return [name for name in _linear_names(model) if modules[name] is not head and not _is_saved(name, config)]


def _default_targets(model: nn.Module) -> tuple[str, ...] | str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGETS:
        raise ValueError(
            f"no default target_modules are known for model type {model_type!r}; name them, for instance "
            f"target_modules={sorted({name.rpartition('.')[2] for name in _linear_names(model)})} or 'all-linear'."
        )
    return DEFAULT_TARGETS[model_type]


def _is_all_linear(targets: str) -> bool:
    return targets.lower() == "all-linear"


def _names(field: str, value: _Names) -> str | tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return value or None
    if not isinstance(value, Sequence | set | frozenset):
        raise ValueError(f"{field} must be a name or a sequence of names, got {value!r}.")
    names = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{field} must hold names, got {value!r}.")
    return names or None


def _require_expression(field: str, value: str) -> None:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{field}={value!r} is not a regular expression: {error}.") from error


def _require_integer(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{field} must be an integer, got {value!r}.")


def _number(field: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{field} must be a number, got {value!r}.")
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def peft_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype through which PEFT passes the vectors and projections of an adapter of this layer, if any.

    PEFT casts them to the layer's dtype (for 4 bits, its compute dtype; for 8 bits, not at all) and then to
    float32, so over a 16-bit base the projections are draws rounded to 16 bits.

    Example:
        >>> peft_dtype(nn.Linear(2, 3, dtype=torch.bfloat16))
        torch.bfloat16
    """
    layer: Any = module
    dtype = getattr(layer, "compute_dtype", None) if is_bnb_linear(layer) else layer.weight.dtype
    return dtype if dtype is not None and dtype.is_floating_point else None
