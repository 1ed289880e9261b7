"""Any `nn.Module` to a pure `apply(params, frozen, *inputs)`, by shells around the layers that a config targets.

    apply, params, frozen, config = adapt(model, VeraConfig(r=256, target_modules=["q_proj", "v_proj"]))
    apply(params, frozen, input_ids=ids)  ==  model(input_ids=ids)  +  what the adapter adds

The user's model is read, never called and never changed: `apply` runs a copy of its module tree that shares
the tensors, with every bitsandbytes layer replaced by the value it holds (so that transforms are safe also
where nothing is adapted), and binds the given tensors to it with `torch.func.functional_call`.
"""

import copy
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .adapter import SharedProduct, project, require_float
from .bnb import from_bnb, is_bnb_linear
from .config import VeraConfig, is_conv1d, linear_sizes, peft_dtype, resolve, trained_with
from .layers import Projections, QuantizedLinear, RowwiseAffine, shell_class
from .projection import init_projections
from .quantized import fused_weight


class Slot(NamedTuple):
    """Where a key of `params` goes in the module tree, and what may be put there."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: bool
    required: bool


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Apply:
    """A model as a pure function of an adapter: `apply(params, frozen, *args, **kwargs)`.

    Returns what `model(*args, **kwargs)` returns. It composes with the transforms of `torch.func` as far as
    the model's own operations do, may be called from several threads at once, and has no state: dropout of
    the adapter happens only through `with_dropout`, and whether the base is in training mode was settled when
    `adapt` was called.

    Raises:
        ValueError: If `params` lacks a key, has an unknown one, or a value has the wrong shape; if rows of
            stacked vectors do not match the batch; if `frozen` is of another rank or too narrow.

    Example:
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> adapted.apply(adapted.params, adapted.frozen, torch.ones(3, 8)).shape
        torch.Size([3, 6])
    """

    model: nn.Module
    targets: tuple[str, ...]
    slots: Mapping[str, Slot]
    root: nn.Module
    int8_activations: bool = False
    generator: torch.Generator | None = None
    # functional_call binds tensors to a tree while it runs, so every thread runs a copy of its own of `root`.
    local: threading.local = dataclasses.field(default_factory=threading.local)

    def __call__(self, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return self.method("__call__", params, frozen, *args, **kwargs)

    def generate(self, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """`model.generate(*args, **kwargs)` with the adapter, or with one adapter for each row of the batch.

        transformers repeats rows for beam search and `num_return_sequences`: repeat the adapters, too, with
        `select_adapters`; rows that do not match are an error.
        """
        return self.method("generate", params, frozen, *args, **kwargs)

    def method(
        self, name: str, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        """Any method of the model with the adapter: `apply.method("generate", params, frozen, ...)`."""
        tensors = self._bind(params, frozen)
        root = self._tree()
        shells: list[Any] = (
            [] if self.generator is None else [root.get_submodule(_join("model", t)) for t in self.targets]
        )
        projections: Any = root.projections
        try:
            # The compiler sees by itself what products have in common.
            projections.product = project if torch.compiler.is_compiling() else SharedProduct()
            for shell in shells:
                shell.generator = self.generator
            return functional_call(root, tensors, (name, args, kwargs), tie_weights=False)
        finally:
            projections.product = project
            for shell in shells:
                shell.generator = None

    def with_dropout(self, generator: torch.Generator) -> "Apply":
        """The same function with `config.vera_dropout` applied to the inputs of `A`, drawn from `generator`.

        Under `torch.func.vmap(..., randomness="different")` every adapter draws its own.
        """
        if not isinstance(generator, torch.Generator):
            raise ValueError(
                f"with_dropout needs a torch.Generator, got {type(generator).__name__}; there is no default."
            )
        return dataclasses.replace(self, generator=generator)

    def with_fused_weights(self) -> "Apply":
        """The same function with a second copy of its 4-bit weights, for decoding in bfloat16 on a CPU.

        bitsandbytes has a kernel for CPUs with AVX512-BF16 that needs another layout. Where gradients are disabled it
        multiplies up to 32 rows without dequantizing; see `quantized.fused_weight` for what that costs. On other
        machines nothing is copied.
        """
        root: Any = copy.deepcopy(self.root, _shared(self.root))
        for module in root.modules():
            if isinstance(module, QuantizedLinear):
                module.fused = fused_weight(module.quantized)
        return dataclasses.replace(self, root=root, local=threading.local())

    def __repr__(self) -> str:
        return f"Apply({type(self.model).__name__}, {len(self.targets)} adapted layers)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, local=threading.local())

    def _bind(self, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        slots = self.slots
        missing = [key for key, slot in slots.items() if slot.required and key not in params]
        unknown = [key for key in params if key not in slots]
        if missing or unknown:
            raise ValueError(_key_error(missing, unknown, slots))
        if frozen.keys() != {"vera_A", "vera_B"}:
            raise ValueError(f"frozen must have the keys 'vera_A' and 'vera_B', got {sorted(frozen)}.")
        tensors = {}
        for key, value in params.items():
            names, shape, rows, _ = slots[key]
            if not isinstance(value, Tensor):
                raise ValueError(f"{key!r} must be a tensor, got {type(value).__name__}.")
            if value.shape != shape and not (rows and value.shape[value.dim() - len(shape) :] == shape):
                expected = f"(*rows, {', '.join(map(str, shape))})" if rows else str(shape)
                raise ValueError(f"{key!r} must be {expected}, got {tuple(value.shape)}.")
            tensors.update(dict.fromkeys(names, value))
        for key, value in frozen.items():
            tensors[f"projections.{key}"] = value
        return tensors

    def _tree(self) -> nn.Module:
        # Dynamo can't follow thread-local storage, and binds nothing to the tree that it traces.
        if torch.compiler.is_compiling():
            return self.root
        if not hasattr(self.local, "root"):
            self.local.root = copy.deepcopy(self.root, _shared(self.root))
        return self.local.root


class Adapted(NamedTuple):
    """A model and an adapter of it, as data and a pure function.

    Attributes:
        apply: `apply(params, frozen, *args, **kwargs)`, what the adapted model returns.
        params: What is trained: `"{module}.lambda_b"` (out,), `"{module}.lambda_d"` (r,), and the model's own
            parameters that the configuration trains.
        frozen: `{"vera_A": (r, max in), "vera_B": (max out, r)}`, shared by all layers and adapters.
        config: The configuration, with the targets spelled out.
    """

    apply: Apply
    params: dict[str, Tensor]
    frozen: dict[str, Tensor]
    config: VeraConfig


def adapt(
    model: nn.Module,
    config: VeraConfig,
    *,
    dtype: torch.dtype = torch.float32,
    int8_activations: bool = False,
    generator: torch.Generator | None = None,
) -> Adapted:
    """Make a pure function of a model and a fresh adapter of it; the model stays as it was.

    The adapter starts as PEFT's would: `lambda_b` 0, so that the output is the base's. The copy of the module
    tree shares the parameters' memory; buffers are copied. Move the model to its device first, and choose
    `model.eval()` or `model.train()`, which decides over the base's own dropout, before the call.

    Args:
        model: Any module with `nn.Linear`, bitsandbytes' linear layers or transformers' `Conv1D`.
        config: What to adapt.
        dtype: Dtype of the vectors and of the adapter's arithmetic, whatever the base computes in.
        int8_activations: Multiply 8-bit layers as LLM.int8() does; see `quantized_linear`.
        generator: Where the vectors are drawn from if `config.init_weights` is False; not used otherwise.

    Returns:
        `(apply, params, frozen, config)`.

    Raises:
        ValueError: If nothing in the model matches the configuration, a match cannot be adapted, or `dtype` is not a
            floating-point one.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> apply, params, frozen, config = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> x = torch.ones(3, 8)
        >>> torch.equal(apply(params, frozen, x), model(x))
        True
        >>> {name: tuple(value.shape) for name, value in params.items()}
        {'0.lambda_b': (6,), '0.lambda_d': (4,)}

    Reference:
        https://arxiv.org/abs/2310.11454
    """
    targets, config = resolve(model, config)
    require_float("dtype", dtype)
    if not config.init_weights and not isinstance(generator, torch.Generator):
        raise ValueError("init_weights=False draws the vectors: pass adapt(..., generator=torch.Generator()).")
    frozen = draw_projections(model, config, targets, dtype=dtype)
    trained = trained_with(model, config, targets)
    apply = make_apply(
        model, config.r, targets, trained, vera_dropout=config.vera_dropout, int8_activations=int8_activations
    )
    params = {}
    for name in targets:
        layer = model.get_submodule(name)
        device = frozen["vera_A"].device
        via = peft_dtype(layer) or torch.float32
        out_features = apply.slots[_join(name, "lambda_b")].shape[0]
        if config.init_weights:
            lambda_b = torch.zeros(out_features)
            lambda_d = torch.full((config.r,), config.d_initial)
        else:
            lambda_b = torch.ones(out_features)
            lambda_d = torch.randn(config.r, generator=generator)
        params[_join(name, "lambda_b")] = lambda_b.to(device, via).to(dtype)
        params[_join(name, "lambda_d")] = lambda_d.to(device, via).to(dtype)
    for name in trained:
        params[name] = model.get_parameter(name).detach().clone()
    return Adapted(apply, params, frozen, config)


def to_module(adapted: Adapted) -> nn.Module:
    """The adapted model as an ordinary module of the model's own class, its vectors as trainable parameters.

    For what needs a module: `Trainer`, activation checkpointing (which `torch.func` refuses), a
    `torch.optim` optimizer. It shares the base's memory; the vectors are copies, which
    `{k: p for k, p in module.named_parameters() if p.requires_grad}` reads back under the keys of `params`.

    Args:
        adapted: From `adapt` or `load_adapter`, with the params of a single adapter.

    Raises:
        ValueError: If the params do not fit, or are stacked.

    Example:
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> [name for name, p in to_module(adapted).named_parameters() if p.requires_grad]
        ['0.lambda_b', '0.lambda_d']
    """
    apply, params, frozen, _ = adapted
    tensors = apply._bind(params, frozen)
    for key, value in params.items():
        if value.shape != apply.slots[key].shape:
            raise ValueError(f"{key!r} {tuple(value.shape)} is stacked; a module holds one adapter (unstack_adapters).")
    root: Any = copy.deepcopy(apply.root, _shared(apply.root))
    root.projections.vera_A, root.projections.vera_B = frozen["vera_A"], frozen["vera_B"]
    trained: dict[str, nn.Parameter] = {}
    for key in params:
        for name in apply.slots[key].names:
            owner, _, leaf = name.rpartition(".")
            parameter = trained.setdefault(key, nn.Parameter(tensors[name].detach().clone()))
            setattr(root.get_submodule(owner), leaf, parameter)
    return root.model


def draw_projections(
    model: nn.Module, config: VeraConfig, targets: Sequence[str], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The shared pair that PEFT would draw for these targets, on the device of the first.

    Over a 16-bit base they are draws rounded to 16 bits (see `peft_dtype`), then held in `dtype`.

    Args:
        model: The base model.
        config: Its `r` and `projection_prng_key`.
        targets: Names of the adapted modules; the widest decide the sizes.
        dtype: Of the result.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 20))
        >>> {k: tuple(v.shape) for k, v in draw_projections(model, VeraConfig(r=4), ["0", "1"]).items()}
        {'vera_A': (4, 8), 'vera_B': (20, 4)}
    """
    layers = [model.get_submodule(name) for name in targets]
    sizes = [linear_sizes(layer) or (0, 0) for layer in layers]
    frozen = init_projections(
        config.r, max(size[0] for size in sizes), max(size[1] for size in sizes), config.projection_prng_key
    )
    for via in dict.fromkeys(peft_dtype(layer) for layer in layers):
        if via is not None:
            frozen = {name: value.to(via) for name, value in frozen.items()}
    device = next(layers[0].parameters()).device
    return {name: value.to(device, dtype) for name, value in frozen.items()}


