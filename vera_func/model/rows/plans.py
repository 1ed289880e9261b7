"""The layouts of the inputs of all layers, for each kind of call with one adapter per row of a batch.

A rehearsal gives a `Plan`, which maps the path of each layer to the layout of the layer's input. In most models, axis 0
is the batch axis of every layer's input, and vectors (rows, out) are broadcast over the other axes. If the batch axis
of a layer's input is not axis 0, `MovedRows` moves the axis to 0, and moves it back in the output. If the rows in a
layer's input can't be tracked, an error names the layer.

Calls of the same kind use the same plan. Two calls are of the same kind if they have the same arguments, with the same
numbers of axes and the same dtypes. All sizes of an input must also be equal if an axis of the input, other than its
batch axis, has the number of rows as its size.

`generate` calls the model, or modules in it, many times. Each outermost module call in `generate` has its own plan,
which also covers the module calls inside it.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ...core.keys import join_key, split_key
from ...private import constant_when_traced
from ..checkout import Method
from .axes import ALONE, Callee, Layout, Refusal, Seen, are_equal, axis_of, has_rows, tensors_in
from .rehearse import rehearse


if TYPE_CHECKING:
    from ..apply import Apply, Root


Lead: TypeAlias = Mapping[str, tuple[int, ...]]
MOST_PLANS = 256


@dataclasses.dataclass(frozen=True)
class MovedRows:
    """Calls a layer with the batch axis of the input moved to axis 0, and moves the batch axis of the output back."""

    path: str
    where: Layout | Refusal
    rows: int
    repeats: int = 1

    def call(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Compute `forward(x)`, where `forward` expects batch axis 0, and `x` has the batch axis `where.axis`."""
        if isinstance(self.where, Refusal):
            raise ValueError(f"layer {self.path!r} {self.where.reason} {ALONE}")
        axis, dim, blocks = self.where
        size = x.shape[axis] if dim in (0, x.dim()) else 0
        block = size // self.rows
        if size == 0 or size % self.rows or (block % self.repeats if blocks else block != self.repeats):
            raise ValueError(
                f"layer {self.path!r} must get {self.rows} rows along axis {axis} of an input with {dim} axes, so that "
                f"row i uses adapter i, got shape {tuple(x.shape)}. {ALONE}"
            )
        x = x.movedim(axis, 0)
        y = forward(x) if block == 1 else forward(x.unflatten(0, (self.rows, block))).flatten(0, 1)
        return y.movedim(0, axis).contiguous()  # the output of a linear layer is contiguous


class Plan(NamedTuple):
    """The layouts of the layers' inputs, keyed by layer path, and of the model's outputs.

    Attributes:
        layers: Layouts of the inputs of all layers.
        front: Number of axes of the layer's input, keyed by layer path, for the layers whose input is not moved.
        odd: Layouts of the inputs of the layers that are not in `front`.
        outputs: Layouts of the tensors that the call returns.
    """

    layers: dict[str, Layout | Refusal]
    front: dict[str, int]
    odd: dict[str, Layout | Refusal]
    outputs: list[Layout | Refusal]


class Plans:
    """The plans for one model, keyed by kind of call.

    Attributes:
        found: At most `MOST_PLANS` plans.
        traced: Number of plans that compiled functions use. Compiled functions read plans from the attributes
            `traced_0`, `traced_1`, ..., because the compiler does not see later changes of a list or dict.
    """

    def __init__(self) -> None:
        self.found: dict[Hashable, Plan] = {}
        self.traced = 0

    def add(self, kind: Hashable, seen: Seen, front: int) -> Plan:
        """Make a plan from the layouts that a rehearsal found. An input whose batch axis is `front` is not moved."""
        if len(self.found) >= MOST_PLANS:
            self.found.clear()
        plan = Plan(seen.layers, {}, {}, seen.outputs)
        for path, where in seen.layers.items():
            if isinstance(where, Layout) and where.axis == front and not where.blocks:
                plan.front.update({path: where.dim} if where.dim else {})
            else:
                plan.odd[path] = where
        return self.found.setdefault(kind, plan)


