"""An adapter for each row of a batch: where a layer's input holds the rows.

Row `i` of a call is index `i` of axis 0 of the model's inputs. A layer sees only its own input, and no size in it says
where the rows are: models turn (rows, seq) into (seq, rows), flatten both into one axis, pick tokens for an expert, or
send a table of positions through a layer, and any of these axes can be as long as there are rows. So the place is not
guessed from sizes. It is found by rehearsal, once for each kind of call:

    A copy of the model runs on the call's own inputs with another number of rows, a prime that is no size of the model,
    with cheap stand-ins for its linear layers, while every operation is watched (`follow`). It runs a second time with
    another prime. What both runs agree on is where each layer has its rows.

The result is a plan, from the layer's name to its `Layout`. Nearly always the rows are axis 0 of every layer's input,
and the plan is empty: layers multiply by vectors (rows, out) as they do anyway. Elsewhere the layer's input is turned
so that the rows are in front, and the output is turned back. What cannot be followed, or has no rows, is an error that
names the layer. Calls of one kind (the same arguments, with the same number of axes and the same dtypes) share a plan;
where another axis of an input is as long as there are rows, the exact sizes belong to the kind, too.

`generate` calls the model, or parts of it, many times; there every outermost call of a module gets its own plan.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..core.keys import join_key, split_key
from .checkout import Method
from .rehearse import ALONE, Layout, Refusal, Seen, are_equal, axis_of, has_rows, rehearse, tensors_in


Lead: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class MovedRows:
    """Calls a layer with the rows of its input moved to axis 0, and moves the rows of its output back."""

    path: str
    where: Layout | Refusal
    rows: int
    repeats: int = 1

    def call(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Compute `forward(x)`, where `forward` expects the rows in axis 0."""
        if isinstance(self.where, Refusal):
            raise ValueError(f"layer {self.path!r} {self.where.reason} {ALONE}")
        axis, dim, blocks = self.where
        size = x.shape[axis] if x.dim() == dim else 0
        block = size // self.rows
        if size == 0 or size % self.rows or (block % self.repeats if blocks else block != self.repeats):
            raise ValueError(
                f"layer {self.path!r} got {tuple(x.shape)}, where axis {axis} of {dim} should hold {self.rows} rows: "
                f"row i of the inputs goes through adapter i. {ALONE}"
            )
        x = x.movedim(axis, 0)
        y = forward(x) if block == 1 else forward(x.unflatten(0, (self.rows, block))).flatten(0, 1)
        return y.movedim(0, axis).contiguous()  # as a layer's output is


class Plan(NamedTuple):
    """Where the layers of a model have the rows, by their paths, and its outputs; `odd` are layers that are turned."""

    layers: dict[str, Layout | Refusal]
    odd: dict[str, Layout | Refusal]
    outputs: list[Layout | Refusal]


class Plans:
    """The plans that were made for one model, by the kind of call."""

    def __init__(self) -> None:
        self.places: dict[Any, int] = {}
        self.plans: list[Plan] = []

    def find(self, kind: Any) -> int:
        """The number of a plan; -1 if there is none."""
        return self.places.get(kind, -1)

    def add(self, kind: Any, seen: Seen, front: int) -> int:
        """The number of a new plan."""
        odd = {p: where for p, where in seen.layers.items() if where[0] != front or where[2:] != (False,)}
        self.plans.append(Plan(seen.layers, odd, seen.outputs))
        return self.places.setdefault(kind, len(self.plans) - 1)


