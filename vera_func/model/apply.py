"""`Apply`: an `nn.Module` as a pure function `apply(params, frozen, *inputs)`.

`apply` runs a copy of the model's module tree that shares the model's parameters. In the copy, adapted layers replace
the target modules, and a `QuantizedLinear` replaces every bitsandbytes layer, because bitsandbytes' layers do not
support transforms. A call binds the given tensors to the copy, and restores the copy afterwards; see `checkout`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import private
from ..core.autograd import SharedProduct
from ..private import graph_task, tree_leaves, unwrap
from ..quant.cpu_layout import fused_weight
from .base_layers import QuantizedLinear
from .binding import Schema, Slot
from .checkout import Method, Trees, bound_method
from .dense_cache import counted_calls, dense_bytes, dense_dtype, keep_dense
from .layers import WITHOUT_CHECKPOINTING, Projections
from .rows.axes import Axes
from .rows.plans import Plans, arrange, traced_plan, traced_rehearsal
from .tree import join_tensors, no_data_error, part_tensors


# Operations that transforms do not support, as named in torch's error messages.
_REFUSED_BY_TRANSFORMS = ("Tensor.requires_grad_()", "saved tensor hooks")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Apply:
    """A model as a pure function of an adapter: `apply(params, frozen, *args, **kwargs)`.

    A call returns the output of `model(*args, **kwargs)` with the adapter. `apply` supports the transforms of
    `torch.func` if the model's own operations support them. The output depends only on the arguments, and never on
    earlier, nested or concurrent calls. Calls do not modify the model: after the forward pass, `apply` restores batch
    statistics and other state. The adapter's dropout is applied only by `with_dropout`. The base model stays in the
    training or evaluation mode that it had when `adapt` was called. Dropout layers of the base model use torch's global
    generator.

    Notes:
        - If the model uses an `autograd.Function` without `setup_context`, as Bloom does, `torch.func` transforms raise
          an error. Plain autograd, `fit`, `select_adapters` and `vmap_adapters` work with such a model.
        - `torch.func.grad` also records the operations of the backward pass, and therefore needs about twice the
          activation memory of `vera_func.grad`.
        - The adapter's arithmetic has the dtype of the vectors, whatever the dtype of the base model.
        - Under `torch.compile`, the compiler decides what is saved for backward, and may save dequantized weights.

    Raises:
        ValueError: If `params` lacks a key or has an unknown key, or if the shapes of `params`, `frozen` and the batch
            do not match.
        ValueError: If a gradient is required and the model uses activation checkpointing.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> adapted.apply(adapted.params, adapted.frozen, torch.ones(3, 8)).shape
        torch.Size([3, 6])
    """

    model: nn.Module
    targets: tuple[str, ...]
    schema: Schema
    trees: Trees
    int8_activations: bool = False
    product_dtype: torch.dtype | None = None
    generator: torch.Generator | None = None
    row_axes: Axes = 0
    plans: Plans = dataclasses.field(default_factory=Plans)
    absent: str | None = None  # a parameter on the meta device that no hook loads

    traced_plan, traced_rehearsal = traced_plan, traced_rehearsal

    def __call__(self, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return self.method("__call__", params, frozen, *args, **kwargs)

    def generate(self, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run `model.generate(*args, **kwargs)` with one adapter, or with one adapter for each row of the batch.

        If transformers repeats rows (beam search, `num_return_sequences`), each copy of a row uses the row's adapter.
        """
        return self.method("generate", params, frozen, *args, **kwargs)

    def method(
        self, name: Method, /, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a method of the model with the adapter: `apply.method("generate", params, frozen, ...)`.

        `name` may also be a function, which is called as `function(model, *args, **kwargs)`. The function must return
        tensors, not modules of the model. With one adapter per row, `apply` also runs the function on other inputs, to
        find the batch axis of each layer's input (see `rows`). Therefore the function should have no side effects.
        """
        if self.absent is not None:
            self._require_shapes_alone(params, frozen, args, kwargs)
        tensors, lead = self.bind(params, frozen)
        if torch.compiler.is_compiling():
            return self._traced(tensors, lead, name, args, kwargs)
        if self.trees.checkpoints:
            _require_no_gradients(tensors, args, kwargs)
        shared: dict[str, Any] = {
            "projections.product": SharedProduct(),
            "projections.generator": self.generator,
            "projections.call": graph_task(),
            "projections.exact": frozen if self.product_dtype else None,
        }
        tree = self.trees.acquire()
        try:
            if lead:
                shared["projections.rows"] = arrange(self, tree.root, tensors, lead, name, args, kwargs)
            tree.bind(tensors | shared)
            return tree.run(name, args, kwargs)
        except RuntimeError as error:
            if any(sign in str(error) for sign in _REFUSED_BY_TRANSFORMS):
                raise ValueError(
                    "the model uses an operation that torch.func's transforms do not support, such as "
                    f"activation checkpointing: {error} {WITHOUT_CHECKPOINTING}"
                ) from error
            raise
        finally:
            self.trees.release(tree)

    def with_dropout(self, generator: torch.Generator) -> "Apply":
        """Return a copy of `apply` that applies dropout with probability `config.vera_dropout` to the inputs of `A`.

        Masks are drawn from `generator`. Under `torch.func.vmap(..., randomness="different")`, each adapter draws its
        own mask.
        """
        if not isinstance(generator, torch.Generator):
            raise ValueError(
                f"with_dropout needs a torch.Generator to draw masks from, got {type(generator).__name__}."
            )
        return dataclasses.replace(self, generator=generator)

    def with_row_axes(self, axes: Axes) -> "Apply":
        """Return a copy of `apply` for inputs whose batch axis is not axis 0, such as (seq, rows, features).

        The batch axes matter only for calls with one adapter per row. If the size of an input along its batch axis is
        not the number of rows, all rows share this input.

        Args:
            axes: Batch axis of each argument, or None for an argument that all rows share. A single value applies to
                all arguments. A sequence gives the axes of positional arguments, and a mapping gives those of keyword
                arguments; the batch axis of any other argument is 0.

        Raises:
            ValueError: If `axes` is not an axis, None, a sequence or a mapping.

        Example:
            >>> from vera_func import VeraConfig, adapt, stack_adapters
            >>> apply, params, frozen, _ = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
            >>> apply.with_row_axes(1)(stack_adapters([params] * 3), frozen, torch.ones(5, 3, 8)).shape
            torch.Size([5, 3, 6])
        """
        if not (axes is None or isinstance(axes, int | Sequence | Mapping)) or isinstance(axes, str):
            raise ValueError(f"axes must be an int or None, or a sequence or mapping of such values, got {axes!r}.")
        return dataclasses.replace(self, row_axes=axes, plans=Plans())

    def with_fused_weights(self, max_rows: int | None = None) -> "Apply":
        """Return a copy of `apply` that decodes faster in bfloat16, on CPUs with AVX512-BF16.

        The 4-bit weights are copied into the layout of bitsandbytes' kernel. If gradients are disabled and the
        input has few rows, the kernel computes the product without dequantizing the weight. For the costs, see
        `quant.cpu_layout.fused_weight`. On CPUs without AVX512-BF16, and on GPUs, no weights are copied.

        Args:
            max_rows: Largest number of rows (tokens of all sequences) for which the kernel is used. If None, each
                process measures this number once for each format and shape of weights. The measurement times the kernel
                and the dense product, for up to a few tenths of a second. The kernel and the dense product round
                differently, so two processes that measure different numbers may compute different results. With a fixed
                `max_rows`, such as 32, all processes compute the same results.

        Raises:
            ValueError: If `max_rows` is negative, or is neither an integer nor None.
        """
        if max_rows is not None and (not isinstance(max_rows, int) or isinstance(max_rows, bool) or max_rows < 0):
            raise ValueError(f"max_rows must be a non-negative integer or None, got {max_rows!r}.")
        root = self.trees.copy()
        for module in root.modules():
            if isinstance(module, QuantizedLinear):
                module.fused = fused_weight(module.quantized, max_rows)
        return dataclasses.replace(self, trees=Trees(root))

    def with_dense_cache(self, max_bytes: int, *, workload: Callable[["Apply"], Any] | None = None) -> "Apply":
        """Return a copy of `apply` that stores the most used quantized weights as dense copies, in at most `max_bytes`.

        A layer with a dense copy does not dequantize its weight in the forward and backward pass. Forward outputs stay
        the same, bit for bit. A dense copy has `out * in` values. If a 4-bit layer has a `compute_dtype`, this is the
        dtype of the layer's dense copy. Otherwise the dense copy has the dtype of the model's dense parameters. A
        product in any other dtype does not use the dense copy. An `Apply` derived from the returned one, for example by
        `with_dropout`, shares the dense copies. Pickling omits dense copies, and unpickling makes them again.

        After `with_fused_weights`, the fused kernel is used where it is faster than the dense product. On GPUs, only
        8-bit layers get dense copies, because bitsandbytes has fast GPU kernels for 4-bit weights.

        Args:
            max_bytes: Memory for the dense copies.
            workload: A function that takes an `Apply` and makes representative calls. The function runs once, to count
                the calls of each layer. Layers with the most calls get dense copies first, and layers without calls get
                none. Without a workload, layers get dense copies in the order of the model.

        Raises:
            ValueError: If `max_bytes` is not a non-negative integer, or if `workload` is not a function.

        Example:
            >>> from vera_func import VeraConfig, adapt, quantize_model
            >>> model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "nf4")
            >>> apply, params, frozen, _ = adapt(model, VeraConfig(r=4, target_modules=["0"]))
            >>> fast = apply.with_dense_cache(max_bytes=20_000)
            >>> fast.dense_bytes
            16384
            >>> x = torch.ones(3, 64)
            >>> torch.equal(fast(params, frozen, x), apply(params, frozen, x))
            True
        """
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 0:
            raise ValueError(f"max_bytes must be a non-negative number of bytes, got {max_bytes!r}.")
        if workload is not None and not callable(workload):
            raise ValueError(f"workload must be a function that takes an Apply, got {type(workload).__name__}.")
        calls = None
        if workload is not None:
            root = self.trees.copy()
            calls = counted_calls(root)
            workload(dataclasses.replace(self, trees=Trees(root)))
        root = self.trees.copy()
        keep_dense(root, max_bytes, dense_dtype(self.model), calls)
        return dataclasses.replace(self, trees=Trees(root))

    @property
    def dense_bytes(self) -> int:
        """Memory of the dense copies that `with_dense_cache` has stored, in bytes."""
        return dense_bytes(self.trees.root)

    def __repr__(self) -> str:
        return f"Apply({type(self.model).__name__}, {len(self.targets)} adapted layers)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": Plans(), "trees": join_tensors(self.trees.root, self.model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, trees=Trees(part_tensors(state["trees"])))

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The keys that params may have; see `binding`."""
        return self.schema.slots

    def bind(
        self, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
        """Check params and projections, and return the result of `Schema.bind`."""
        return self.schema.bind(params, frozen, self.trees.root, self.product_dtype)

    def _require_shapes_alone(self, *inputs: Any) -> None:
        if not all(leaf.is_meta for leaf in private.tree_leaves(inputs) if isinstance(leaf, Tensor)):
            raise ValueError(no_data_error(str(self.absent), "run"))

    def _traced(
        self,
        tensors: dict[str, Tensor],
        lead: dict[str, tuple[int, ...]],
        name: Method,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        # Dynamo can't trace the free list of trees, so the root is called functionally. Repeated products are not
        # shared here, because the compiler removes them.
        root: Any = self.trees.root
        shared = root.projections
        outer = shared.generator, shared.rows, shared.traced
        values: dict[str, Any] = self.trees.values(inside=shared.traced)
        try:
            shared.generator, shared.traced = self.generator, True
            shared.rows = arrange(self, root, tensors, lead, name, args, kwargs) if lead else {}
            return functional_call(root, values | tensors, (name, args, kwargs), tie_weights=False)
        finally:
            shared.generator, shared.rows, shared.traced = outer


class Root(nn.Module):
    """The root module of a tree, with two children: the model, and the projections that all adapted layers share."""

    def __init__(self, model: nn.Module, projections: Projections) -> None:
        super().__init__()
        self.model = model
        self.projections = projections

    def forward(self, method: Method, args: tuple, kwargs: dict[str, Any]) -> Any:
        return bound_method(self.model, method)(*args, **kwargs)


def _require_no_gradients(tensors: Mapping[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> None:
    given = (value for value in [*tensors.values(), *tree_leaves((args, kwargs))] if isinstance(value, Tensor))
    if torch.is_grad_enabled() and any(value.requires_grad or unwrap(value) is not value for value in given):
        raise ValueError(
            "the model uses activation checkpointing, which runs the layers again in backward. By then, apply has "
            f"returned, and params are no longer bound to the layers. {WITHOUT_CHECKPOINTING}"
        )
