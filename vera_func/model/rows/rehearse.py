"""Rehearse a call: run a copy of the model with another number of rows, to find the batch axis of each layer's input.

A rehearsal uses the values of the call's inputs, because the control flow of a model may depend on the values. The rows
of the inputs are repeated cyclically up to the wanted number. Cheap stand-ins replace linear layers, and hooks are
removed. Inside transforms and under the compiler, where the values are unknown, tensors filled with 1 replace the
inputs. Rehearsals with large inputs run on tensors without data (`fake_tensors`), unless the model can't run on such
tensors, for example because of data-dependent routing.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...core.keys import join_key
from ...private import clear_hooks, fake_tensors, tree_leaves, unwrap, watch_operations
from ..base_layers import DenseLinear, QuantizedLinear, RowwiseAffine
from ..checkout import bound_method
from ..layers import AdaptedLinear, layer_sizes
from ..linears import is_conv1d
from .axes import ALONE, Callee, Layout, Refusal, Seen, axis_of, has_rows, tensors_in
from .follow import NOWHERE, Follower, Lost, Place, mark, place_of


if TYPE_CHECKING:
    from ..apply import Apply


# A rehearsal with more values than this runs on tensors without data. For fewer values, that would be slower.
LARGE = 2**26
_STATISTICS = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


class _TooLarge(Exception):
    pass


def rehearse(apply: "Apply", callee: Callee, args: tuple, kwargs: Mapping[str, Any], count: int) -> Seen:
    """Find the batch axis of each layer's input during a call of `apply`, and of each output of the call.

    `count` is the number of rows.

    Raises:
        ValueError: If the model can't run with a number of rows other than `count`, or if the model computes batch
            statistics.
    """
    root = apply.trees.root
    for module in root.modules():
        if isinstance(module, _STATISTICS) and (module.training or module.running_mean is None):
            raise ValueError(
                f"a {type(module).__name__} in training mode computes its statistics over all rows, so that adapters "
                "affect each other. Run one adapter at a time, or adapt the model in eval mode."
            )
    inputs = [tensor for value in (*args, *kwargs.values()) for tensor in tensors_in(value)]
    call = _Call(apply, callee, args, kwargs, count, inputs)
    sizes = {size for tensor in (*inputs, *root.parameters()) for size in tensor.shape if size}
    primes = [p for p in (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43) if all(size % p for size in sizes)]
    runs: list[Seen] = []
    # A new thread does not inherit the caller's transforms, modes and contexts.
    with ThreadPoolExecutor(1) as thread:
        for prime in [*primes, 7, 11, 13][:3]:
            runs.append(_first_that_runs(thread, call, prime))
            refused = any(isinstance(where, Refusal) and where.called for run in runs for where in run.layers.values())
            if len(runs) == 2 and runs[0] == runs[1] and not refused:
                break
    layers = {path: _confirmed([run.layers[path] for run in runs]) for path in runs[0].layers}
    return Seen(layers, [_confirmed(list(found)) for found in zip(*(run.outputs for run in runs), strict=False)])


def _confirmed(found: list[Layout | Refusal]) -> Layout | Refusal:
    """Return the layout on which at least two rehearsals agree, or a `Refusal` if there is none."""
    layouts = [where for where in found if isinstance(where, Layout) and found.count(where) > 1]
    refusals = [where for where in found if isinstance(where, Refusal)]
    return (layouts or refusals or [Refusal("has its rows along different axes in each run.")])[0]


def _first_that_runs(thread: ThreadPoolExecutor, call: "_Call", prime: int) -> Seen:
    """Rehearse with the first interpretation of the inputs for which the model runs.

    With a wrong interpretation, the sizes of the inputs do not match, and the model raises an error.
    """
    first: Exception | None = None
    for reading in call.readings():
        for fake, limit in ((False, LARGE), (True, None), (False, None)):
            try:
                return thread.submit(_Rehearsal(call, prime, reading, fake, limit).run).result()
            except _TooLarge:
                continue
            except Exception as error:
                first = first or (None if fake else error)
                if not fake:
                    break
    raise ValueError(
        "one adapter per row requires the batch axis of each layer's input. To find these axes, the model was run with "
        f"other numbers of rows, which failed: {type(first).__name__}: {first}. {ALONE} If the batch axis of an input "
        "is not axis 0, set it with apply.with_row_axes."
    ) from first


class _Call:
    """The call to rehearse, with the relevant state of the caller's thread."""

    def __init__(
        self,
        apply: "Apply",
        callee: Callee,
        args: tuple,
        kwargs: Mapping[str, Any],
        count: int,
        inputs: list[Tensor],
    ) -> None:
        self.apply, self.args, self.kwargs, self.count, self.inputs = apply, args, kwargs, count, inputs
        self.callee = callee
        self.device = torch.get_default_device()
        devices = {tensor.device for tensor in (*inputs, *apply.model.parameters())}
        self.cuda = [device.index for device in devices if device.type == "cuda"]
        types = {device.type for device in devices if device.type != "meta"}
        self.autocasts = [(kind, torch.get_autocast_dtype(kind)) for kind in types if torch.is_autocast_enabled(kind)]

    def readings(self) -> list[Callable[[Tensor, int | None], str]]:
        """Return the possible interpretations of the inputs, as functions of a tensor and its supposed batch axis.

        Such a function returns "rows" if the supposed axis is the batch axis, "shared" if all rows share the tensor,
        and "parts" if each row has several consecutive entries of axis 0, such as the patches of an image. An axis
        whose size is the number of rows need not be the batch axis: positions (seq,) or a mask (seq, seq) may have this
        size by chance. For the first input with several axes, every function returns "rows" if the supposed batch axis
        has the number of rows as its size.
        """
        main = next((tensor for tensor in self.inputs if tensor.dim() > 1), None)

        def plain(tensor: Tensor, axis: int | None) -> str:
            return "rows" if has_rows(tensor.shape, self.count, axis) else "shared"

        def without_vectors(tensor: Tensor, axis: int | None) -> str:
            doubtful = main is not None and tensor.shape == (self.count,)
            return "shared" if doubtful else plain(tensor, axis)

        def without_squares(tensor: Tensor, axis: int | None) -> str:
            doubtful = tensor is not main and list(tensor.shape).count(self.count) > 1
            return "shared" if doubtful else without_vectors(tensor, axis)

        def in_parts(tensor: Tensor, axis: int | None) -> str:
            several = tensor.dim() > 1 and tensor.shape[0] > 1 and plain(tensor, axis) == "shared"
            return "parts" if several else plain(tensor, axis)

        readings = [plain, without_vectors, without_squares, in_parts]
        found = [[reading(tensor, 0) for tensor in self.inputs] for reading in readings]
        return [reading for i, reading in enumerate(readings) if found[i] not in found[:i]]


