"""One adapted layer beside what the machine could do: its products and its dequantization, each timed alone."""

from functools import partial

import torch
from torch.nn.functional import linear

import vera_func as vf
from vera_func.quant.cpu_layout import fused_weight
from vera_func.quant.linear import fused_product
from vera_func.quant.value import flatten

from .common import interleave, table


def run(dtype, width=1024, r=256, tokens=(1, 16, 128, 512, 2048)):
    """Print a row for each number of tokens; the model of the last columns is in the README beside this file."""
    table(
        f"Roofline of one layer {width} -> {width}, nf4, r {r}, {str(dtype)[6:]}; vectors in float32",
        [measure(dtype, width, r, count) for count in tokens],
    )
    if dtype == torch.bfloat16:
        products(4 * width)


def products(width, counts=(1, 4, 16, 32, 64, 128)):
    """Print up to how many rows the fused kernel is faster than dequantizing, and than a dense copy."""
    q = vf.quantize_4bit(torch.randn(width, width, generator=torch.Generator().manual_seed(0)).bfloat16())
    fused, dense, spec = fused_weight(q), vf.dequantize(q), flatten(q)[1]
    rows = []
    for count in counts:
        x = torch.randn(count, width).bfloat16()
        functions = {"dequantize, multiply": lambda x=x: vf.quantized_linear(q, x), "dense": lambda x=x: x @ dense.T}
        if fused is not None:
            functions["fused"] = lambda x=x: fused_product(x, fused, spec)
        best = interleave({name: torch.no_grad()(function) for name, function in functions.items()}, repeats=20)
        rows.append({"rows": count, **{f"{name}, ms": 1e3 * seconds for name, seconds in best.items()}})
    missing = "" if fused is not None else "; this CPU has no fused kernel"
    table(f"The product by the number of rows, {width} -> {width}, nf4, bfloat16{missing}", rows)


def measure(dtype, width, r, tokens):
    """Times of a forward and of a step, and of the parts they can't do without."""
    generator = torch.Generator().manual_seed(0)
    q = vf.quantize_4bit(torch.randn(width, width, generator=generator).to(dtype))
    frozen, params = vf.init_projections(r, width, width), vf.init_params(r, width)
    params["lambda_b"] += 1.0
    x = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    dense, constant = vf.dequantize(q, dtype), x.detach()
    wide, hidden = constant.float(), torch.randn(tokens, r, generator=generator)

    def layer(params, x):
        return vf.vera_forward(params, frozen, x, partial(vf.quantized_linear, q))

    def step():
        leaves = [p.detach().requires_grad_() for p in params.values()]
        torch.autograd.grad(layer(dict(zip(params, leaves, strict=True)), x).float().square().sum(), [x, *leaves])

    best = interleave(
        {
            "forward": torch.no_grad()(lambda: layer(params, constant)),
            "step": step,
            "dequantize": lambda: vf.dequantize(q, dtype),
            "base": lambda: linear(constant, dense),
            "A": lambda: linear(wide, frozen["vera_A"]),
            "B": lambda: linear(hidden, frozen["vera_B"]),
        },
        repeats=20,
    )
    ms = {name: 1e3 * seconds for name, seconds in best.items()}
    forward = ms["dequantize"] + ms["base"] + ms["A"] + ms["B"]
    backward = ms["dequantize"] + ms["base"] + ms["A"] + 2 * ms["B"]
    return {
        "tokens": tokens,
        "dequantize, ms": ms["dequantize"],
        "base product, ms": ms["base"],
        "A x, ms": ms["A"],
        "B h, ms": ms["B"],
        "base, Gflop/s": 2 * tokens * width**2 / best["base"] / 1e9,
        "forward / its parts": ms["forward"] / forward,
        "step / its parts": ms["step"] / (forward + backward),
    }
