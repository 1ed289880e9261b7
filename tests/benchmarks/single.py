"""One adapter against PEFT: forward, training step, one token, bytes kept for backward."""

import copy

import peft
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad

import vera_func as vf

from .common import interleave, llama, table


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"q,v": ["q_proj", "v_proj"], "all-linear": LINEARS}


def run(dtype, tokens):
    """Print a table for each choice of targets."""
    for name, targets in TARGETS.items():
        model = llama(dtype=dtype)
        adapted = vf.adapt(model, vf.VeraConfig(r=256, target_modules=targets))
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.VeraConfig(r=256, target_modules=targets))
        # In eval mode bitsandbytes repacks its weights for good, where the CPU has a kernel for that.
        decoding = copy.deepcopy(theirs).eval(), adapted.apply.with_fused_weights()
        rows = [measure(adapted, theirs, decoding, count) for count in tokens]
        table(f"One adapter, nf4, width 1024, 6 layers, r 256 on {name}, {str(dtype)[6:]}", rows)


def measure(adapted, theirs, decoding, tokens):
    """One row: this many tokens in one sequence; the models in eval mode forward, in training mode in a step."""
    (apply, params, frozen, _), (their_eval, fused) = adapted, decoding
    ids = torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(0))

    def loss(params):
        return apply(params, frozen, input_ids=ids).logits.float().square().mean()

    def their_loss():
        return theirs(input_ids=ids).logits.float().square().mean()

    def forward():
        with torch.no_grad():
            fused(params, frozen, input_ids=ids)

    def their_forward():
        with torch.no_grad():
            their_eval(input_ids=ids)

    def train():  # plain autograd
        leaves = {key: p.detach().requires_grad_() for key, p in params.items()}
        torch.autograd.grad(loss(leaves), list(leaves.values()))

    best = interleave(
        {
            "forward": forward,
            "PEFT forward": their_forward,
            "train": train,
            "vf.grad": lambda: vf.grad(loss)(params),
            "torch.func.grad": lambda: grad(loss)(params),
            "PEFT train": lambda: their_loss().backward(),
        }
    )
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    return {
        "tokens": tokens,
        "forward / PEFT's": best["forward"] / best["PEFT forward"],
        "training step / PEFT's": best["train"] / best["PEFT train"],
        "vf.grad / PEFT's step": best["vf.grad"] / best["PEFT train"],
        "torch.func.grad / PEFT's step": best["torch.func.grad"] / best["PEFT train"],
        "vf.grad / plain autograd": best["vf.grad"] / best["train"],
        "bytes kept for backward / PEFT's": _saved_bytes(lambda: loss(leaves)) / _saved_bytes(their_loss),
        "forward, ms": 1e3 * best["forward"],
        "training step, ms": 1e3 * best["train"],
    }


def _saved_bytes(make_loss):
    """Bytes of the distinct tensors that autograd keeps for backward, weights and their codes aside."""
    sizes = {}

    def keep(tensor):
        if tensor.grad_fn is not None:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = make_loss()
    del loss
    return sum(sizes.values())