def arrange(
    apply: "Apply",
    root: "Root",
    tensors: dict[str, Tensor],
    lead: Lead,
    method: Method,
    args: tuple,
    kwargs: dict[str, Any],
) -> Mapping[str, MovedRows | int]:
    """Return `projections.rows` for one call, a mapping keyed by layer path.

    If the batch axis of a layer's input is axis 0, the value for this layer is the input's number of axes. Otherwise,
    the value is a `MovedRows`. `root` is the root of the module tree that runs. For `generate`, hooks are registered on
    the modules of this tree. `tensors` maps names to the tensors to bind. If there is a single row, `arrange` removes
    the axis of rows from the params in `tensors`. `lead` maps keys of params to the leading axes of their values.

    Raises:
        ValueError: If the leading axes of params do not match the inputs, or if the rows in a layer's input can't be
            tracked.
    """
    rows = _common(lead)
    if rows == (1,):
        _require_rows(apply, lead, 1, args, kwargs, single=True)
        names = [name for key in lead for name in apply.slots[key].names]
        tensors.update({name: tensors[name].squeeze(0) for name in names})
        return {}
    if 0 in rows:
        return {}  # no rows: all outputs are empty
    if method == "generate":
        if torch.compiler.is_compiling():
            raise ValueError(
                "generate with an adapter for each row can't be compiled: call it outside of torch.compile."
            )
        return _Calls(apply, root, lead, rows[0], _repeats(apply.model, kwargs)).hooks()
    for shift, count in enumerate(rows):
        plan = _plan(apply, Callee("", method, shift), args, kwargs, count, None if shift else lead)
        moved = _moved_rows(plan.odd, _layers(apply, root, lead), count) if plan.odd else {}
        if moved and len(rows) > 1:
            raise ValueError(
                f"params have the leading axes {rows}, which are not the first axes of the input of layer "
                f"{next(iter(moved))!r}: pass params with a single leading axis (rows,)."
            )
    return {**plan.front, **moved} if moved else plan.front


def axes_of_outputs(apply: "Apply", args: tuple, kwargs: dict[str, Any], rows: int) -> list[int | None]:
    """Return the batch axis of each tensor that `apply` returns (None if it has no batch axis), in pytree order."""
    outputs = _plan(apply, Callee("", "__call__"), args, kwargs, rows).outputs
    return [where.axis if isinstance(where, Layout) else None for where in outputs]


def _moved_rows(
    plan: Mapping[str, Layout | Refusal], layers: set[str], rows: int, repeats: int = 1
) -> dict[str, MovedRows]:
    """Create a `MovedRows` for each layer of a plan whose parameters differ between rows."""
    moved = {}
    for path, where in plan.items():
        if path in layers:
            moved[path] = MovedRows(path, where, rows, repeats)
            if isinstance(where, Refusal) and where.called:
                raise ValueError(f"layer {path!r} {where.reason} {ALONE}")
    return moved


def _layers(apply: "Apply", root: nn.Module, lead: Lead) -> set[str]:
    """Return the paths of the layers whose parameters differ between rows."""
    names = [name for key in lead for name in apply.slots[key].names]
    layers: list[Any] = [root.get_submodule(split_key(name)[0]) for name in names]
    return {layer.path for layer in layers}


def path_in_model(path: str) -> str:
    """Convert a path in the tree to a path in the model: `model.fc` -> `fc`."""
    return path.removeprefix("model").removeprefix(".")


