"""Custom autograd Functions that save fewer tensors for backward than plain autograd.

Each backward and jvp rule uses only differentiable operations. Derivatives of all orders therefore exist. Plain
operations replace the Functions under transforms that Functions do not support (see `private.requires_plain_form`).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from ..private import apply_function, in_transform, keep_signature, requires_plain_form, unwrap
from .shapes import contiguous_rows


# Below this number of multiply-adds, a product takes less time than copying and comparing its input (5 microseconds).
WORTH_SHARING = 2**16
# Number of values that are added at once: in float32, three times as many fit into a cache of 1 MB.
PART = 2**16


def project(x: Float[Tensor, "*batch in"], A: Float[Tensor, "r in"]) -> Float[Tensor, "*batch r"]:
    """Compute `A x` in the dtype of `A`.

    Example:
        >>> project(torch.ones(3, dtype=torch.bfloat16), torch.ones(2, 3))
        tensor([3., 3.])
    """
    return linear(contiguous_rows(x.to(A.dtype)), A)


class SharedProduct:
    """Compute `A x` once for consecutive layers with the same input, such as q, k and v, or gate and up.

    Use a new instance for each forward pass; all layers of the pass must use the same projections. The instance caches
    the last `x`, a copy of the values of `x`, and the product. A call returns the cached product if `x` is the cached
    tensor and the values of `x` are bitwise equal to the copy. A comparison of version counters would miss writes
    through `x.data` or `x.numpy()`. Copying and comparing each take one pass over `x`, whereas the product takes r
    multiply-adds per value of `x`. Small products, which are cheaper than a comparison, are not cached. Each layer
    differentiates the product separately, so gradients are bitwise equal to those without a cache.

    Products on devices other than the CPU are not cached, because the CPU would have to wait for the comparison.

    Example:
        >>> shared, x, A = SharedProduct(), torch.ones(64, 512), torch.ones(2, 512)
        >>> shared(x, A).data_ptr() == shared(x, A).data_ptr()
        True
        >>> x.numpy()[:] = 0
        >>> shared(x, A).any()
        tensor(False)
    """

    def __init__(self) -> None:
        self.last: tuple[Tensor, tuple[int | None, bool], Tensor, Tensor] | None = None  # x, state, bits, A x

    def __call__(self, x: Float[Tensor, "*batch in"], A: Float[Tensor, "r in"]) -> Float[Tensor, "*batch r"]:
        memory = unwrap(x)
        if memory.numel() * A.shape[0] < WORTH_SHARING:
            return project(x, A)
        if type(memory) not in (Tensor, Parameter) or not memory.is_cpu or memory.is_neg() or torch.jit.is_tracing():
            return project(x, A)  # their bits can't be viewed as integers
        # An in-place operation can change the graph of `x` but not its bits; the version counter reveals this.
        # A product computed with gradients disabled has no graph, so it can't be reused with gradients enabled.
        state = None if memory.is_inference() else memory._version, torch.is_grad_enabled()
        bits = _bits(memory)
        if self.last is not None:
            same, before, kept, z = self.last
            if same is x and before == state and z.dtype == A.dtype and torch.equal(bits, kept):
                if not is_recorded(x, A, z) or requires_plain_form():
                    return z
                return apply_function(_Known, x, A, z)
        z = project(x, A)
        self.last = x, state, bits.clone(), z
        return z


def _bits(x: Tensor) -> Tensor:
    """View a floating-point tensor as integers, so that a comparison is bitwise, also for NaN and -0.0."""
    if x.requires_grad:
        x = x.detach()
    if x.is_contiguous() and x.shape[-1] * x.itemsize % 8 == x.storage_offset() * x.itemsize % 8 == 0:
        return x.view(torch.int64)  # comparison takes half the time
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


@keep_signature
class _Known(torch.autograd.Function):
    """Return `value`, a cached `project(x, A)`, with a new graph node that computes the gradient of `x`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, A, value):
        return value.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        (A,) = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            return None, None, grad
        return (contiguous_rows(grad) @ A).to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, None

    @staticmethod
    def jvp(ctx, x_t, A_t, value_t):
        return value_t


