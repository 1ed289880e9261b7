"""Many adapters: evaluation and training against PEFT, one after another, and against the bare base."""

import copy
import resource
import tempfile
import time
from pathlib import Path

import peft
import torch

import vera_func as vf
from vera_func.model.batch import num_adapters

from .common import bare, interleave, llama, table


TARGETS = ["q_proj", "v_proj"]
SAMPLE = 8  # PEFT's loop is linear in the adapters: this many are timed, and multiplied


def run(dtype, cases):
    """Print a table with a row for each `(adapters, tokens)`."""
    model = llama(dtype=dtype)
    adapted = vf.adapt(model, vf.VeraConfig(r=256, target_modules=TARGETS))
    theirs = _peft(model, peft.VeraConfig, r=256)
    # In eval mode bitsandbytes repacks its weights for good, where the CPU has a kernel for that.
    evaluating = copy.deepcopy(theirs).eval(), adapted.apply.with_fused_weights()
    lora = _peft(model, peft.LoraConfig, r=8).eval()
    rows = [measure(adapted, theirs, evaluating, lora, n, tokens) for n, tokens in cases]
    table(f"Many adapters, nf4, width 1024, 6 layers, r 256 on q and v, {str(dtype)[6:]}", rows)


def measure(adapted, theirs, evaluating, lora, n, tokens):
    """One row: `n` adapters, each on a sequence of its own."""
    (apply, params, frozen, _), (their_eval, fused) = adapted, evaluating
    ids = torch.randint(0, 512, (n, tokens), generator=torch.Generator().manual_seed(0))
    stacked = vf.stack_adapters([params] * n)
    sample = min(n, SAMPLE)
    base = bare(fused)

    def forward():
        with torch.no_grad():
            fused(stacked, frozen, input_ids=ids)

    def peft_loop():
        with torch.no_grad():
            for i in range(sample):
                their_eval.set_adapter(str(i))
                their_eval(input_ids=ids[i : i + 1])

    def lora_batch():
        with torch.no_grad():
            lora(input_ids=ids, adapter_names=[str(i % SAMPLE) for i in range(n)])

    def loss(stacked):
        return apply(stacked, frozen, input_ids=ids).logits.float().square().mean((1, 2)).sum()

    def train():
        leaves = {key: p.detach().requires_grad_() for key, p in stacked.items()}
        torch.autograd.grad(loss(leaves), list(leaves.values()))

    def peft_train():
        for i in range(sample):
            theirs.set_adapter(str(i))
            theirs(input_ids=ids[i : i + 1]).logits.float().square().mean().backward()

    best = interleave(
        {
            "here": forward,
            "bare": lambda: base(ids),
            "PEFT": peft_loop,
            "LoRA": lora_batch,
            "train": train,
            "PEFT train": peft_train,
        }
    )
    return {
        "adapters x tokens": f"{n} x {tokens}",
        "evaluate: PEFT's loop / here": n / sample * best["PEFT"] / best["here"],
        "evaluate: PEFT's LoRA adapter_names / here": best["LoRA"] / best["here"],
        "evaluate: here / bare base": best["here"] / best["bare"],
        "train: PEFT's loop / here": n / sample * best["PEFT train"] / best["train"],
        "evaluate, s": best["here"],
        "train step, s": best["train"],
    }


def bank(n):
    """Stacking from a bank: time, and memory beside the adapters' own bytes."""
    model = llama()
    adapted = vf.adapt(model, vf.VeraConfig(r=256, target_modules=TARGETS))
    stacked = {key: value.expand(n, *value.shape).contiguous() for key, value in adapted.params.items()}
    size = sum(leaf.numel() * leaf.element_size() for leaf in stacked.values())
    with tempfile.TemporaryDirectory() as folder:
        path = vf.save_bank(Path(folder) / "bank.safetensors", stacked, *adapted[2:], names=[str(i) for i in range(n)])
        del stacked
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start = time.perf_counter()
        opened = vf.open_bank(path)
        everything = opened.read()
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        opened.read([str(i * 7919 % n) for i in range(64)])
        few = time.perf_counter() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    row = {
        "adapters": n, "bytes each": size // n, "MB in all": size / 1e6, "stacked, s": seconds, "64 of them, s": few,
        "peak above the start / own bytes": max(0.0, grown / size),
    }  # fmt: skip
    table("A bank of adapters", [row])
    assert num_adapters(everything) == n


def _peft(model, config, r):
    adapted = peft.get_peft_model(copy.deepcopy(model), config(r=r, target_modules=TARGETS), "0")
    for i in range(1, SAMPLE):
        adapted.add_adapter(str(i), config(r=r, target_modules=TARGETS))
    return adapted
