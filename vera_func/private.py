"""Private names of other libraries, each with the reason why it is used.

No other module uses private names. A test fails if a library removes a name that this module uses. Functions import the
modules that `import torch` does not load, so that importing `private` is cheap.
"""

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree


# Functions on pytrees, as `torch.func` defines pytrees.
tree_map, tree_leaves = _pytree.tree_map, _pytree.tree_leaves
tree_flatten, tree_unflatten = _pytree.tree_flatten, _pytree.tree_unflatten


def register_pytree(cls: type, flatten: Callable[[Any], tuple[list[Any], Any]], unflatten: Callable[..., Any]) -> None:
    """Make a class a pytree node of torch.

    torch's public alternative, `register_dataclass(drop_field_names=...)`, resets static fields.
    """
    _pytree.register_pytree_node(cls, flatten, unflatten)


def register_optree(cls: type, flatten: Callable[[Any], tuple[list[Any], Any]], unflatten: Callable[..., Any]) -> None:
    """Make a class a pytree node of optree, if optree is installed. torchopt and other libraries use optree.

    The only namespace that libraries share is optree's global namespace, which has no public name.
    """
    try:
        import optree
    except ImportError:
        return

    def rebuild(spec: Any, leaves: Any) -> Any:  # optree passes these arguments in the opposite order
        return unflatten(leaves, spec)

    namespace: Any = optree.registry.__GLOBAL_NAMESPACE
    optree.register_pytree_node(cls, flatten, rebuild, namespace=namespace)


def tree_flatten_with_path(tree: Any) -> list[tuple[str, Any]]:
    """Return the leaves of a pytree, each with its path as an expression such as `['logits']`.

    Raises:
        ValueError: If a class in the pytree was registered without the names of its fields.
    """
    return [(_pytree.keystr(path), leaf) for path, leaf in _pytree.tree_flatten_with_path(tree)[0]]


def watch_operations(run: Callable[[str, Callable[..., Any], tuple, dict[str, Any]], Any]) -> AbstractContextManager:
    """Return a context manager that calls `run(name, operation, args, kwargs)` in place of each tensor operation.

    `run` is called below autograd. The base class, `TorchDispatchMode`, is documented only in torch's notes.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            return run(func.overloadpacket.__name__, func, args, kwargs or {})

    return Watch()


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Enter a context in which tensors have shapes but no data, and a model runs without computing values.

    The context uses `FakeTensorMode` of torch's compiler, which has no public name. For an unsupported operation, torch
    raises an error and logs a message; the context suppresses the messages of this thread.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Fake(FakeTensorMode):
        # If no GPU is found, torch 2.11 would install a stand-in for CUDA that belongs to this thread, and would crash
        # in the next thread. Only fake tensors on a GPU need the stand-in.
        avoid_device_init = False

    thread = threading.get_ident()
    logger = logging.getLogger("torch._subclasses.fake_tensor")

    def others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(others)
    try:
        with Fake(allow_non_fake_inputs=True):
            yield
    finally:
        logger.removeFilter(others)


def clear_hooks(module: nn.Module) -> None:
    """Remove the forward hooks and forward pre-hooks of a module, except transformers' output collectors.

    A transformers model installs the output collectors only once, in its first call with `output_hidden_states=True`.
    Without output collectors, the model would return no hidden states, and LLaVA, which needs the hidden states of its
    vision model, would fail.
    """
    module._forward_pre_hooks.clear()
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
            del module._forward_hooks[key]


def viewed_tensor(x: Tensor) -> Tensor | None:
    """Return the tensor that `x` is a view of, or None if `x` is not a view."""
    return x._base


def keep_signature(function: type) -> type:
    """Store the signature of an autograd Function's `forward` as an attribute of `forward`.

    Each call of an autograd Function uses `inspect.signature`, which derives the signature again unless it is stored.
    """
    import inspect

    forward: Any = function.forward  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(forward)
    return function


def apply_function(function: Any, *args: Any) -> Any:
    """Call `function.apply(*args)` of an autograd Function. `args` must contain every argument of `forward`.

    `Function.apply` binds the arguments to the signature of `forward`, which takes as long as a small product. Outside
    of transforms, this function therefore calls the `apply` of the base class. In torch 2.14, the base class binds the
    arguments too, so no time is saved.
    """
    if in_transform():
        return function.apply(*args)
    from torch._functorch.utils import unwrap_dead_wrappers

    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(args))


def unwrap(x: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of `torch.func`'s transforms; outside of transforms, `x` itself.

    Only the innermost tensor has a valid version counter. If the result is `x` itself, no transform has wrapped `x`.
    """
    return torch.func.debug_unwrap(x)


def has_values(x: Tensor) -> bool:
    """Whether the values of a tensor can be read now.

    Values can't be read under `torch.compile`, or if a transform has wrapped the tensor. Meta tensors and fake tensors
    have no values. The class of fake tensors has no public name.
    """
    if torch.compiler.is_compiling() or unwrap(x) is not x or x.is_meta:
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(x, FakeTensor)


def graph_task() -> int:
    """Return the id of the backward pass that runs on this thread, or -1 if there is none.

    The id is the only way to detect that activation checkpointing recomputes a layer. torch's own checkpointing also
    uses the id.
    """
    return torch._C._current_graph_task_id()


def constant_when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `torch.compile` call a function during tracing, and treat the result as a constant.

    `torch.compiler.assume_constant_result` sets the same attribute, but imports the compiler, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def in_transform() -> bool:
    """Whether a transform of `torch.func`, or a level of forward-mode AD, is active.

    If a transform has wrapped tensors that a function closes over, but not `x`, `unwrap(x)` does not detect the
    transform.
    """
    level = torch.autograd.forward_ad._current_level
    return torch._C._functorch.peek_interpreter_stack() is not None or level >= 0