@keep_signature
class _Expand(torch.autograd.Function):
    """Compute `lambda_b * (B (lambda_d * z))`, saving the inputs for backward but not the product with `B`.

    Plain autograd would save the product, of shape (*batch, out), for the gradient of `lambda_b`. As under autocast,
    products with `B` are computed in the dtype of `B`, and everything else in the dtype of the vectors.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z, lambda_b, lambda_d, B):
        return lambda_b * product(lambda_d * z, B)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # materialized tangents would cost products with zeros
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        z, lambda_b, lambda_d, B = ctx.saved_tensors
        grad_z = grad_b = grad_d = grad_B = None
        if grad is None:
            return None, None, None, None
        if ctx.needs_input_grad[1]:
            grad_b = (grad * product(lambda_d * z, B)).sum_to_size(lambda_b.shape)
        inner = (contiguous_rows((lambda_b * grad).to(B.dtype)) @ B).to(lambda_d.dtype)  # (*batch, r)
        if ctx.needs_input_grad[0]:
            grad_z = (lambda_d * inner).to(z.dtype)
        if ctx.needs_input_grad[2]:
            grad_d = (inner * z).sum_to_size(lambda_d.shape)
        if ctx.needs_input_grad[3]:
            grad_B = torch.einsum("...o,...r->or", (lambda_b * grad).to(B.dtype), (lambda_d * z).to(B.dtype))
        return grad_z, grad_b, grad_d, grad_B

    @staticmethod
    def jvp(ctx, z_t, b_t, d_t, B_t):
        z, lambda_b, lambda_d, B = ctx.saved_tensors
        terms = []
        if b_t is not None:
            terms.append(b_t * product(lambda_d * z, B))
        if d_t is not None:
            terms.append(lambda_b * product(d_t * z, B))
        if z_t is not None:
            terms.append(lambda_b * product(lambda_d * z_t, B))
        if B_t is not None:
            terms.append(lambda_b * product(lambda_d * z, B_t))
        return sum(terms[1:], terms[0]) if terms else None


def expand(z: Tensor, lambda_b: Tensor, lambda_d: Tensor, B: Tensor) -> Tensor:
    """Compute `lambda_b * (B (lambda_d * z))`, differentiable in all arguments."""
    # Dynamo (torch 2.13) does not support a Function with a jvp; in the plain form, the compiler decides what is saved.
    # Where nothing is recorded, the plain form has less overhead.
    if torch.compiler.is_compiling() or not is_recorded(z, lambda_b, lambda_d, B) or requires_plain_form():
        return lambda_b * product(lambda_d * z, B)
    return apply_function(_Expand, z, lambda_b, lambda_d, B)


def add_update(
    base: Tensor, z: Tensor, lambda_b: Tensor, lambda_d: Tensor, B: Tensor, dtype: torch.dtype
) -> Float[Tensor, "*batch out"]:
    """Compute `base + lambda_b * (B (lambda_d * z))`, rounded to `dtype`.

    If autograd records nothing, a large sum is computed in chunks, so that temporary tensors fit in the CPU's cache.
    Allocating larger temporary tensors takes longer than the arithmetic.
    """
    if torch.compiler.is_compiling() or is_recorded(base, z, lambda_b, lambda_d, B):
        return (base + expand(z, lambda_b, lambda_d, B)).to(dtype)
    u = product(lambda_d * z, B)
    if u.numel() <= PART or u.shape != base.shape or not u.is_cpu or in_transform():
        return (base + lambda_b * u).to(dtype)
    total = torch.empty_like(u, dtype=dtype)
    vectors = lambda_b[(None,) * (u.dim() - lambda_b.dim())]
    _add_in_parts(total, base, vectors, u)
    return total


def _add_in_parts(total: Tensor, base: Tensor, lambda_b: Tensor, u: Tensor) -> None:
    """Write `base + lambda_b * u` to `total`, in chunks; `lambda_b` has as many axes as `u`, and broadcasts to `u`."""
    step = PART * len(u) // u.numel()
    if u.dim() == 1 or step >= len(u):
        total.copy_(base + lambda_b * u)
        return
    lambda_b = lambda_b.expand(len(u), *lambda_b.shape[1:])
    if step:
        for part, *terms in zip(*(tensor.split(step) for tensor in (total, base, lambda_b, u)), strict=True):
            part.copy_(terms[0] + terms[1] * terms[2])
    else:
        for part in zip(total, base, lambda_b, u, strict=True):
            _add_in_parts(*part)


def is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd or a transform may differentiate operations on these tensors."""
    return torch.is_grad_enabled() and (any(tensor.requires_grad for tensor in tensors) or in_transform())


def product(hidden: Float[Tensor, "*batch r"], B: Float[Tensor, "out r"]) -> Float[Tensor, "*batch out"]:
    """Compute `B hidden` in the dtype of `B`.

    Example:
        >>> product(torch.ones(2), torch.ones(3, 2, dtype=torch.bfloat16))
        tensor([2., 2., 2.], dtype=torch.bfloat16)
    """
    return linear(hidden.to(B.dtype), B)
