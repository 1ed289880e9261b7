"""DVoRA: VeRA inside DoRA's decomposition of a weight into magnitudes and directions.

    y_i = m_i ((W + ΔW) x)_i / ‖W_i + ΔW_i‖ + bias_i          ΔW = diag(lambda_b) B diag(lambda_d) A

`W_i` is row i of the weight. The magnitude m is a third trained vector, of shape (out,). With the output scale `s_i =
m_i / ‖W_i + ΔW_i‖`, DVoRA is VeRA with `s * lambda_b` in place of `lambda_b`, over a base with outputs scaled by s:

    y = s * (W x) + (s * lambda_b) * (B (lambda_d * (A x))) + bias

`fold_layer` converts params to this form, in which `output_scale` replaces `magnitude`. The row norms are computed
without forming ΔW. With b for `lambda_b` and d for `lambda_d`,

    ‖W_i + ΔW_i‖² = ‖W_i‖² + 2 b_i Σ_k B_ik d_k C_ik + b_i² (B_i * d) G (B_i * d)ᵀ        C = W Aᵀ,  G = A Aᵀ

`norm_statistics` computes `C`, `G` and ‖W_i‖², which are the same for all adapters of a layer.

Reference:
    DoRA, https://arxiv.org/abs/2402.09353: equation 5, section 4.3 (norms as constants), section 5.4 (DVoRA).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from .keys import BASE_SHARE, MAGNITUDE, OUTPUT_SCALE, STATISTICS, VECTORS, join_key
from .shapes import align_rows, described, match_rows, with_dims, without_autocast


# Largest number of values in a temporary tensor of the row norms.
_CHUNK = 2**24


def row_norms(weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
    """Return the norm of each row of a weight, the initial magnitude of DVoRA, in float32 or wider.

    Example:
        >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([5., 2.])
    """
    return _square_norm(_wide(weight)).sqrt()


def norm_statistics(weight: Float[Tensor, "out in"], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute statistics for the row norms of DVoRA: the square norms ‖W_i‖², C = W Aᵀ and G = A Aᵀ.

    The statistics cost `r in (out + r)` multiply-adds, and have `out (r + 1) + r²` values. Pass `frozen |
    norm_statistics(W, frozen)` to `vera_forward`, which otherwise computes the statistics in each call.

    Args:
        weight: The dense base weight, for example from `dequantize`.
        frozen: Projections `{"vera_A": (r, >= in), ...}`. The statistics are valid only for this `vera_A`.

    Returns:
        `{"square_norm": (out,), "C": (out, r), "G": (r, r)}`, in float32 or wider.

    Raises:
        ValueError: If the weight is not a dense tensor of shape (out, in), or if `vera_A` is missing or has fewer than
            `in` columns.

    Example:
        >>> frozen = {"vera_A": torch.ones(2, 3), "vera_B": torch.ones(4, 2)}
        >>> {name: tuple(value.shape) for name, value in norm_statistics(torch.ones(4, 3), frozen).items()}
        {'square_norm': (4,), 'C': (4, 2), 'G': (2, 2)}
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight must be a dense floating-point tensor of shape (out, in), got {described(weight)}; pass "
            "dequantize(q)."
        )
    A = frozen.get("vera_A")
    if not isinstance(A, Tensor) or not A.is_floating_point() or A.dim() != 2 or A.shape[1] < weight.shape[1]:
        raise ValueError(
            f"vera_A must be a floating-point tensor of shape (r, >= {weight.shape[1]}) for a weight of shape "
            f"{tuple(weight.shape)}, got {described(A)}."
        )
    with without_autocast(weight.device):
        weight = _wide(weight)
        A = A[:, : weight.shape[1]].to(weight.dtype)
        return {"square_norm": _square_norm(weight), "C": linear(weight, A), "G": linear(A, A)}


def fold_layer(
    params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], *, differentiate_norm: bool = False
) -> dict[str, Tensor]:
    """Convert DVoRA params of a layer to `{"lambda_b": s * lambda_b, "lambda_d": lambda_d, "output_scale": s}`.

    The scale s is the magnitude divided by the norm of each row of `W + ΔW`; for a row of zeros, s is the magnitude.
    The conversion costs `out * r²` multiply-adds for each adapter.

    Args:
        params: `{"lambda_b": (*rows, out), "lambda_d": (*rows, r), "magnitude": (*rows, out)}`. Rows for which
            `select_adapters` selected the base get a scale of 1.
        frozen: The projections and the `norm_statistics` of the layer.
        differentiate_norm: Whether to differentiate the norm with respect to `lambda_b` and `lambda_d`. With False, the
            norm is a constant, as in the DoRA paper.

    Raises:
        ValueError: If a key of `params` or `frozen` is missing, or if shapes do not match.

    Example:
        >>> frozen = {"vera_A": torch.ones(1, 2), "vera_B": torch.ones(1, 1)}
        >>> params = {"lambda_b": torch.ones(1), "lambda_d": torch.ones(1), "magnitude": torch.ones(1)}
        >>> fold_layer(params, frozen | norm_statistics(torch.tensor([[2.0, 3.0]]), frozen))["output_scale"]
        tensor([0.2000])
    """
    lambda_b, lambda_d, magnitude = _checked(params, frozen)
    b, d, m = match_rows({"lambda_b": lambda_b, "lambda_d": lambda_d, "magnitude": magnitude})
    statistics = [frozen[name] for name in STATISTICS]
    B = frozen["vera_B"][: b.shape[-1]]
    inputs = (b, d, B, *statistics)
    with without_autocast(b.device):
        inputs = inputs if differentiate_norm else tuple(_distinct(tensor.detach()) for tensor in inputs)
        square = _adapted_square_norm(*inputs)
        some = square > 0
        scale = m / torch.where(some, square, 1.0).sqrt().to(m.dtype)
        scale = _with_share(params, MAGNITUDE, scale)
    return {"lambda_b": scale * b, "lambda_d": lambda_d, OUTPUT_SCALE: scale}


def scaled_base(
    base: Float[Tensor, "*batch out"], params: Mapping[str, Tensor], bias: Tensor | None, x: Float[Tensor, "*batch in"]
) -> Float[Tensor, "*batch out"]:
    """Compute `s * (base - bias) + bias`, where s is the `output_scale` in `params`.

    Example:
        >>> params = {"output_scale": torch.tensor([2.0, 1.0])}
        >>> scaled_base(torch.tensor([3.0, 3.0]), params, torch.ones(2), torch.ones(5))
        tensor([5., 3.])
    """
    scale = _with_share(params, OUTPUT_SCALE, params[OUTPUT_SCALE])
    if scale.shape[-1:] != base.shape[-1:]:
        raise ValueError(
            f"{OUTPUT_SCALE} {tuple(scale.shape)} must have shape (*rows, {base.shape[-1]}): the layer has "
            f"{base.shape[-1]} outputs."
        )
    scale = align_rows(OUTPUT_SCALE, scale, x)
    if bias is None:
        return scale * base
    # Subtracting the bias from `base` would take a pass over (*batch, out), and change bits where s = 1.
    return scale * base + (1 - scale) * align_rows("bias", bias, x)


def rescaled_delta(
    delta: Float[Tensor, "*rows out in"], params: Mapping[str, Tensor], weight: Float[Tensor, "out in"]
) -> Float[Tensor, "*rows out in"]:
    """Return DVoRA's update of a weight, `s (W + delta) - W`, where `delta = diag(lambda_b) B diag(lambda_d) A`.

    The scale `s` is the magnitude divided by the norm of each row of `W + delta`.

    Example:
        >>> weight, params = torch.tensor([[3.0, 3.0]]), {"magnitude": torch.tensor([10.0])}
        >>> rescaled_delta(torch.tensor([[0.0, 1.0]]), params, weight)
        tensor([[3., 5.]])
    """
    name = MAGNITUDE if MAGNITUDE in params else OUTPUT_SCALE
    scale, flat = match_rows({name: params[name], "the update": delta.flatten(-2)})
    delta = flat.unflatten(-1, weight.shape)
    if name == MAGNITUDE:
        norm = row_norms(weight + delta)
        scale = _with_share(params, MAGNITUDE, scale / torch.where(norm > 0, norm, 1.0))
        delta = scale[..., None] * delta
    else:
        scale = _with_share(params, OUTPUT_SCALE, scale)
    return (scale - 1)[..., None] * weight + delta


def _adapted_square_norm(
    b: Tensor, d: Tensor, B: Tensor, square_norm: Tensor, C: Tensor, G: Tensor
) -> Float[Tensor, "*rows out"]:
    """Compute ‖W_i + ΔW_i‖² by the formula at the top of this module."""
    dtype = torch.promote_types(C.dtype, b.dtype)
    square_norm, C, G = square_norm.to(dtype), C.to(dtype), G.to(dtype)
    b, d, B = b.to(dtype), d.to(dtype), B.to(dtype)
    rows = max(1, d.numel() // d.shape[-1])
    quadratic = []
    for part in B.split(max(1, _CHUNK // (rows * d.shape[-1]))):
        scaled = part * d[..., None, :]  # (*rows, chunk, r)
        quadratic.append((scaled @ G * scaled).sum(-1))
    return square_norm + 2 * b * linear(d, B * C) + b.square() * torch.cat(quadratic, -1)


def _checked(params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return `lambda_b`, `lambda_d` and `magnitude`, after checking keys and shapes."""
    wanted = {*VECTORS, MAGNITUDE}
    odd = sorted(wanted ^ (params.keys() - {join_key(MAGNITUDE, BASE_SHARE)}))
    if odd:
        raise ValueError(
            f"params of a DVoRA layer must have the keys {sorted(wanted)}, got {sorted(params)}. To sum DVoRA "
            "adapters, fold them first with fold_magnitude."
        )
    lambda_b, lambda_d, magnitude = (params[name] for name in (*VECTORS, MAGNITUDE))
    for name, vector in zip((*VECTORS, MAGNITUDE), (lambda_b, lambda_d, magnitude), strict=True):
        if not isinstance(vector, Tensor) or not vector.is_floating_point() or vector.dim() < 1:
            raise ValueError(f"{name} must be a floating-point vector, got {described(vector)}.")
    out_features, r = lambda_b.shape[-1], lambda_d.shape[-1]
    if magnitude.shape[-1] != out_features:
        raise ValueError(
            f"magnitude {tuple(magnitude.shape)} must have shape (*rows, {out_features}), because lambda_b has shape "
            f"{tuple(lambda_b.shape)}."
        )
    if missing := sorted(name for name in ("vera_B", *STATISTICS) if name not in frozen):
        raise ValueError(f"frozen lacks {missing}; pass frozen | norm_statistics(weight, frozen).")
    shapes = {name: tuple(frozen[name].shape) for name in STATISTICS}
    expected = {"square_norm": (out_features,), "C": (out_features, r), "G": (r, r)}
    if shapes != expected or frozen["vera_B"].shape[0] < out_features or frozen["vera_B"].shape[1:] != (r,):
        raise ValueError(
            f"for out={out_features} and r={r}, vera_B must have shape (>= {out_features}, {r}), got "
            f"{tuple(frozen['vera_B'].shape)}. The statistics must have shapes {expected}, got {shapes}."
        )
    return lambda_b, lambda_d, magnitude


def _with_share(params: Mapping[str, Tensor], name: str, scale: Tensor) -> Tensor:
    """Add the base share of each row (see `select_adapters`) to the scale, because the scale of the base model is 1."""
    share = params.get(join_key(name, BASE_SHARE))
    return scale if share is None else scale + with_dims(share[..., None], scale.dim())


def _distinct(vector: Tensor) -> Tensor:
    """Return only the first row if all rows are views of one adapter, so that the norm is computed only once."""
    return vector[:1] if vector.dim() > 1 and vector.stride(0) == 0 else vector


def _square_norm(weight: Tensor) -> Tensor:
    return weight.square().sum(-1)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
