"""One adapter against PEFT: forward, training step, one token, bytes kept for backward."""

import copy

import peft
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad

import vera_func as vf

from .common import interleave, llama, table, train_step


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"q,v": ["q_proj", "v_proj"], "all-linear": LINEARS}


def run(dtype, tokens):
    """Print a table for each choice of targets."""
    for name, targets in TARGETS.items():
        model = llama(dtype=dtype)
        config = vf.VeraConfig(r=256, target_modules=targets)
        adapted, rounded = vf.adapt(model, config), vf.adapt(model, config, product_dtype=torch.bfloat16)
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.VeraConfig(r=256, target_modules=targets))
        # In eval mode bitsandbytes repacks its weights for good, where the CPU has a kernel for that.
        their_eval = copy.deepcopy(theirs).eval()
        rows = [measure(adapted, rounded, theirs, their_eval, count) for count in tokens]
        table(f"One adapter, nf4, width 1024, 6 layers, r 256 on {name}, {str(dtype)[6:]}", rows)


def measure(adapted, rounded, theirs, their_eval, tokens):
    """One row: this many tokens in one sequence; the models in eval mode forward, in training mode in a step.

    Products in 16 bits are compared with PEFT under autocast, which multiplies in 16 bits, too.
    """
    ids = torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(0))

    def loss_of(adapted):
        return lambda params: _loss(adapted.apply(params, adapted.frozen, input_ids=ids))

    def forward_of(adapted):
        fused = adapted.apply.with_fused_weights()
        return torch.no_grad()(lambda: fused(adapted.params, adapted.frozen, input_ids=ids))

    def their_loss():
        return _loss(theirs(input_ids=ids))

    def autocast(function):
        def call():
            with torch.autocast("cpu", torch.bfloat16):
                return function()

        return call

    their_forward = torch.no_grad()(lambda: their_eval(input_ids=ids))
    loss, params = loss_of(adapted), adapted.params
    best = interleave(
        {
            "forward": forward_of(adapted),
            "PEFT forward": their_forward,
            "forward 16": forward_of(rounded),
            "PEFT autocast forward": autocast(their_forward),
            "train": lambda: train_step(loss, params),
            "train 16": lambda: train_step(loss_of(rounded), params),
            "vf.grad": lambda: vf.grad(loss)(params),
            "torch.func.grad": lambda: grad(loss)(params),
            "PEFT train": lambda: their_loss().backward(),
            "PEFT autocast train": lambda: autocast(their_loss)().backward(),
        }
    )
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    return {
        "tokens": tokens,
        "forward / PEFT's": best["forward"] / best["PEFT forward"],
        "16-bit forward / PEFT's": best["forward 16"] / best["PEFT forward"],
        "16-bit forward / PEFT's under autocast": best["forward 16"] / best["PEFT autocast forward"],
        "training step / PEFT's": best["train"] / best["PEFT train"],
        "16-bit step / PEFT's": best["train 16"] / best["PEFT train"],
        "16-bit step / PEFT's under autocast": best["train 16"] / best["PEFT autocast train"],
        "vf.grad / PEFT's step": best["vf.grad"] / best["PEFT train"],
        "torch.func.grad / PEFT's step": best["torch.func.grad"] / best["PEFT train"],
        "bytes kept for backward / PEFT's": _saved_bytes(lambda: loss(leaves)) / _saved_bytes(their_loss),
        "forward, ms": 1e3 * best["forward"],
        "training step, ms": 1e3 * best["train"],
    }


def _loss(output):
    return output.logits.float().square().mean()


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