def arrange(
    apply: Any, root: Any, tensors: dict[str, Tensor], lead: Lead, method: Method, args: tuple, kwargs: dict[str, Any]
) -> Mapping[str, MovedRows]:
    """What the layers have to do in one call whose rows are not in front of their inputs: `projections.rows` of a tree.

    Args:
        apply: The `Apply` that is called.
        root: The tree that runs. Modules that `generate` calls get hooks.
        tensors: What is bound to it; where there is one row, its axis is removed.
        lead: The leading axes of the params that have some.
        method: The name of the model's method, or a function of the model.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: If the rows do not match the inputs, or a layer can't have an adapter for each row.
    """
    rows = _common(lead)
    names = [name for key in lead for name in apply.slots[key].names]
    if rows == (1,):
        _require_rows(apply, lead, rows, args, kwargs, single=True)
        tensors.update({name: tensors[name].squeeze(0) for name in names})
        return {}
    if 0 in rows:
        return {}  # nothing is computed
    if method == "generate":
        if torch.compiler.is_compiling():
            raise ValueError("generate with an adapter for each row can't be compiled as a whole; compile the model.")
        return _Calls(apply, root, lead, rows[0], _layers(root, names), _repeats(apply.model, kwargs)).hooks()
    _require_rows(apply, lead, rows, args, kwargs)
    turns: dict[str, MovedRows] = {}
    for shift, count in enumerate(rows):
        plan = _plan(apply, ("", method, shift), args, kwargs, count)
        if plan.odd:
            turns = _turns(plan.odd, _layers(root, names), count)
        if turns and len(rows) > 1:
            raise ValueError(
                f"the rows {rows} have several axes, which are not in front in layer {next(iter(turns))!r}."
            )
    return turns


def axes_of_outputs(apply: Any, args: tuple, kwargs: dict[str, Any], rows: int) -> list[int | None]:
    """The axis of the rows in every tensor that `apply` returns, in the order of a pytree; None where there is none."""
    outputs = _plan(apply, ("", "__call__", 0), args, kwargs, rows).outputs
    return [where.axis if isinstance(where, Layout) else None for where in outputs]


def _turns(plan: Mapping[str, Layout | Refusal], layers: set[str], rows: int, repeats: int = 1) -> dict[str, MovedRows]:
    """What layers with an adapter for each row have to do."""
    turns = {}
    for path, where in plan.items():
        if path in layers:
            turns[path] = MovedRows(path, where, rows, repeats)
            if isinstance(where, Refusal) and where.called:
                raise ValueError(f"layer {path!r} {where.reason} {ALONE}")
    return turns


def _layers(root: nn.Module, names: list[str]) -> set[str]:
    """The paths of the layers that tensors of the tree belong to."""
    layers: list[Any] = [root.get_submodule(split_key(name)[0]) for name in names]
    return {layer.path for layer in layers}


def path_in_model(path: str) -> str:
    """A path below the model, from one below the root of the tree: `model.fc` -> `fc`."""
    return path.removeprefix("model").removeprefix(".")