def make_apply(
    model: nn.Module,
    r: int,
    targets: Sequence[str],
    trained: Sequence[str] = (),
    *,
    vera_dropout: float = 0.0,
    int8_activations: bool = False,
) -> Apply:
    """Copy the module tree with shells in it; see `adapt`, which also makes the params.

    Args:
        model: The base model.
        r: Rank of the projections.
        targets: Names of the modules to adapt.
        trained: Names of the model's own parameters that `params` must hold, and may hold row by row.
        vera_dropout: What `Apply.with_dropout` drops with.
        int8_activations: See `quantized_linear`.

    Raises:
        ValueError: If a target cannot be adapted.

    Example:
        >>> make_apply(nn.Sequential(nn.Linear(8, 6)), 4, ["0"])
        Apply(Sequential, 1 adapted layers)
    """
    modules = dict(model.named_modules())
    owners = {name.rpartition(".")[0] for name in trained}
    memo: dict[int, Any] = {id(p): _frozen_alias(p) for p in model.parameters()}
    widest_in = max((linear_sizes(modules[name]) or (0, 0))[0] for name in targets)
    widest_out = max((linear_sizes(modules[name]) or (0, 0))[1] for name in targets)
    # Placeholders: whatever runs without bound tensors fails, rather than computing something.
    projections = Projections(torch.empty(r, widest_in, device="meta"), torch.empty(widest_out, r, device="meta"))
    slots: dict[str, Slot] = {}
    inner: dict[str, str] = {}
    for name, module in modules.items():
        if is_bnb_linear(module):
            layer: Any = QuantizedLinear(*from_bnb(module), int8_activations=_int8(module, int8_activations))
        elif name in owners and (is_conv1d(module) or type(module) in (nn.Linear, nn.LayerNorm)):
            layer = RowwiseAffine(copy.deepcopy(module, memo))
            inner[name] = _join(name, "base_layer")
        elif name in targets:
            layer = copy.deepcopy(module, memo)
        else:
            continue
        if name in targets:
            _require_called(name, modules)
            shell: Any = shell_class(layer)(layer, "default", projections.vera_A, projections.vera_B, r, vera_dropout)
            shell.projections = projections
            for leaf, size in (("lambda_b", shell.out_features), ("lambda_d", r)):
                slots[_join(name, leaf)] = Slot((_join("model", name, leaf),), (size,), True, True)
            slots[_join(name, "mixture")] = Slot((_join("model", name, "mixture"),), (), True, False)
            inner[name] = _join(name, "base_layer", *(["base_layer"] if name in inner else []))
            layer = shell
        memo[id(module)] = layer
    tree = copy.deepcopy(model, memo)
    for module in tree.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # torch's fused inference path reads the weights and would skip the shells.
            module.activation_relu_or_gelu = 0
    for name, aliases in _parameter_aliases(model, trained).items():
        owner, leaf = name.rpartition(".")[::2]
        if is_bnb_linear(modules[owner]) and leaf == "weight":
            continue
        names = tuple(
            _join("model", inner.get(alias.rpartition(".")[0], alias.rpartition(".")[0]), alias.rpartition(".")[2])
            for alias in aliases
        )
        rows = owner in inner or is_bnb_linear(modules[owner])
        shape = tuple(model.get_parameter(name).shape)
        slots[name] = Slot(names, shape, rows and name in trained, name in trained)
    return Apply(model, tuple(targets), slots, _Root(tree, projections), int8_activations)


