"""The operations of an adapted layer that torch cannot derive by itself as cheaply: custom autograd Functions.

Every rule is made of ordinary operations, so that derivatives of all orders and all transforms exist.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from ..private import unwrap


def project(x: Float[Tensor, "*batch in"], A: Float[Tensor, "r in"]) -> Float[Tensor, "*batch r"]:
    """`A x`, in the dtype of `A`.

    Example:
        >>> project(torch.ones(3, dtype=torch.bfloat16), torch.ones(2, 3))
        tensor([3., 3.])
    """
    return linear(x.to(A.dtype), A)


class SharedProduct:
    """`A x`, computed once for all layers that read the same `x` one after another: q, k, v; gate, up.

    A value for one pass through a model, in which all layers have the same projections. It keeps the last `x` and the
    product, and knows them again by identity. Every layer differentiates the product by itself, so that gradients are
    those of unshared products, bit for bit.

    Example:
        >>> shared, x, A = SharedProduct(), torch.ones(3), torch.ones(2, 3)
        >>> shared(x, A).data_ptr() == shared(x, A).data_ptr()
        True
    """

    def __init__(self) -> None:
        self.last: tuple[Tensor, tuple[int, bool], Tensor] | None = None  # x, its version and the grad mode, A x

    def __call__(self, x: Float[Tensor, "*batch in"], A: Float[Tensor, "r in"]) -> Float[Tensor, "*batch r"]:
        memory = unwrap(x)  # under vmap, only what is wrapped counts its changes
        if memory.is_inference():  # nobody could tell that it changed
            return project(x, A)
        state = memory._version, torch.is_grad_enabled()  # a product made under no_grad leads to no gradient of A
        if self.last is not None:
            same, before, z = self.last
            if same is x and before == state and z.dtype == A.dtype:
                return _Known.apply(x, A, z) if torch.is_grad_enabled() else z
        z = project(x, A)
        self.last = x, state, z
        return z


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
        return (grad @ A).to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, None

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
        inner = (lambda_b * grad) @ B  # (*batch, r)
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