class _Calls:
    """Hooks that find a plan for each outermost module call in `generate`."""

    def __init__(self, apply: "Apply", root: "Root", lead: Lead, rows: int, repeats: int) -> None:
        self.apply, self.root, self.lead, self.rows, self.repeats = apply, root, lead, rows, repeats
        self.layers = _layers(apply, root, lead)
        self.depth = 0
        outside = Refusal("is called by generate itself, where the rows of its input can't be tracked.")
        self.outside = {path: MovedRows(path, outside, rows) for path in self.layers}

    def hooks(self) -> dict[str, MovedRows]:
        """Register the hooks, and return a `MovedRows` for each layer.

        If `generate` calls a layer outside of all modules with hooks, the layer's `MovedRows` raises an error.
        """
        untraced = torch.compiler.disable  # imports the compiler, which takes a second
        paths = {path for layer in self.layers for path in _ancestors(layer)}
        for path in sorted(paths):
            if any(part.isdecimal() for part in path.split(".")):
                continue  # one of many blocks, which is called by a containing module
            module = self.root.get_submodule(join_key("model", path))
            before = functools.partial(untraced(self.before), path)
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
            module.register_forward_hook(untraced(self.after), always_call=True)
        return self.outside

    def before(self, path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.depth == 0:
            expanded = self.rows * self.repeats
            given = [t for value in (*args, *kwargs.values()) for t in tensors_in(value) if t.dim() > 1]
            repeats = self.repeats if any(tensor.shape[0] == expanded for tensor in given) else 1
            count = self.rows * repeats
            plan = _plan(self.apply, Callee(path, "__call__"), args, kwargs, count, self.lead)
            moved = _moved_rows(plan.odd if repeats == 1 else plan.layers, self.layers, self.rows, repeats)
            self.root.projections.rows = {**plan.front, **moved} if moved else plan.front
        self.depth += 1

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.root.projections.rows = self.outside


def _plan(
    apply: "Apply", callee: Callee, args: tuple, kwargs: dict[str, Any], count: int, lead: Lead | None = None
) -> Plan:
    """Return the plan for a call, and rehearse the call if it has no plan yet."""
    kind = _kind_of_call(apply, callee, args, kwargs, count)
    if torch.compiler.is_compiling():
        name = apply.traced_plan(kind)
        if not name:
            if lead:
                _require_rows(apply, lead, count, args, kwargs)
            name = apply.traced_rehearsal(tuple(callee), kind, _shapes(args), _shapes(kwargs), len(range(count)))
        return getattr(apply.plans, name)
    plan = apply.plans.found.get(kind)
    if plan is None:
        if lead:
            _require_rows(apply, lead, count, args, kwargs)
        plan = apply.plans.add(kind, rehearse(apply, callee, args, kwargs, count), callee.shift)
    return plan


# The compiler runs these two functions while it traces, and treats the returned name as a constant. They are methods of
# `Apply`, because the compiler of torch 2.11 can't pass an `Apply` as an argument to such a function.
@constant_when_traced
def traced_plan(apply: "Apply", kind: tuple) -> str:
    """Return the name of the attribute that stores the plan, or "" if there is no plan for this kind of call."""
    plan = apply.plans.found.get(kind)
    if plan is None:
        return ""
    name = f"traced_{apply.plans.traced}"
    setattr(apply.plans, name, plan)
    apply.plans.traced += 1
    return name


@constant_when_traced
def traced_rehearsal(
    apply: "Apply", callee: tuple[str, Method, int], kind: tuple, args: tuple, kwargs: tuple, count: int
) -> str:
    """Rehearse a call with arguments of these shapes, and return the name of the attribute that stores the plan."""
    # The compiler passes a NamedTuple in another form.
    seen = rehearse(apply, Callee(*callee), _from_shapes(args), _from_shapes(kwargs), count)
    apply.plans.add(kind, seen, Callee(*callee).shift)
    return traced_plan(apply, kind)


def _kind_of_call(apply: "Apply", callee: Callee, args: tuple, kwargs: Mapping[str, Any], count: int) -> tuple:
    """Return a hashable key that is equal for calls that use the same plan."""
    path, method, shift = callee
    positional = [_kind(value, count, axis_of(apply.row_axes, i, shift)) for i, value in enumerate(args)]
    named = [(name, _kind(value, count, axis_of(apply.row_axes, name, shift))) for name, value in kwargs.items()]
    # Functions are compared by their code, because a lambda is a new object in each call.
    return (path, getattr(method, "__code__", method), shift), tuple(positional), tuple(named)


def _kind(value: Any, count: int, axis: int | None) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, *_kind_of_shape(value.shape, count, axis)
    if isinstance(value, Mapping):
        return "mapping", tuple([(key, _kind(item, count, axis)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return "sequence", tuple([_kind(item, count, axis) for item in value])
    if value is None or isinstance(value, bool | int | torch.dtype) or (isinstance(value, str) and len(value) < 64):
        return value
    return type(value).__qualname__  # the layout does not depend on the value of a number, a text or an object


def _kind_of_shape(shape: torch.Size, count: int, axis: int | None) -> tuple:
    """Return the number of axes of a shape, whether `axis` has size `count`, the axes of size 1, and a tuple of sizes.

    The tuple contains all sizes if an axis other than the batch axis has size `count`, because that axis could be
    mistaken for the batch axis. Otherwise, the tuple is empty.
    """
    rows = has_rows(shape, count, axis)
    if torch.compiler.is_compiling():
        ones = tuple([i for i, size in enumerate(shape) if are_equal(size, 1)])
        same = len([size for size in shape if are_equal(size, count)])
    else:
        ones = tuple([i for i, size in enumerate(shape) if size == 1]) if 1 in shape else ()
        same = shape.count(count)
    exact = tuple([len(range(size)) for size in shape]) if same > (1 if rows else 0) else ()
    return len(shape), rows, ones, exact


def _shapes(value: Any) -> Any:
    """Describe arguments by their shapes, dtypes and devices, which are constants for the compiler."""
    if isinstance(value, Tensor):
        # `len(range(n))` converts a symbolic size to an integer.
        return "tensor", tuple([len(range(size)) for size in value.shape]), value.dtype, str(value.device)
    if isinstance(value, Mapping):
        return "mapping", tuple([(key, _shapes(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return "sequence", tuple([_shapes(item) for item in value])
    return "value", value


def _from_shapes(shapes: tuple) -> Any:
    kind = shapes[0]
    if kind == "tensor":
        return torch.ones(shapes[1], dtype=shapes[2], device=shapes[3])
    if kind == "mapping":
        return {key: _from_shapes(item) for key, item in shapes[1]}
    return tuple(_from_shapes(item) for item in shapes[1]) if kind == "sequence" else shapes[1]


def _common(lead: Lead) -> tuple[int, ...]:
    """Return the longest tuple in `lead`, or raise an error if another tuple is not a prefix of the longest."""
    key, rows = next(iter(lead.items()))
    if len(set(lead.values())) == 1:
        return rows
    for other, shape in lead.items():
        if len(shape) > len(rows):
            key, rows = other, shape
    for other, shape in lead.items():
        if shape != rows[: len(shape)]:
            raise ValueError(
                f"{key!r} has the leading axes {tuple(rows)}, but {other!r} has {tuple(shape)}: pass the same number "
                "of rows for all keys."
            )
    return rows


def _require_rows(
    apply: "Apply", lead: Lead, rows: int, args: tuple, kwargs: dict[str, Any], single: bool = False
) -> None:
    """Raise an error if no input has size `rows` along its batch axis. With `single`, check only the first input."""
    given = [(axis_of(apply.row_axes, i), value) for i, value in enumerate(args)]
    given += [(axis_of(apply.row_axes, name), value) for name, value in kwargs.items()]
    inputs = [(axis, t) for axis, value in given if axis is not None for t in tensors_in(value) if t.dim()]
    asked = inputs[:1] if single else inputs
    if any(has_rows(tensor.shape, rows, axis) for axis, tensor in asked) or not inputs:
        return
    axis, x = inputs[0]
    key = next(iter(lead))
    raise ValueError(
        f"{key} {(*lead[key], *apply.slots[key].shape)} has leading axes {(rows,)}, which do not match axis {axis} "
        f"of the first input, of shape {tuple(x.shape)}. Index i of axis {axis} of each input uses adapter i. "
        "Pass one adapter per row (select_adapters), map over stacked adapters (vmap_adapters, "
        "torch.func.vmap), or set the batch axis (apply.with_row_axes)."
    )


def _repeats(model: Any, kwargs: Mapping[str, Any]) -> int:
    """Return the number of copies that transformers' `generate` makes of each row."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    values = [kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    return max(values)


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = split_key(path)[0]
        yield path
