"""Weights to quantize and to merge: shapes, formats, adapters, and the formula as the oracle of quantized values."""

from itertools import product

import torch
from bitsandbytes import functional
from torch.utils._pytree import tree_flatten

import vera_func as vf
from vera_func.quant.value import BLOCKSIZES


# A single value; one row; primes; no whole byte; rows that are no whole blocks; more than 256 blocks.
SHAPES = [(1, 1), (1, 64), (5, 1), (13, 37), (32, 64), (33, 96), (97, 101)]
OUT, IN, R = 96, 128, 16  # of a merge
OPTIONS = list(product(["nf4", "fp4"], BLOCKSIZES[:2] + BLOCKSIZES[-1:], [False, True]))


def formula(q):
    """The oracle: `code[index] * absmax` in float64, for every value; slow and obvious."""
    if isinstance(q, vf.Quantized8bit):
        return q.codes.double() * q.scale.double()[:, None] / 127
    count = q.shape[0] * q.shape[1]
    packed = q.packed.reshape(-1).view(torch.uint8).long()
    indices = torch.stack([packed // 16, packed % 16], 1).reshape(-1)[:count]
    absmax = q.absmax.double()
    if q.nested is not None:
        scale = q.nested.scale.double().repeat_interleave(256)[: absmax.numel()]
        absmax = q.nested.code.double()[q.absmax.long()] * scale + q.nested.offset.double()
    code = functional.get_4bit_type(q.quant_type, device="cpu").double()
    return (code[indices] * absmax.repeat_interleave(q.blocksize)[:count]).reshape(q.shape)


def assert_same(actual, expected):
    """Equal in every bit and in all metadata."""
    leaves, spec = tree_flatten(actual)
    expected_leaves, expected_spec = tree_flatten(expected)
    assert spec == expected_spec
    for leaf, other in zip(leaves, expected_leaves, strict=True):
        assert leaf.dtype == other.dtype
        assert torch.equal(leaf, other)


def make_adapter(size, weight, r=R, lambda_d=None, seed=0):
    """An adapter with ‖ΔW‖ = `size` ‖W‖ for a weight (out, in), and its projections; `lambda_d` random if None."""
    out, in_ = weight.shape
    generator = torch.Generator().manual_seed(seed)
    frozen = vf.init_projections(r, in_, out, key=seed)
    params = {"lambda_b": torch.randn(out, generator=generator), "lambda_d": torch.randn(r, generator=generator)}
    if lambda_d is not None:
        params["lambda_d"] = torch.full((r,), lambda_d)
    params["lambda_b"] *= size * weight.float().norm() / vf.delta_weight(params, frozen, in_).norm()
    return params, frozen


def make_weight(out=OUT, in_=IN, dtype=torch.float32):
    return (0.02 * torch.randn(out, in_, generator=torch.Generator().manual_seed(1))).to(dtype)
