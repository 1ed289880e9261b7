"""The VeRA update of one linear layer, as pure functions of dicts of tensors.

    y = base(x) + lambda_b * (B (lambda_d * (A x)))          W' = W + diag(lambda_b) B diag(lambda_d) A

An adapter, `params`, has the trained vectors `{"lambda_b": (out,), "lambda_d": (r,)}`. All adapters share `frozen`, the
projections `{"vera_A": (r, in), "vera_B": (out, r)}`. A layer may use a slice of larger projections. The base layer is
any callable; this module does not depend on quantization or on `nn.Module`.

In all shapes of the package, `in` and `out` are the sizes of a layer, and `r` is the rank. `*batch` are the leading
axes of the input `x`, and `*rows` are the leading axes of the adapter vectors. `*batch` begins with the axes `*rows`.
For example, if `lambda_b` has shape (rows, out) and `x` has shape (rows, in) or (rows, seq, in), adapter `i` is applied
to `x[i]`.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from .autograd import add_update, product, project
from .dora import fold_layer, norm_statistics, rescaled_delta, row_norms, scaled_base
from .keys import BASE_SHARE, MAGNITUDE, MIXTURE, OUTPUT_SCALE, PROJECTIONS, SCALES, STATISTICS, VECTORS, join_key
from .shapes import (
    align_rows,
    contiguous_rows,
    described,
    match_rows,
    require_float,
    require_product_dtype,
    require_rows_of_floats,
    without_autocast,
)


BaseFn = Callable[[Tensor], Tensor]
_OPTIONAL = {MIXTURE, *SCALES, *(join_key(name, BASE_SHARE) for name in SCALES)}


def init_params(
    r: int,
    out_features: int,
    d_initial: float = 0.1,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    weight: Float[Tensor, "out in"] | None = None,
) -> dict[str, Tensor]:
    """Return a new adapter of one layer, with `lambda_b = 0` and `lambda_d = d_initial`: the update is zero.

    Args:
        r: Rank of the projections that the adapter will be used with.
        out_features: Output size of the layer.
        d_initial: Initial value of `lambda_d`; table 6c of the VeRA paper recommends at most 0.1.
        dtype: Dtype of both vectors. `vera_forward` computes the update in the dtype of the vectors.
        device: Device of both vectors.
        weight: The dense base weight for a DVoRA adapter, or None for VeRA. The initial magnitude is the norm of each
            row of the weight, in float32 or wider.

    Returns:
        `{"lambda_b": (out,), "lambda_d": (r,)}`; for DVoRA also `"magnitude"` of shape (out,).

    Raises:
        ValueError: If `r` or `out_features` is not a positive integer, if `d_initial` is not finite, if `dtype` is not
            a floating-point dtype, or if `weight` does not have shape (out, in).

    Example:
        >>> init_params(2, 3)
        {'lambda_b': tensor([0., 0., 0.]), 'lambda_d': tensor([0.1000, 0.1000])}
    """
    for name, size in (("r", r), ("out_features", out_features)):
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise ValueError(f"{name} must be a positive integer, got {size!r}.")
    if not abs(d_initial) < float("inf"):
        raise ValueError(f"d_initial must be finite, got {d_initial}.")
    require_float("dtype", dtype)
    params = {
        "lambda_b": torch.zeros(out_features, dtype=dtype, device=device),
        "lambda_d": torch.full((r,), d_initial, dtype=dtype, device=device),
    }
    if weight is None:
        return params
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] != out_features:
        raise ValueError(
            f"weight must be a dense tensor of shape ({out_features}, in), got {described(weight)}; pass dequantize(q)."
        )
    magnitude = row_norms(weight.detach().to(torch.promote_types(dtype, weight.dtype)))
    return params | {MAGNITUDE: magnitude.to(device)}


def vera_forward(
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    x: Float[Tensor, "*batch in"],
    base_fn: BaseFn,
    *,
    dropout_mask: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    bias: Float[Tensor, "*rows out"] | None = None,
    differentiate_norm: bool = False,
) -> Float[Tensor, "*batch out"]:
    """Compute the output of an adapted layer, `base_fn(x) + lambda_b * (B (lambda_d * (A x)))`.

    The update costs `r * (in + out)` multiply-adds per row of `x`, without forming ΔW. Autograd saves `A x` (r values
    per row), but not the product with `B`, which the backward pass computes again. As in PEFT, the update is computed
    in the dtype of the vectors and added to the base output. The sum is cast to the dtype of the base output, and then
    to the dtype of `x`.

    With `product_dtype`, the arithmetic is that of PEFT under `torch.autocast`. Let `h = lambda_d * (A x)`. The matrix
    products `A x` and `B h` take 16-bit inputs, accumulate in float32, and round the result to 16 bits. All other
    operations use the dtype of the vectors. To bound the rounding error, let u be the unit roundoff, 2^-8 in bfloat16
    and 2^-11 in float16, and

        M = |lambda_b| * (|B| (|lambda_d| * (|A| |x|)))    (elementwise absolute values)

    Rounding `A x`, `h` and `B h` changes the update by at most 3 u M, to first order in u. For each of `A`, `B` and
    `x`, rounding adds at most u M. If the base layer is dense in `product_dtype`, or 4-bit with `product_dtype` as
    compute dtype, PEFT and `adapt` round the projections in advance. Rounding `A` and `B` then usually adds nothing.
    Summation in float32 adds at most (in + r) 2^-24 M, with or without `product_dtype`. Because rounding errors partly
    cancel, the relative error of the update, in norm, is about 0.7 u (1 u if `A`, `B` and `x` are rounded too). For the
    gradient with respect to a vector, the bounds hold if M is the gradient's formula with the absolute values of all
    factors.

    Args:
        params: `{"lambda_b": (*rows, out), "lambda_d": (*rows, r)}`. The axes `*rows` of a vector, if any, must equal
            the first axes of `x`. If `params` has the key `"mixture"`, with weights of shape (*rows, k), each row gets
            a weighted sum of `k` updates. The vectors then have shapes (*rows, k, out) and (*rows, k, r). If `params`
            has the key `"magnitude"` or `"output_scale"` (see `dora.fold_layer`), of shape (*rows, out), the layer is a
            DVoRA layer.
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`. The layer uses the first `in` columns of A and the
            first `out` rows of B. For an adapter with a magnitude, pass `frozen | dora.norm_statistics(weight,
            frozen)`. Without the statistics, each call computes the base weight as `base_fn(identity)`, a product with
            `in` rows.
        x: Input of shape (*batch, in).
        base_fn: Function that computes the frozen layer, from (*batch, in) to (*batch, out).
        dropout_mask: Mask that multiplies the input of `A`, but not the input of the base layer. The mask must
            broadcast to the shape of `x`; the function `dropout_mask` draws such a mask. None means no dropout.
        product_dtype: Dtype of the products with `A` and `B`: bfloat16, float16 (products above 65,504 overflow), or
            None for the dtype of the vectors.
        bias: The bias that `base_fn` adds, which DVoRA does not scale. None means no bias. Ignored for VeRA.
        differentiate_norm: Whether to differentiate through the row norms of DVoRA. With False, the norms are
            constants, as in the DoRA paper.

    Raises:
        ValueError: If the shapes of the arguments do not match, if a key is missing, if a tensor has an integer dtype,
            or if `product_dtype` is neither bfloat16 nor float16 nor None.

    Example:
        >>> import torch
        >>> frozen = {"vera_A": torch.ones(2, 3), "vera_B": torch.ones(4, 2)}
        >>> params = {"lambda_b": torch.ones(4), "lambda_d": torch.full((2,), 0.5)}
        >>> weight = torch.zeros(4, 3)
        >>> vera_forward(params, frozen, torch.ones(3), lambda x: x @ weight.T)
        tensor([3., 3., 3., 3.])

    Reference:
        Equation 2 of https://arxiv.org/abs/2310.11454; equation 5 of https://arxiv.org/abs/2402.09353.
    """
    require_product_dtype(product_dtype)
    branch = dropout_mask, project, product_dtype
    return forward(params, frozen, x, base_fn, *branch, bias=bias, differentiate_norm=differentiate_norm)


def delta_weight(
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    in_features: int,
    weight: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "*rows out in"]:
    """Return the dense update `diag(lambda_b) B diag(lambda_d) A`, in the dtype of the vectors.

    The computation costs `r * out * in` multiply-adds and the memory of an (out, in) tensor. Use `delta_weight` for
    merging and inspection, not in the forward pass.

    Args:
        params: `{"lambda_b": (*rows, out), "lambda_d": (*rows, r)}`.
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        in_features: Input size of the layer, which the shapes of `params` do not determine.
        weight: The dense base weight W, required for DVoRA. With magnitude m, DVoRA's update is `m (W + ΔW) / ‖W + ΔW‖
            - W`, where ‖·‖ is the norm of each row. Ignored for VeRA.

    Raises:
        ValueError: If the leading axes of the vectors do not match, if the rank of the projections is not the rank of
            the vectors, if the projections are smaller than the layer, or if a DVoRA adapter is given without a weight.

    Example:
        >>> import torch
        >>> frozen = {"vera_A": torch.ones(2, 3), "vera_B": torch.ones(4, 2)}
        >>> params = {"lambda_b": torch.ones(4), "lambda_d": torch.full((2,), 0.5)}
        >>> delta_weight(params, frozen, in_features=3).shape
        torch.Size([4, 3])
    """
    lambda_b, lambda_d, mixture = _vectors(params)
    A, B = _projections(frozen, lambda_b, lambda_d, in_features)
    if mixture is None:
        lambda_b, lambda_d = match_rows({"lambda_b": lambda_b, "lambda_d": lambda_d})
    else:
        lambda_b = mixture[..., None] * lambda_b
    with without_autocast(lambda_b.device):
        delta = (lambda_b[..., None] * B) @ (lambda_d[..., None] * A)
    if mixture is not None:
        delta = delta.sum(-3)
    if not any(name in params for name in SCALES):
        return delta
    if weight is None or tuple(weight.shape) != tuple(delta.shape[-2:]):
        what = None if weight is None else tuple(weight.shape)
        raise ValueError(
            "the update of a DVoRA adapter depends on the base weight: pass a weight of shape "
            f"{tuple(delta.shape[-2:])}, got {what}."
        )
    return rescaled_delta(delta, params, weight.to(torch.promote_types(delta.dtype, weight.dtype)))


def dropout_mask(
    p: float,
    shape: tuple[int, ...],
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw a dropout mask whose entries are 0 with probability `p` and `1 / (1 - p)` otherwise.

    Under `torch.func.vmap(..., randomness="different")`, each adapter draws its own mask.

    Args:
        p: Probability that an entry is 0, with 0 <= p < 1.
        shape: Shape of the mask, usually the shape of the layer's input.
        generator: Random number generator (required). The mask is on the device of the generator.
        dtype: Dtype of the mask.

    Raises:
        ValueError: If `p` is out of range.

    Example:
        >>> import torch
        >>> mask = dropout_mask(0.5, (2, 100), generator=torch.Generator().manual_seed(0))
        >>> sorted(mask.unique().tolist())
        [0.0, 2.0]
    """
    if not 0 <= p < 1:
        raise ValueError(f"p must be at least 0 and below 1, got {p}.")
    draw = torch.rand(shape, generator=generator, dtype=torch.float32, device=generator.device)
    return (draw >= p).to(dtype) / (1 - p)


def forward(
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    x: Float[Tensor, "*batch in"],
    base_fn: BaseFn,
    dropout_mask: Tensor | None,
    project: Callable[[Tensor, Tensor], Tensor],
    product_dtype: torch.dtype | None = None,
    *,
    bias: Tensor | None = None,
    differentiate_norm: bool = False,
) -> Float[Tensor, "*batch out"]:
    """Compute `vera_forward`. Without a dropout mask, `project` (for example a `SharedProduct`) computes `A x`."""
    lambda_b, lambda_d, mixture = _vectors(params)
    require_rows_of_floats(x)
    if MAGNITUDE in params:
        params = fold_layer(params, _with_statistics(frozen, x, base_fn, bias), differentiate_norm=differentiate_norm)
        lambda_b = params["lambda_b"]
    A, B = _projections(frozen, lambda_b, lambda_d, x.shape[-1], product_dtype)
    if A.is_meta and not x.is_meta:
        raise ValueError(
            f"the adapter is on the meta device and has no data, but x is on {x.device}: load the adapter's values."
        )
    base = base_fn(contiguous_rows(x))
    if base.shape[-1] != lambda_b.shape[-1]:  # a size of 1 would broadcast in the sum
        raise ValueError(
            f"lambda_b {tuple(lambda_b.shape)} is for {lambda_b.shape[-1]} outputs, but base_fn(x) has shape "
            f"{tuple(base.shape)}: pass the adapter of this layer."
        )
    if base.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"base_fn(x) must have shape {(*x.shape[:-1], lambda_b.shape[-1])} for an x of shape {tuple(x.shape)}, got "
            f"{tuple(base.shape)}."
        )
    dtype = base.dtype
    if OUTPUT_SCALE in params:
        base = scaled_base(base, params, bias, x)
    if dropout_mask is None:
        z = project(x, A)  # (*batch, r)
    else:
        z = product(contiguous_rows(x.to(lambda_d.dtype) * _checked_mask(dropout_mask, x)), A)
    if mixture is None:
        vectors = align_rows("lambda_b", lambda_b, x), align_rows("lambda_d", lambda_d, x)
        return add_update(base, z, *vectors, B, dtype).to(x.dtype)
    hidden = align_rows("lambda_d", lambda_d, x, inner=2) * z[..., None, :]  # (*batch, k, r)
    weighted = mixture[..., None] * lambda_b
    update = align_rows("lambda_b", weighted, x, inner=2) * product(hidden, B)  # (*batch, k, out)
    return (base + update.sum(-2)).to(dtype).to(x.dtype)


def _with_statistics(
    frozen: Mapping[str, Tensor], x: Tensor, base_fn: BaseFn, bias: Tensor | None
) -> Mapping[str, Tensor]:
    """Return `frozen` with the norm statistics of the layer, which are computed if they are missing."""
    if any(name in frozen for name in STATISTICS):
        return frozen
    with without_autocast(x.device):
        transposed = base_fn(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))
    if bias is not None:
        transposed = transposed - bias
    return {**frozen, **norm_statistics(transposed.mT, frozen)}


def _vectors(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    if params.keys() != {*VECTORS} and (
        params.keys() - _OPTIONAL != {*VECTORS} or all(name in params for name in SCALES)
    ):
        raise ValueError(
            "params of one layer must have the keys 'lambda_b' and 'lambda_d' (for a weighted sum of adapters also "
            f"'mixture', for DVoRA also 'magnitude' or 'output_scale'), got {sorted(params)}."
        )
    lambda_b, lambda_d, mixture = params["lambda_b"], params["lambda_d"], params.get("mixture")
    for name, vector in (("lambda_b", lambda_b), ("lambda_d", lambda_d)):
        if not isinstance(vector, Tensor) or not vector.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {described(vector)}.")
    if lambda_b.dim() < 1 or lambda_d.dim() < 1:
        raise ValueError(
            f"lambda_b {tuple(lambda_b.shape)} and lambda_d {tuple(lambda_d.shape)} must have shapes "
            "(*rows, out) and (*rows, r)."
        )
    if mixture is not None and not mixture.shape == lambda_b.shape[:-1] == lambda_d.shape[:-1]:
        raise ValueError(
            f"lambda_b {tuple(lambda_b.shape)} and lambda_d {tuple(lambda_d.shape)} must have the leading axes "
            f"{tuple(mixture.shape)}, the shape (*rows, k) of mixture."
        )
    return lambda_b, lambda_d, mixture


def _projections(
    frozen: Mapping[str, Tensor],
    lambda_b: Tensor,
    lambda_d: Tensor,
    in_features: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the slices of the projections that this layer uses, in `dtype` (by default that of `lambda_d`)."""
    if missing := [name for name in PROJECTIONS if name not in frozen]:
        raise ValueError(f"frozen lacks {missing}; init_projections draws both.")
    A, B = frozen["vera_A"], frozen["vera_B"]
    out_features, r = lambda_b.shape[-1], lambda_d.shape[-1]
    if in_features < 1:
        raise ValueError(f"the layer must have at least one input feature, got in = {in_features}.")
    if A.dim() != 2 or B.dim() != 2:
        raise ValueError(
            f"vera_A must have shape (r, >= {in_features}), got {tuple(A.shape)}, and vera_B must have shape "
            f"(>= {out_features}, r), got {tuple(B.shape)}."
        )
    # torch 2.13 accepts a product of a CPU tensor with a meta tensor, and returns uninitialised memory.
    if not A.device == B.device == lambda_d.device == lambda_b.device:
        raise ValueError(
            f"vera_A is on {A.device}, vera_B on {B.device}, lambda_b on {lambda_b.device} and lambda_d on "
            f"{lambda_d.device}: move these tensors to one device."
        )
    if A.shape[0] != r or B.shape[1] != r:
        raise ValueError(
            f"lambda_d {tuple(lambda_d.shape)} implies rank {r}, but vera_A {tuple(A.shape)} has rank {A.shape[0]} and "
            f"vera_B {tuple(B.shape)} has rank {B.shape[1]}: draw projections of rank {r} with init_projections. "
            f"Projections of another rank can't be sliced to rank {r}."
        )
    if A.shape[1] < in_features or B.shape[0] < out_features:
        raise ValueError(
            f"the layer is {in_features} -> {out_features}, but vera_A {tuple(A.shape)} and vera_B "
            f"{tuple(B.shape)} were drawn for at most {A.shape[1]} -> {B.shape[0]}: draw larger projections."
        )
    if A.shape[1] > in_features:
        A = A[:, :in_features]
    if B.shape[0] > out_features:
        B = B[:out_features]
    dtype = dtype or lambda_d.dtype
    if A.dtype == B.dtype == dtype:
        return A, B
    if not (A.is_floating_point() and B.is_floating_point()):
        raise ValueError(f"vera_A and vera_B must be floating-point tensors, got {A.dtype} and {B.dtype}.")
    return A.to(dtype), B.to(dtype)


def _checked_mask(mask: Tensor, x: Tensor) -> Tensor:
    try:
        fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"dropout_mask {tuple(mask.shape)} does not broadcast to x {tuple(x.shape)}.")
    return mask
