"""Many adapters: evaluation and training against PEFT, one after another, and against the bare base."""

import copy

import peft
import torch
from torch.func import vmap

import vera_func as vf

from .common import bare, interleave, llama, table, train_step


TARGETS = ["q_proj", "v_proj"]
SAMPLE = 8  # PEFT's loop is linear in the adapters: this many are timed, and multiplied


def run(dtype, cases):
    """Print a table with a row for each `(adapters, tokens)`."""
    model = llama(dtype=dtype)
    config = vf.VeraConfig(r=256, target_modules=TARGETS)
    adapted, rounded = vf.adapt(model, config), vf.adapt(model, config, product_dtype=torch.bfloat16)
    theirs = _peft(model, peft.VeraConfig, r=256)
    # In eval mode bitsandbytes repacks its weights for good, where the CPU has a kernel for that.
    their_eval = copy.deepcopy(theirs).eval()
    lora = _peft(model, peft.LoraConfig, r=8).eval()
    rows = [measure(adapted, rounded, theirs, their_eval, lora, n, tokens) for n, tokens in cases]
    table(f"Many adapters, nf4, width 1024, 6 layers, r 256 on q and v, {str(dtype)[6:]}", rows)


def measure(adapted, rounded, theirs, their_eval, lora, n, tokens):
    """One row: `n` adapters, each on a sequence of its own."""
    apply, frozen = adapted.apply, adapted.frozen
    ids = torch.randint(0, 512, (n, tokens), generator=torch.Generator().manual_seed(0))
    stacked = vf.stack_adapters([adapted.params] * n)
    sample = min(n, SAMPLE)
    fused = apply.with_fused_weights()
    base, base_fused = bare(apply), bare(fused)

    def forward_of(apply):
        return torch.no_grad()(lambda: apply(stacked, frozen, input_ids=ids))

    def loss_of(apply):
        return lambda stacked: _losses(apply(stacked, frozen, input_ids=ids).logits).sum()

    @torch.no_grad()
    def by_vmap():
        return vmap(lambda params, ids: fused(params, frozen, input_ids=ids).logits)(stacked, ids[:, None])

    def bare_step():
        """Forward and backward of the base from its embeddings, which is what training an adapter needs of it."""
        embedded = apply.model.get_input_embeddings()(ids).detach().requires_grad_()
        torch.autograd.grad(_losses(base(None, inputs_embeds=embedded).logits).sum(), embedded)

    def peft_loop():
        with torch.no_grad():
            for i in range(sample):
                their_eval.set_adapter(str(i))
                their_eval(input_ids=ids[i : i + 1])

    def lora_batch():
        with torch.no_grad():
            lora(input_ids=ids, adapter_names=[str(i % SAMPLE) for i in range(n)])

    def peft_train():
        for i in range(sample):
            theirs.set_adapter(str(i))
            _losses(theirs(input_ids=ids[i : i + 1]).logits).sum().backward()

    best = interleave(
        {
            "here": forward_of(fused),
            "here 16": forward_of(rounded.apply.with_fused_weights()),
            "vmap": by_vmap,
            "bare": torch.no_grad()(lambda: base_fused(ids)),
            "PEFT": peft_loop,
            "LoRA": lora_batch,
            "train": lambda: train_step(loss_of(apply), stacked),
            "train 16": lambda: train_step(loss_of(rounded.apply), stacked),
            "bare train": bare_step,
            "PEFT train": peft_train,
        }
    )
    return {
        "adapters x tokens": f"{n} x {tokens}",
        "evaluate: PEFT's loop / here": n / sample * best["PEFT"] / best["here"],
        "evaluate: PEFT's LoRA adapter_names / here": best["LoRA"] / best["here"],
        "evaluate: here / bare base": best["here"] / best["bare"],
        "16-bit products / bare base": best["here 16"] / best["bare"],
        "torch.func.vmap / bare base": best["vmap"] / best["bare"],
        "train: PEFT's loop / here": n / sample * best["PEFT train"] / best["train"],
        "train: here / bare base": best["train"] / best["bare train"],
        "train: 16-bit products / bare base": best["train 16"] / best["bare train"],
        "evaluate, s": best["here"],
        "train step, s": best["train"],
    }


def _losses(logits):
    return logits.float().square().mean((1, 2))


def _peft(model, config, r):
    adapted = peft.get_peft_model(copy.deepcopy(model), config(r=r, target_modules=TARGETS), "0")
    for i in range(1, SAMPLE):
        adapted.add_adapter(str(i), config(r=r, target_modules=TARGETS))
    return adapted
