"""`VeraConfig`: the layers to adapt, the rank and the initial values.

If two fields contradict each other, PEFT ignores one of them; here, a `ValueError` is raised.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from .expressions import require_expression


_Names = str | Sequence[str] | None

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeraConfig:
    """The configuration of an adapter: the fields of PEFT's `VeraConfig`, and two fields for DVoRA.

    Attributes:
        r: Rank of the shared projections.
        target_modules: Modules to adapt. A sequence selects modules by full name or by the end of the name after a dot,
            such as "q_proj". A string is a regular expression that must match the full name. "all-linear" selects every
            linear layer except the output head, and None selects the default targets of the model's type.
        projection_prng_key: Seed of the shared projections.
        save_projection: Whether to save the projections with an adapter, as PEFT does by default. If False, only the
            seed is saved. For a base model of the same dtype, the seed reproduces the projections exactly.
        vera_dropout: Dropout probability for the inputs of `A`. Dropout is applied only by `apply.with_dropout`, and is
            independent of `module.training`.
        d_initial: Initial value of `lambda_d`.
        fan_in_fan_out: PEFT's flag for weights stored as (in, out). This flag is saved but otherwise ignored, because
            the layer's class determines the layout.
        bias: Biases to train: "none", "vera_only" (those of adapted layers) or "all" (those of the whole model).
            As in PEFT, any other string that ends in "_only", such as "lora_only", means the same as "vera_only".
        modules_to_save: Further modules to train in full, such as a new classifier. Each entry is the full name of a
            module, or a part of the name between dots. The heads that belong to `task_type` are added to
            `modules_to_save`.
        use_dora: Whether to decompose the adapted weights into magnitudes and directions (DVoRA, see `core.dora`). Each
            adapted layer has a third vector, `magnitude`, of shape (out,). Each call computes the norms of the adapted
            weights; for inference, `fold_magnitude` computes them once. PEFT can't load a DVoRA adapter, but
            `export_lora` converts it to a LoRA.
        differentiate_norm: Whether to differentiate through the norms of DVoRA. If False, the norms are treated as
            constants, as in the DoRA paper.
        init_weights: If True, `lambda_b` is initialized to 0, so that training starts at the base model. If False,
            `lambda_b` is initialized to 1 and `lambda_d` at random (for tests).
        layers_to_transform: Indices of the layers to adapt. A module in a layer whose index is not listed is adapted
            only if `target_modules` contains the module's full name.
        layers_pattern: Name of the module list that contains the layers of `layers_to_transform`.
        task_type: None or one of "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS",
            "FEATURE_EXTRACTION".
        base_model_name_or_path: Name of the base model, saved with the adapter. `adapt` fills in `model.name_or_path`.
        revision: Revision of the base model, saved with the adapter.
        auto_mapping: The base model's class name, and the Python module that defines this class. PEFT's `AutoPeftModel`
            needs `auto_mapping` to load an adapter without a `task_type`. `adapt` adds a missing `auto_mapping`.

    Raises:
        ValueError: If a value is out of range or contradicts another field.

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
    use_dora: bool = False
    differentiate_norm: bool = False
    init_weights: bool = True
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: _Names = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: Mapping[str, str] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        self._check_values()
        self._set("target_modules", _names("target_modules", self.target_modules))
        self._set("layers_pattern", _names("layers_pattern", self.layers_pattern))
        self._set("modules_to_save", _saved(self.modules_to_save, self.task_type))
        self._set("layers_to_transform", _indices(self.layers_to_transform))
        self._check_layers()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_values(self) -> None:
        """Check each field that does not name modules."""
        _require_integer("r", self.r)
        _require_integer("projection_prng_key", self.projection_prng_key)
        if not 0 < self.r < 2**31:
            wanted = "positive" if self.r <= 0 else "below 2**31"
            raise ValueError(f"r must be {wanted}, got {self.r}.")
        for name in ("save_projection", "fan_in_fan_out", "use_dora", "differentiate_norm", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if self.differentiate_norm and not self.use_dora:
            raise ValueError("differentiate_norm=True has no effect without DVoRA: pass use_dora=True as well.")
        if not 0 <= _number("vera_dropout", self.vera_dropout) < 1:
            raise ValueError(f"vera_dropout must be at least 0 and below 1, got {self.vera_dropout}.")
        if not abs(_number("d_initial", self.d_initial)) <= torch.finfo(torch.float32).max:
            raise ValueError(f"d_initial must be finite in float32, got {self.d_initial}.")
        if self.bias not in ("none", "all") and not (isinstance(self.bias, str) and self.bias.endswith("_only")):
            raise ValueError(f"bias must be 'none', 'vera_only' or 'all', got {self.bias!r}.")
        if self.task_type is not None and self.task_type not in _TASKS:
            raise ValueError(f"task_type must be None or one of {_TASKS}, got {self.task_type!r}.")
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be a string or None, got {getattr(self, name)!r}.")
        if not isinstance(self.auto_mapping, Mapping | None):
            raise ValueError(f"auto_mapping must be a dict or None, got {self.auto_mapping!r}.")

    def _check_layers(self) -> None:
        """Check that the fields that select modules are consistent, and that patterns are valid regular expressions."""
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: pass the indices of the layers to adapt.")
        if isinstance(self.target_modules, str):
            if self.layers_to_transform is not None and not is_all_linear(self.target_modules):
                raise ValueError(
                    "layers_to_transform does not apply to a regular expression: include the layer indices in "
                    f"target_modules={self.target_modules!r}, or pass a list of names as target_modules."
                )
            require_expression("target_modules", self.target_modules)
        patterns = self.layers_pattern or ()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            require_expression("layers_pattern", pattern)


def is_all_linear(targets: str) -> bool:
    """Whether a string is "all-linear", in upper or lower case as in PEFT."""
    return targets.lower() == "all-linear"


def _names(field: str, value: _Names) -> str | tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return value or None
    if not isinstance(value, Sequence | set | frozenset):
        raise ValueError(f"{field} must be a name or a sequence of names, got {value!r}.")
    names = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{field} must contain names only, got {value!r}.")
    return names or None


def _saved(value: _Names, task_type: str | None) -> tuple[str, ...] | None:
    """Return `modules_to_save` as a tuple, with the heads of the task."""
    saved = _names("modules_to_save", value)
    if isinstance(saved, str):
        raise ValueError(f"modules_to_save must be a sequence of names, got the string {saved!r}.")
    names = saved or ()
    return (*names, *(head for head in HEADS.get(task_type or "", ()) if head not in names)) or None


def _indices(layers: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if not isinstance(layers, int | Sequence):
        raise ValueError(f"layers_to_transform must be an index or a sequence of indices, got {layers!r}.")
    indices = (layers,) if isinstance(layers, int) else tuple(layers)
    for index in indices:
        _require_integer("layers_to_transform", index)
    return indices or None


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