def requires_plain_form() -> bool:
    """Whether an active transform requires plain operations in place of custom autograd Functions.

    torch disables forward-mode AD inside the `jvp` of a Function. Nested forward derivatives of Functions are therefore
    silently wrong (pytorch #197867). `functionalize` does not support Functions.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    kinds = [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()]
    kind = torch._C._functorch.TransformType
    return kind.Functionalize in kinds or kinds.count(kind.Jvp) > 1


def forward_mode() -> AbstractContextManager[Any]:
    """Return a context manager that enables forward-mode AD, for operations on tangents in the `jvp` of a Function."""
    return torch.autograd.forward_ad._set_fwd_grad_enabled(True)


def is_observed() -> bool:
    """Whether a compiler, a transform, a dispatch mode or a tracer observes operations on this thread.

    An observer would miss a C function that writes to memory without a torch operation.
    """
    return (
        torch.compiler.is_compiling()
        or in_transform()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def skip_fused_encoder_path(module: nn.Module) -> None:
    """Make an `nn.TransformerEncoderLayer` call its linear layers, and an `nn.TransformerEncoder` avoid nested tensors.

    The encoder layer has a fused inference path, which reads the weights of the linear layers without calling the
    layers, and therefore ignores adapters. No public switch turns the path off for one module. If there is a padding
    mask, the encoder makes nested tensors for the fused path.
    """
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
    if isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False


def bitsandbytes() -> Any:
    """Import bitsandbytes, suppressing one of its log messages.

    When bitsandbytes is imported on a CPU with AVX512-BF16, it logs that the optional package `kernels` is not
    installed. vera_func does not need this package, and users mistake the message for an error. Other messages are
    logged.
    """
    loaded = sys.modules.get("bitsandbytes")
    if loaded is not None:
        return loaded
    import importlib

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_is_not_about_kernels)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.removeFilter(_is_not_about_kernels)


def _is_not_about_kernels(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward from kernels-community")


def drop_input_grads(root: nn.Module) -> None:
    """Remove the hooks of `enable_input_require_grads` from a module tree, because transforms do not support the hooks.

    Gradients of params do not need the hooks. transformers installs the hooks when activation checkpointing is enabled,
    and keeps the hooks when checkpointing is disabled. PEFT installs similar hooks, and offers no way to remove them.
    """
    for module in root.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
                del module._forward_hooks[key]


def bnb_ops() -> Any:
    """Return bitsandbytes' operators, `torch.ops.bitsandbytes`.

    bitsandbytes' documented functions call these operators, but do not accept tensors inside transforms.
    """
    bitsandbytes()  # registers the operations
    return torch.ops.bitsandbytes


def bnb_function(name: str, arguments: str) -> Callable[..., None] | None:
    """Return a C function of bitsandbytes' library for CPUs, or None if the operators must be called instead.

    An operator has ten times the overhead of a C function. `arguments` has a letter for each argument: n for a 64-bit
    integer, p for an address. C functions do not check arguments. The calls in this package were verified only for
    bitsandbytes 0.50, so the result is None for other releases. For the fused product, the result is also None if the
    package `kernels` is installed, because bitsandbytes' operator then uses the kernel of that package.
    """
    import ctypes

    if not bitsandbytes().__version__.startswith("0.50."):
        return None
    ops: Any = sys.modules.get("bitsandbytes.backends.cpu.ops")
    library = getattr(sys.modules["bitsandbytes.cextension"].lib, "_lib", None)
    if not hasattr(library, name) or (name.startswith("gemv") and getattr(ops, "gemm_4bit_forward_kernel", None)):
        return None
    address: Any = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    kinds = {"n": ctypes.c_int64, "p": ctypes.c_void_p}
    return ctypes.CFUNCTYPE(None, *(kinds[letter] for letter in arguments))(address)


def bnb_has_avx512bf16() -> bool:
    """Whether bitsandbytes uses its AVX512-BF16 kernel, which needs repacked weights."""
    return bitsandbytes().functional.has_avx512bf16()


def float32_modules(model: nn.Module) -> tuple[str, ...]:
    """Return name endings of the modules that a transformers model keeps in float32, such as T5's `wo`.

    The model's forward reads the dtype of the float32 weights, which therefore can't be quantized.
    """
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


# Attributes of a model that transformers loaded quantized.
QUANTIZED_ATTRIBUTES = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
)


def forget_quantization(model: Any) -> None:
    """Remove the attributes that mark a transformers model as quantized.

    `save_pretrained`, `.to` and Trainer read the attributes. transformers has no public function to remove them.
    """
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in QUANTIZED_ATTRIBUTES:
        model.__dict__.pop(name, None)


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return the module that `torch.compile`, `DataParallel` or `DistributedDataParallel` has wrapped, or None.

    The class of compiled modules has no public name, and stores the module in a private attribute.
    """
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module
    dynamo = sys.modules.get("torch._dynamo")  # not imported if no module was compiled
    return module._orig_mod if dynamo is not None and isinstance(module, dynamo.OptimizedModule) else None


def peft_part(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the name and the module of the first PEFT module in a model, or None.

    The base classes of PEFT's tuners and layers are not exported by `peft`.
    """
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return None
    classes = (sys.modules["peft"].PeftModel, tuners.BaseTuner, tuners.BaseTunerLayer)
    return next(((name, module) for name, module in model.named_modules() if isinstance(module, classes)), None)


def offload_hook(module: nn.Module) -> Any:
    """Return accelerate's hook that loads the offloaded weights of a module, or None if there is none.

    The hook has the attributes `execution_device` and `weights_map`. accelerate has no public function that returns the
    hook.
    """
    hook = getattr(module, "_hf_hook", None)
    return next((each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)), None)
