"""The CUDA section: Llama-3-8B's shapes, random weights in nf4, bfloat16. `--dry-run` tries it on a CPU, tiny."""

import copy

import peft
import torch

import vera_func as vf

from .common import bare, interleave, llama, table


TARGETS = ["q_proj", "v_proj"]
LLAMA_8B = {"width": 4096, "layers": 32, "kv_heads": 8, "mlp": 14336, "vocab": 128256}
TINY = {"width": 128, "layers": 2, "kv_heads": 1, "mlp": 352, "vocab": 512}


def run(dry_run=False):
    """Print the tables, or say that there is no GPU."""
    if not torch.cuda.is_available() and not dry_run:
        print("\nCUDA: no GPU here, nothing measured. `--dry-run` runs the section on the CPU with tiny shapes.")
        return
    device, shape, factor = ("cpu", TINY, 16) if dry_run else ("cuda", LLAMA_8B, 1)
    print(f"\n## {'CUDA section, DRY RUN on a CPU: these numbers mean nothing' if dry_run else 'CUDA'}")
    model = llama(dtype=torch.bfloat16, device=device, **shape)
    adapted = vf.adapt(model, vf.VeraConfig(r=256, target_modules=TARGETS))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.VeraConfig(r=256, target_modules=TARGETS))
    table("One adapter", [one(adapted, theirs, tokens, device) for tokens in (1, 16, 128, 512, 2048 // factor)])
    rows = [mixed(adapted, n // factor, tokens, device) for n, tokens in ((256, 32), (1024, 1))]
    table("Mixed batches against the bare base; 1 token is decoding, after a prompt of 32 in the cache", rows)
    table("Training many", [train(adapted, 64 // factor, 256 // factor, device)])
    size = sum(p.numel() * p.element_size() for p in adapted.params.values())
    memory = {"adapters": 10_000, "kB each": size / 1e3, "MB in all": size / 1e2}
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        stacked = {key: p.expand(10_000, *p.shape).contiguous() for key, p in adapted.params.items()}
        memory["MB allocated"] = (torch.cuda.memory_allocated() - before) / 1e6
        del stacked
    table("Memory of many", [memory])


def one(adapted, theirs, tokens, device):
    """One adapter against PEFT: forward, training step, peak memory."""
    apply, params, frozen, _ = adapted
    ids = _ids(1, tokens, device)

    def loss(params):
        return apply(params, frozen, input_ids=ids).logits.float().square().mean()

    def step():
        leaves = {key: p.detach().requires_grad_() for key, p in params.items()}
        torch.autograd.grad(loss(leaves), list(leaves.values()))

    def their_step():
        theirs(input_ids=ids).logits.float().square().mean().backward()

    best = interleave(
        {
            "forward": torch.no_grad()(lambda: apply(params, frozen, input_ids=ids)),
            "their forward": torch.no_grad()(lambda: theirs(input_ids=ids)),
            "step": step,
            "their step": their_step,
        }
    )
    return {
        "tokens": tokens,
        "forward / PEFT's": best["forward"] / best["their forward"],
        "training step / PEFT's": best["step"] / best["their step"],
        "peak memory / PEFT's": _peak(step, device) / _peak(their_step, device),
        "forward, ms": 1e3 * best["forward"],
        "training step, ms": 1e3 * best["step"],
    }


def mixed(adapted, n, tokens, device):
    """`n` adapters, a row each, against the base on the same batch."""
    apply, params, frozen, _ = adapted
    stacked, base = vf.stack_adapters([params] * n), bare(apply)
    ids, cached = _ids(n, tokens, device), {}
    if tokens == 1:
        with torch.no_grad():
            prompt = apply(stacked, frozen, input_ids=_ids(n, 32, device), use_cache=True).past_key_values
        cached = {"use_cache": True}

    def options():
        return {**cached, "past_key_values": copy.deepcopy(prompt)} if cached else {}

    ours, theirs = torch.no_grad()(lambda: apply(stacked, frozen, input_ids=ids, **options())), torch.no_grad()(base)
    best = interleave({"mixed": ours, "bare": lambda: theirs(ids, **options()), "cache": lambda: options()}, repeats=10)
    copied = best["cache"] if cached else 0.0
    seconds = {name: best[name] - copied for name in ("mixed", "bare")}
    return {
        "adapters x tokens": f"{n} x {tokens}",
        "mixed / bare": seconds["mixed"] / seconds["bare"],
        "mixed, ms": 1e3 * seconds["mixed"],
    }


def train(adapted, n, tokens, device):
    """A step of `n` adapters at once against one at a time."""
    apply, params, frozen, _ = adapted
    ids = _ids(n, tokens, device)
    stacked = vf.stack_adapters([params] * n)

    def step(params, ids):
        leaves = {key: p.detach().requires_grad_() for key, p in params.items()}
        losses = apply(leaves, frozen, input_ids=ids).logits.float().square().mean((1, 2))
        torch.autograd.grad(losses.sum(), list(leaves.values()))

    best = interleave({"all": lambda: step(stacked, ids), "one": lambda: step(params, ids[:1])})
    return {
        "adapters x tokens": f"{n} x {tokens}",
        "one at a time / all at once": n * best["one"] / best["all"],
        "step, ms": 1e3 * best["all"],
    }


def _ids(rows, tokens, device):
    return torch.randint(0, 512, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def _peak(function, device):
    if device == "cpu":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before