class _Calls:
    """Hooks that arrange every outermost call of a module inside of `generate`."""

    def __init__(self, apply: Any, root: Any, lead: Lead, rows: int, layers: set[str], repeats: int) -> None:
        self.apply, self.root, self.lead = apply, root, lead
        self.rows, self.layers, self.repeats = rows, layers, repeats
        self.depth = 0
        outside = Refusal("is called outside of every module that generate calls, where no row can be followed.")
        self.outside = {path: MovedRows(path, outside, rows) for path in layers}

    def hooks(self) -> dict[str, MovedRows]:
        """Register the hooks; what layers have to do outside of every call."""
        paths = {path for layer in self.layers for path in _ancestors(layer)}
        for path in sorted(paths):
            if any(part.isdecimal() for part in path.split(".")):
                continue  # one of many blocks, which only a module around them calls
            module = self.root.get_submodule(join_key("model", path))
            before = functools.partial(self.before, path)
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
            module.register_forward_hook(self.after, always_call=True)
        return self.outside

    @torch.compiler.disable
    def before(self, path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.depth == 0:
            expanded = self.rows * self.repeats
            given = [t for value in (*args, *kwargs.values()) for t in tensors_in(value) if t.dim() > 1]
            repeats = self.repeats if any(tensor.shape[0] == expanded for tensor in given) else 1
            count = self.rows * repeats
            _require_rows(self.apply, self.lead, (count,), args, kwargs)
            plan = _plan(self.apply, (path, "__call__", 0), args, kwargs, count)
            some = plan.odd if repeats == 1 else plan.layers
            self.root.projections.rows = _turns(some, self.layers, self.rows, repeats) if some else {}
        self.depth += 1

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.root.projections.rows = self.outside


def _plan(apply: Any, what: tuple, args: tuple, kwargs: dict[str, Any], count: int) -> Plan:
    """The plan for a call of a method, which is rehearsed the first time; `what` is as in `rehearse`."""
    kind = _kind_of_call(apply, what, args, kwargs, count)
    if torch.compiler.is_compiling():
        number = _known(apply, kind)
        if number < 0:
            number = _rehearsed_shapes(apply, what, kind, _shapes(args), _shapes(kwargs), len(range(count)))
    else:
        number = apply.plans.find(kind)
        if number < 0:
            number = apply.plans.add(kind, rehearse(apply, what, args, kwargs, count), what[2])
    return apply.plans.plans[number]


# The compiler runs these two while it traces, and takes the number that they return for a constant.
@torch.compiler.assume_constant_result
def _known(apply: Any, kind: tuple) -> int:
    return apply.plans.find(kind)


@torch.compiler.assume_constant_result
def _rehearsed_shapes(apply: Any, what: tuple, kind: tuple, args: tuple, kwargs: tuple, count: int) -> int:
    seen = rehearse(apply, what, _from_shapes(args), _from_shapes(kwargs), count)
    return apply.plans.add(kind, seen, what[2])


def _kind_of_call(apply: Any, what: tuple, args: tuple, kwargs: Mapping[str, Any], count: int) -> tuple:
    """What calls have in common that have their rows in the same places."""
    path, method, shift = what
    positional = [_kind(value, count, axis_of(apply.row_axes, i, shift)) for i, value in enumerate(args)]
    named = [(name, _kind(value, count, axis_of(apply.row_axes, name, shift))) for name, value in kwargs.items()]
    # Of a function only the code counts: a lambda is another object each time.
    return (path, getattr(method, "__code__", method), shift), tuple(positional), tuple(named)


def _kind(value: Any, count: int, axis: int | None) -> Any:
    if isinstance(value, Tensor):
        shape = value.shape
        rows = has_rows(shape, count, axis)
        ones = tuple([are_equal(size, 1) for size in shape])
        # As long as the rows: should the model treat such sizes in another way, then it is rehearsed with them.
        same = len([size for size in shape if are_equal(size, count)])
        exact = tuple([len(range(size)) for size in shape]) if same > (1 if rows else 0) else ()
        return value.dtype, rows, ones, exact
    if isinstance(value, Mapping):
        return "mapping", tuple([(key, _kind(item, count, axis)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return "sequence", tuple([_kind(item, count, axis) for item in value])
    if value is None or isinstance(value, bool | int | str | torch.dtype):
        return value
    return type(value).__qualname__


def _shapes(value: Any) -> Any:
    """A description of arguments in constants, for the compiler."""
    if isinstance(value, Tensor):
        # `len(range(n))` is the number that a symbolic size stands for.
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
    """The rows of all params: the longest leading axes, of which all others are the beginning."""
    key, rows = next(iter(lead.items()))
    for other, shape in lead.items():
        if len(shape) > len(rows):
            key, rows = other, shape
    for other, shape in lead.items():
        if shape != rows[: len(shape)]:
            raise ValueError(f"{key!r} has the leading axes {tuple(rows)}, but {other!r} has {tuple(shape)}.")
    return tuple(rows)


def _require_rows(
    apply: Any, lead: Lead, rows: tuple[int, ...], args: tuple, kwargs: dict[str, Any], single: bool = False
) -> None:
    """Refuse inputs of which none has the rows; a single row must be that of the first input."""
    given = [(axis_of(apply.row_axes, i), value) for i, value in enumerate(args)]
    given += [(axis_of(apply.row_axes, name), value) for name, value in kwargs.items()]
    inputs = [(axis, t) for axis, value in given if axis is not None for t in tensors_in(value) if t.dim()]
    asked = inputs[:1] if single else inputs
    if any(has_rows(tensor.shape, rows[0], axis) for axis, tensor in asked) or not inputs:
        return
    axis, x = inputs[0]
    key = next(iter(lead))
    raise ValueError(
        f"{key} {(*lead[key], *apply.slots[key].shape)} has leading axes {tuple(rows)}, which do not match the leading "
        f"axes {tuple(x.shape[:-1])} of x {tuple(x.shape)}, the first input: row i of axis {axis} of the inputs goes "
        "through adapter i. Pass one adapter per row (select_adapters), map over stacked adapters (vmap_adapters, "
        "torch.func.vmap), or say which axis the rows are (apply.with_row_axes)."
    )


def _repeats(model: Any, kwargs: Mapping[str, Any]) -> int:
    """How often transformers' `generate` repeats each row."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    values = [kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    return max(values)


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = split_key(path)[0]
        yield path