class _Rehearsal:
    """One run of a copy of the model with a changed number of rows."""

    def __init__(
        self,
        call: _Call,
        prime: int,
        reading: Callable[[Tensor, int | None], str],
        fake: bool,
        limit: int | None,
    ) -> None:
        self.call, self.reading, self.fake, self.limit = call, reading, fake, limit
        # If an input has parts, all inputs are repeated as a whole, so that parts stay with their rows.
        self.times = prime if any(reading(tensor, 0) == "parts" for tensor in call.inputs) else 0
        self.rows = prime * call.count if self.times else prime
        self.follower = Follower(self.rows)
        self.paths: list[str] = []
        self.seen: dict[str, list[Layout | Refusal]] = {}
        self.numbers, self.width = 0, 1

    def run(self) -> Seen:
        """Run the copy and return the layouts."""
        call = self.call
        tree = call.apply.trees.acquire()
        try:
            tree.bind({})
            self._prepare(tree.root)
            method = bound_method(tree.root.get_submodule(join_key("model", call.callee.path)), call.callee.method)
            with contextlib.ExitStack() as contexts:
                contexts.enter_context(torch.random.fork_rng(call.cuda))
                contexts.enter_context(torch.no_grad())
                if call.device.type != "cpu":
                    contexts.enter_context(call.device)
                for device_type, dtype in call.autocasts:
                    contexts.enter_context(torch.autocast(device_type, dtype))
                if self.fake:
                    contexts.enter_context(fake_tensors())
                axes = functools.partial(axis_of, call.apply.row_axes, shift=call.callee.shift)
                memo: dict[int, Any] = {}
                args = tuple(self._copy(value, axes(i), memo) for i, value in enumerate(call.args))
                kwargs = {name: self._copy(value, axes(name), memo) for name, value in call.kwargs.items()}
                contexts.enter_context(watch_operations(self.follower))
                outputs = tree_leaves(method(*args, **kwargs))
        finally:
            call.apply.trees.release(tree)
        uncalled = Refusal("was not called when the model ran to find the rows: its rows are not known.", called=False)
        layers = {path: _agreed(self.seen.get(path, [uncalled])) for path in self.paths}
        return Seen(layers, [self._where(x, x.dim()) for x in outputs if isinstance(x, Tensor)])

    def _prepare(self, tree: nn.Module) -> None:
        """Replace the linear layers of a tree by stand-ins that record the layouts of their inputs."""
        module: Any
        for module in tree.modules():
            clear_hooks(module)  # hooks must not observe the rehearsal
            module.training = False  # disables dropout
            ours = isinstance(module, QuantizedLinear | RowwiseAffine | AdaptedLinear)
            path = module.path if ours and module.projections is not None else None
            width = _width(module)
            if path is not None:
                self.paths.append(path)
            if width is not None or path is not None:
                module.forward = functools.partial(self._stand_in, path, width, module.forward)
            self.width = max(self.width, width or 1)

    def _stand_in(self, path: str | None, width: int | None, forward: Callable[..., Any], x: Tensor) -> Tensor:
        if path is not None:
            self.seen.setdefault(path, []).append(self._where(x, x.dim() - 1))
        if width is None:
            return forward(x)
        y = x.mean(-1, keepdim=True)
        if width > 8 * x.shape[-1]:  # such as logits of a vocabulary, which would take most of the memory
            return y.expand(*x.shape[:-1], width)
        return x.new_zeros((*x.shape[:-1], width)) + y

    def _where(self, x: Tensor, dims: int) -> Layout | Refusal:
        """Return the layout of a tensor, or a `Refusal` if its batch axis is unknown or not in `range(dims)`."""
        place, rows, shape = place_of(x), self.rows, tuple(x.shape)
        if place is None:  # a constant, such as learned queries expanded to all rows
            axes = [axis for axis in range(dims) if shape[axis] == rows]
            place = Place(axes[0], 1) if len(axes) == 1 else NOWHERE
        if place is NOWHERE:
            return Refusal(
                f"has an input of shape {shape} without an axis of rows, such as a table that all rows share."
            )
        if isinstance(place, Lost) or not 0 <= place.axis < dims:
            return Refusal("has its rows in an order that is not known in advance, such as tokens routed to an expert.")
        if shape[place.axis] == rows:
            return Layout(place.axis, x.dim(), False)
        if place.inner is not None and place.inner * rows == shape[place.axis]:
            if self.follower.chose:
                return Refusal(
                    f"has an input of shape {shape} whose rows depend on the data: the model selects entries by a mask."
                )
            return Layout(place.axis, x.dim(), True)
        return Refusal(f"has its rows in an unknown order along axis {place.axis} of an input of shape {shape}.")

    def _copy(self, value: Any, axis: int | None, memo: dict[int, Any]) -> Any:
        """Copy an argument, and replace its tensors by tensors with the number of rows of this rehearsal."""
        for tensor in tensors_in(value):
            if id(tensor) not in memo:
                memo[id(tensor)] = self._resized(tensor, axis)
        try:
            with _Resize(functools.partial(self._resized, axis=axis)):
                return copy.deepcopy(value, memo)
        except TypeError:  # objects that can't be copied, such as locks, are shared
            if type(value) is dict:
                return {key: self._copy(item, axis, memo) for key, item in value.items()}
            if type(value) in (list, tuple):
                return type(value)([self._copy(item, axis, memo) for item in value])
            return value

    def _resized(self, tensor: Tensor, axis: int | None) -> Tensor:
        count, held = self.call.count, self.reading(tensor, axis)
        rows = held == "rows" and axis is not None
        shape = list(tensor.shape)
        if rows:
            shape[axis or 0] = self.rows
        elif held == "parts":
            shape[0] *= self.times
        if self.fake:
            new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        else:
            # Estimate: each token, or its hidden state, takes as many values as the widest layer has outputs.
            wide = not tensor.is_floating_point() or tensor.dim() == 3
            tokens = torch.Size(shape if not tensor.is_floating_point() else shape[:-1]).numel()
            self.numbers += tokens * self.width if wide else tensor.numel()
            if self.limit is not None and self.numbers > self.limit:
                raise _TooLarge
            if unwrap(tensor) is not tensor or type(tensor) not in (Tensor, nn.Parameter):
                new = torch.ones(
                    shape, dtype=tensor.dtype, device=tensor.device
                )  # a tensor of a transform has no values here
            elif rows or held == "parts":
                along, size = (axis or 0, count) if rows else (0, tensor.shape[0])
                order = torch.arange(shape[along], device=tensor.device) % size
                new = tensor.detach().index_select(along, order)
            else:
                new = tensor.detach().clone()
        if held != "parts":  # parts are not followed: a layer that gets them as input has no rows
            mark(new, Place((axis or 0) % tensor.dim(), 1) if rows else NOWHERE)
        return new


class _Resize(TorchFunctionMode):
    """A mode in which `copy.deepcopy` copies each tensor by calling a function."""

    def __init__(self, resized: Callable[[Tensor], Tensor]) -> None:
        self.resized = resized

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self.resized(args[0])
        return func(*args, **(kwargs or {}))


def _agreed(found: list[Layout | Refusal]) -> Layout | Refusal:
    refusals = [where for where in found if isinstance(where, Refusal)]
    if refusals:
        return refusals[0]
    layouts = {where for where in found if isinstance(where, Layout)}
    if len(layouts) == 1:
        return found[0]
    if len({(where.axis, where.blocks) for where in layouts}) == 1:
        return layouts.pop()._replace(dim=0)
    return Refusal("has its rows along different axes in different calls.")


def _width(module: nn.Module) -> int | None:
    """Return the output size of a linear layer of the tree, or None for any other module."""
    if isinstance(module, RowwiseAffine):
        return _width(module.base_layer)
    if isinstance(module, AdaptedLinear):
        return module.out_features
    if isinstance(module, QuantizedLinear) or type(module) in (nn.Linear, DenseLinear) or is_conv1d(module):
        return layer_sizes(module)[1]
    return None
