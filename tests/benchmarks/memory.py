"""Peak memory of a training step, each way in a process of its own: with and without activation checkpointing."""

import multiprocessing
import resource
import time

import torch

import vera_func as vf

from .common import llama, table


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WAYS = ["torch.func.grad", "to_module", "to_module, checkpointing", "PEFT", "PEFT, checkpointing"]


def run(dtype, tokens=1024, layers=6, width=1024):
    """Print a row for each way."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for way in WAYS:
        # A process each, since the peak of one never falls.
        with context.Pool(1) as pool:
            peak, seconds = pool.apply(step, (way, dtype, tokens, layers, width))
        rows.append({"a training step by": way, "peak above the model, MB": peak / 1e6, "seconds": seconds})
    title = f"Memory: {tokens} tokens, all-linear r 256, nf4, width {width}, {layers} layers, {str(dtype)[6:]}"
    table(title, rows)


def step(way, dtype, tokens, layers, width):
    """Bytes by which the peak rises over two steps, and the seconds of the second."""
    model = llama(width, layers, dtype)
    ids = torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(0))
    if way.startswith("PEFT"):
        import peft

        module = peft.get_peft_model(model, peft.VeraConfig(r=256, target_modules=LINEARS))
    else:
        adapted = vf.adapt(model, vf.VeraConfig(r=256, target_modules=LINEARS))
        module = vf.to_module(adapted)
    if way.endswith("checkpointing"):
        module.gradient_checkpointing_enable()

    def loss(params):
        return adapted.apply(params, adapted.frozen, input_ids=ids).logits.float().square().mean()

    def train():
        if way == "torch.func.grad":
            torch.func.grad(loss)(adapted.params)
        else:
            module(input_ids=ids).logits.float().square().mean().backward()

    with torch.no_grad():  # what every forward needs, loaded before the count
        module(input_ids=ids[:, :8])
    before = _peak()
    train()
    start = time.perf_counter()
    train()
    return _peak() - before, time.perf_counter() - start


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
