"""The operations of an adapted layer that torch cannot derive by itself as cheaply: custom autograd Functions.

Every rule is made of ordinary operations, so that derivatives of all orders and all transforms exist.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from ..private import unwrap
from .shapes import contiguous_rows


# Multiply-adds of a product that take as long as copying and comparing a small input, 5 microseconds.
WORTH_SHARING = 2**16


def project(x: Float[Tensor, "*batch in"], A: Float[Tensor, "r in"]) -> Float[Tensor, "*batch r"]:
    """`A x`, in the dtype of `A`.

    Example:
        >>> project(torch.ones(3, dtype=torch.bfloat16), torch.ones(2, 3))
        tensor([3., 3.])
    """
    return linear(contiguous_rows(x.to(A.dtype)), A)


class SharedProduct:
    """`A x`, computed once for all layers that read the same `x` one after another: q, k, v; gate, up.

    A value for one pass through a model, in which all layers have the same projections. It keeps the last `x`, a copy
    of its bits, and the product, which it gives again for the same tensor with the same bits. Nothing less would do:
    writes through `x.data` or `x.numpy()` are counted nowhere. Copying and comparing costs a pass over `x`, about 2 and
    4 % of a product at r 256; products that take no longer than that are not shared. Every layer differentiates the
    product by itself, so that gradients are those of unshared products, bit for bit.

    On other devices than the CPU nothing is shared: a comparison would have to wait for the device.

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
        if type(memory) not in (Tensor, Parameter) or not memory.is_cpu:
            return project(x, A)
        # The count says what bits do not: whether the tensor has got another gradient. And a product that was made
        # where gradients are disabled leads to no gradient of A.
        state = None if memory.is_inference() else memory._version, torch.is_grad_enabled()
        bits = _bits(memory)
        if self.last is not None:
            same, before, kept, z = self.last
            if same is x and before == state and z.dtype == A.dtype and torch.equal(bits, kept):
                return _Known.apply(x, A, z) if torch.is_grad_enabled() else z
        z = project(x, A)
        self.last = x, state, bits.clone(), z
        return z


def _bits(x: Tensor) -> Tensor:
    """A floating-point tensor's memory as integers, by which zeros of either sign differ and NaNs are equal."""
    if x.requires_grad:
        x = x.detach()
    if x.is_contiguous() and x.shape[-1] * x.itemsize % 8 == x.storage_offset() * x.itemsize % 8 == 0:
        return x.view(torch.int64)  # compares in half the time
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


class _Known(torch.autograd.Function):
    """`value`, which is `project(x, A)`: differentiated in x as a product of its own, and in A through the value."""

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


class _Expand(torch.autograd.Function):
    """`lambda_b * (B (lambda_d * z))`, which keeps its inputs only, and not the product with `B`.

    Plain autograd would keep (*batch, out) numbers to differentiate in `lambda_b`. Every rule is made of ordinary
    operations on the inputs, so that derivatives of all orders exist.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z, lambda_b, lambda_d, B):
        return lambda_b * linear(lambda_d * z, B)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # absent tangents would cost products with zeros
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        z, lambda_b, lambda_d, B = ctx.saved_tensors
        grad_z = grad_b = grad_d = grad_B = None
        if grad is None:
            return None, None, None, None
        if ctx.needs_input_grad[1]:
            grad_b = (grad * linear(lambda_d * z, B)).sum_to_size(lambda_b.shape)
        inner = contiguous_rows(lambda_b * grad) @ B  # (*batch, r)
        if ctx.needs_input_grad[0]:
            grad_z = lambda_d * inner
        if ctx.needs_input_grad[2]:
            grad_d = (inner * z).sum_to_size(lambda_d.shape)
        if ctx.needs_input_grad[3]:
            grad_B = torch.einsum("...o,...r->or", lambda_b * grad, lambda_d * z)
        return grad_z, grad_b, grad_d, grad_B

    @staticmethod
    def jvp(ctx, z_t, b_t, d_t, B_t):
        z, lambda_b, lambda_d, B = ctx.saved_tensors
        terms = []
        if b_t is not None:
            terms.append(b_t * linear(lambda_d * z, B))
        if d_t is not None:
            terms.append(lambda_b * linear(d_t * z, B))
        if z_t is not None:
            terms.append(lambda_b * linear(lambda_d * z_t, B))
        if B_t is not None:
            terms.append(lambda_b * linear(lambda_d * z, B_t))
        return sum(terms[1:], terms[0]) if terms else None


def expand(z: Tensor, lambda_b: Tensor, lambda_d: Tensor, B: Tensor) -> Tensor:
    # Dynamo (2.13) refuses a Function with a jvp; what the plain form keeps is the compiler's choice. Where nothing is
    # kept, the plain form has less overhead.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return lambda_b * linear(lambda_d * z, B)
    return _Expand.apply(z, lambda_b, lambda_d, B)
