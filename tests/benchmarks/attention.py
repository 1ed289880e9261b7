"""transformers' two implementations of attention on a CPU, eager over sdpa: which one the command line takes."""

from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vera_func as vf
from vera_func.model.head import token_logits

from .common import interleave, table


SHAPES = [(64, 16), (16, 50), (32, 32), (8, 128), (4, 256), (2, 512), (1, 1024)]


def run(dtype, shapes=SHAPES):
    """Print a row for each batch of texts; layers have the sizes of SmolLM2's."""
    adapted = {name: _adapted(name, dtype) for name in ("eager", "sdpa")}
    rows = []
    for b, seq in shapes:
        ids, mask = torch.randint(256, (b, seq)), torch.ones(b, seq, dtype=torch.long)
        mask[::2, : seq // 4] = 0  # half of the rows are padded
        functions = {}
        for name, one in adapted.items():
            functions[name, "evaluate"] = torch.no_grad()(partial(_loss, one, one.params, ids, mask))
            functions[name, "train"] = partial(_step, one, ids, mask)
        best = interleave(functions)
        rows.append(
            {
                "rows x tokens": f"{b} x {seq}",
                "train, eager / sdpa": best["eager", "train"] / best["sdpa", "train"],
                "evaluate, eager / sdpa": best["eager", "evaluate"] / best["sdpa", "evaluate"],
                "a step with sdpa, ms": 1e3 * best["sdpa", "train"],
            }
        )
    table(f"Attention, 4 dense layers of width 576, r 64 on q and v, {str(dtype)[6:]}", rows)


def _adapted(attention, dtype):
    config = LlamaConfig(
        vocab_size=256, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype).eval()
    return vf.adapt(model, vf.VeraConfig(r=64, target_modules=["q_proj", "v_proj"]))


def _loss(adapted, params, ids, mask):
    inputs = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": 1}
    return token_logits(adapted.apply, params, adapted.frozen, [3, 4], **inputs).float().square().sum()


def _step(adapted, ids, mask):
    leaves = {key: value.detach().requires_grad_() for key, value in adapted.params.items()}
    torch.autograd.grad(_loss(adapted, leaves, ids, mask), list(leaves.values()))