class _Root(nn.Module):
    def __init__(self, model: nn.Module, projections: Projections) -> None:
        super().__init__()
        self.model = model
        self.projections = projections

    def forward(self, method: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        if method == "__call__":
            return self.model(*args, **kwargs)
        return getattr(self.model, method)(*args, **kwargs)


def _frozen_alias(parameter: nn.Parameter) -> nn.Parameter:
    """The same memory without `requires_grad`, so that no backward reaches the user's parameter."""
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=False)


def _shared(root: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy` under which the copy shares every tensor."""
    memo: dict[int, Any] = {id(t): t for t in (*root.parameters(), *root.buffers())}
    for module in root.modules():
        if isinstance(module, QuantizedLinear):
            memo[id(module.quantized)] = module.quantized
            memo[id(module.fused)] = module.fused
    return memo


def _parameter_aliases(model: nn.Module, trained: Sequence[str]) -> dict[str, list[str]]:
    """Key of each parameter -> all its names, of which a tied one has several.

    A weight that is trained whole is a copy of its own, as in PEFT: training a head leaves the embeddings alone
    that it was tied to. A bias stays tied.
    """

    def place(name: str) -> tuple[int, str]:
        owner, _, leaf = name.rpartition(".")
        return id(model.get_submodule(owner)), leaf

    first = {name for name, _ in model.named_parameters()}
    untied = {place(name) for name in trained if name not in first or not name.endswith("bias")}
    aliases: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(place(name) if place(name) in untied else id(parameter), []).append(name)
    return {next((name for name in names if name in trained), names[0]): names for names in aliases.values()}


def _int8(module: nn.Module, wanted: bool) -> bool:
    return wanted and hasattr(module.weight, "SCB")


def _require_called(name: str, modules: Mapping[str, nn.Module]) -> None:
    parent = modules[name.rpartition(".")[0]] if name else None
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"target module {name!r} is never called: nn.MultiheadAttention reads its weight, so an adapter would "
            "have no effect. Leave it out of target_modules."
        )


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _key_error(missing: list[str], unknown: list[str], slots: Mapping[str, Slot]) -> str:
    required = [key for key, slot in slots.items() if slot.required]
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} of its {len(required)} keys, first {missing[0]!r}")
    if unknown:
        problems.append(f"has {len(unknown)} unknown keys, first {unknown[0]!r}")
    return (
        f"params {', and '.join(problems)}. It must have the keys that adapt returned "
        f"({required[0]!r}, ...); names of the model's own parameters may be added."
    )
