"""The batches of `vera-func demo` on SmolLM2 in nf4: one evaluation batch and one training step."""

import torch

import vera_func as vf
from vera_func.data.smollm2 import load_smollm2
from vera_func.model.head import token_logits

from .common import interleave, table, train_step


EVALUATION, TRAINING = (32, 30), (16, 50)
LABELS = [4009, 5184]  # any two tokens


def run(dtype):
    """Print seconds of both, with the head for two labels only and for all tokens at the last position."""
    model, _ = load_smollm2(dtype, "nf4")
    model.set_attn_implementation("eager")
    config = vf.VeraConfig(r=256, target_modules=["q_proj", "v_proj"])
    options = {"default": {}, "16-bit products": {"product_dtype": torch.bfloat16}}
    rows = [{"products": name, **measure(vf.adapt(model, config, **kwargs))} for name, kwargs in options.items()]
    table(f"SmolLM2-135M in nf4, r 256 on q and v, {str(dtype)[6:]}", rows)


def measure(adapted):
    """One row of the table, in seconds."""
    apply, params, frozen, _ = adapted

    def labels(params, ids):
        return token_logits(apply, params, frozen, LABELS, input_ids=ids, logits_to_keep=1)

    def last(params, ids):
        return apply(params, frozen, input_ids=ids, logits_to_keep=1).logits

    functions = {}
    for name, logits in (("labels", labels), ("last position", last)):
        evaluation, training = (torch.randint(100, 1000, shape) for shape in (EVALUATION, TRAINING))
        functions[name, "evaluate"] = torch.no_grad()(lambda logits=logits, ids=evaluation: logits(params, ids))
        functions[name, "train"] = lambda logits=logits, ids=training: train_step(
            lambda params: logits(params, ids).float().square().sum(), params
        )
    best = interleave(functions)
    return {f"{what}, head for the {name}, s": best[name, what] for name, what in functions}
