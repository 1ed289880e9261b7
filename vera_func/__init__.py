"""VeRA adapters as pure functions on `torch.func`, over bitsandbytes 4-bit and 8-bit weights.

    y = W x + lambda_b * (B (lambda_d * (A x)))

`W` is frozen and may be quantized. `A` and `B` are random, frozen, and shared by all layers and all adapters. An
adapter is a flat dict of tensors, the vectors `lambda_b` (out,) and `lambda_d` (r,) of each layer. `help(vf.NAME)`
gives the shapes, the errors and an example of each name below.

One layer:
    init_projections    the shared projections `{"vera_A": (r, in), "vera_B": (out, r)}`, bitwise equal to PEFT's
    init_params         a new adapter, `{"lambda_b": (out,), "lambda_d": (r,)}`
    vera_forward        the output of an adapted layer, for any frozen layer `base_fn`
    delta_weight        the update of the weight as a dense matrix, (out, in)
    dropout_mask        a random mask for the input of `A`

Quantized weights:
    quantize_4bit, quantize_8bit    quantize a weight, bit for bit as bitsandbytes does
    Quantized4bit, Quantized8bit    quantized weights as immutable values, which are pytrees
    dequantize          the dense weight of a quantized weight
    quantized_linear    a linear layer with a quantized weight, which works under every transform
    validate            check a quantized weight that another program made
    from_bnb, to_bnb    convert bitsandbytes' modules to quantized weights, and back

A model:
    VeraConfig          the layers to adapt, and how; the fields are PEFT's
    adapt               make `(apply, params, frozen, config)` from a model and a configuration
    Adapted, Apply      the tuple that `adapt` returns, and the type of `apply` (the model as a pure function)
    to_module           the adapted model as an `nn.Module`, for Trainer and activation checkpointing
    quantize_model      a copy of a model with quantized linear layers
    dequantize_model    a copy of a model with dense linear layers
    num_parameters      the numbers of trainable parameters and of all parameters
    Linear, Linear4bit, Linear8bitLt    one adapted layer as a module

Many adapters:
    stack_adapters, unstack_adapters    combine adapters in one dict with a leading axis (n,), and split it again
    select_adapters     select an adapter, or a weighted sum of several, for each row of a batch
    vmap_adapters       run all adapters on one batch, in one forward pass
    pool_adapters       combine adapters of different rank, targets and projections in one stack
    scale_adapter, add_adapters         multiply the update of an adapter, or add the updates of several
    fold_magnitude      prepare DVoRA adapters for inference: compute the row norms only once

Training:
    grad, value_and_grad    gradients of pure functions: `torch.func.grad`, but as fast as plain autograd
    next_token_loss     loss of a language model for each row; applies the output head only to positions with labels
    sequence_logprobs   log-probability of each row's labels
    dpo_loss            loss for pairs of a better and a worse answer (direct preference optimization)
    fit, Fit            a training loop for one adapter or many, and the state of the loop
    save_fit, load_fit  write and read the state of `fit` as a checkpoint
    per_example_grads   the gradient of each example, from one backward pass
    clip_per_example, private_step    differentially private training: clip per-example gradients, and add noise
    evolve              train without gradients, by evolution strategies on a stack of adapters

Merging:
    merge_quantized, merge_dense, merge_calibrated    merge the update of one layer into its weight
    merge_report, MergeReport    how much of the update a merged weight retains
    merge               a plain model with the adapter merged into its weights
    model_merge_report  `merge_report` for each layer of a model

Files:
    save_adapter, load_adapter   write and read PEFT's adapter directories
    from_peft           convert the adapter of a `peft.PeftModel` in memory
    export_lora         write an adapter as a LoRA with the same update, for PEFT or llama.cpp
    save_bank, open_bank, Bank   write and read many adapters in one file
    save_quantized, load_quantized    write and read a quantized model, without quantizing again

In submodules: `vera_func.train.optim` (AdamW and schedules as pure functions), `vera_func.train.sweep` (grids),
`vera_func.train.privacy` (accounting, Poisson batches), `vera_func.train.influence` (TracIn, inverse Fisher),
`vera_func.train.distributed` (torchrun), `vera_func.model.head` (hidden states and output head of a language model),
`vera_func.core.dora` and `vera_func.model.dora` (the row norms of DVoRA), `vera_func.merging.second_moments`
(calibrated merging of a model), `vera_func.io.bank` (converting banks), `vera_func.io.push` (the Hugging Face hub),
`vera_func.data` and `vera_func.cli` (the command `vera-func`).
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .core.adapter import delta_weight, dropout_mask, init_params, vera_forward
    from .core.grad import grad, value_and_grad
    from .core.projection import init_projections
    from .io.bank import Bank, open_bank, save_bank
    from .io.checkpoint import load_adapter, save_adapter
    from .io.lora import export_lora
    from .io.module import to_module
    from .io.peft import from_peft
    from .io.quantized import load_quantized, save_quantized
    from .merging.layer import merge_calibrated, merge_dense, merge_quantized
    from .merging.model import merge, model_merge_report
    from .merging.report import MergeReport, merge_report
    from .model.adapt import Adapted, adapt, num_parameters
    from .model.algebra import add_adapters, scale_adapter
    from .model.apply import Apply
    from .model.batch import select_adapters, stack_adapters, unstack_adapters
    from .model.config import VeraConfig
    from .model.convert import dequantize_model, quantize_model
    from .model.dora import fold_magnitude
    from .model.layers import Linear, Linear4bit, Linear8bitLt
    from .model.pool import pool_adapters
    from .model.vmap import vmap_adapters
    from .quant.bnb import from_bnb, to_bnb
    from .quant.linear import quantized_linear
    from .quant.quantize import dequantize, quantize_4bit, quantize_8bit
    from .quant.value import Quantized4bit, Quantized8bit, validate
    from .train.evolve import evolve
    from .train.fit import fit
    from .train.losses import next_token_loss, sequence_logprobs
    from .train.per_example import per_example_grads
    from .train.preferences import dpo_loss
    from .train.privacy import clip_per_example, private_step
    from .train.run import Fit, load_fit, save_fit

# The public names of each module. A module is imported when one of its names is first used, so that importing
# `vera_func` is cheap.
_MODULES = {
    "core.projection": ("init_projections",),
    "core.adapter": ("init_params", "vera_forward", "delta_weight", "dropout_mask"),
    "core.grad": ("grad", "value_and_grad"),
    "quant.value": ("Quantized4bit", "Quantized8bit", "validate"),
    "quant.quantize": ("quantize_4bit", "quantize_8bit", "dequantize"),
    "quant.linear": ("quantized_linear",),
    "quant.bnb": ("from_bnb", "to_bnb"),
    "model.config": ("VeraConfig",),
    "model.apply": ("Apply",),
    "model.adapt": ("adapt", "Adapted", "num_parameters"),
    "io.module": ("to_module",),
    "model.convert": ("quantize_model", "dequantize_model"),
    "model.layers": ("Linear", "Linear4bit", "Linear8bitLt"),
    "model.batch": ("stack_adapters", "unstack_adapters", "select_adapters"),
    "model.vmap": ("vmap_adapters",),
    "model.pool": ("pool_adapters",),
    "model.algebra": ("scale_adapter", "add_adapters"),
    "model.dora": ("fold_magnitude",),
    "train.fit": ("fit",),
    "train.losses": ("next_token_loss", "sequence_logprobs"),
    "train.preferences": ("dpo_loss",),
    "train.run": ("Fit", "save_fit", "load_fit"),
    "train.per_example": ("per_example_grads",),
    "train.privacy": ("clip_per_example", "private_step"),
    "train.evolve": ("evolve",),
    "merging.layer": ("merge_quantized", "merge_dense", "merge_calibrated"),
    "merging.report": ("merge_report", "MergeReport"),
    "merging.model": ("merge", "model_merge_report"),
    "io.checkpoint": ("save_adapter", "load_adapter"),
    "io.peft": ("from_peft",),
    "io.lora": ("export_lora",),
    "io.bank": ("save_bank", "open_bank", "Bank"),
    "io.quantized": ("save_quantized", "load_quantized"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
# Removed names of version 0.1, and their replacements.
_RENAMED = {
    "merge_reports": "vf.model_merge_report(adapted)",
    "merge_advice": "vf.model_merge_report(adapted), which returns the figures; vera-func merge also prints advice",
    "layer_grams": "vera_func.merging.second_moments.second_moments",
    "calibrated_weights": "vera_func.merging.second_moments.calibrate_weights(adapted, moments)",
    "merge_stochastic": "vera_func.merging.layer.merge_stochastic",
    "num_adapters": "vera_func.model.batch.num_adapters",
    "processes": "vera_func.train.distributed.process_group",
    "spread": "vera_func.train.distributed.map_sharded",
    "mean_over_parts": "vera_func.train.distributed.mean_over_micro_batches",
    **{name: f"vera_func.io.bank.{name}" for name in ("append_to_bank", "import_adapters", "export_adapters")},
    **{name: f"vera_func.train.sweep.{name}" for name in ("sweep", "sweep_table")},
    **{
        name: f"vera_func.train.optim.{name}"
        for name in ("adamw_init", "adamw_update", "clip_by_norm", "constant", "global_norm", "linear_warmup_cosine")
    },
    "batch_indices": "vera_func.train.fit.batch_indices",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if name == "__version__":
        return import_module("importlib.metadata").version("vera-func")
    if name in _RENAMED:
        raise AttributeError(f"vera_func.{name} was renamed in version 0.2: use {_RENAMED[name]}.")
    raise AttributeError(f"module 'vera_func' has no attribute {name!r}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_quantized_weights() -> None:
    """If torch is imported, register the classes of quantized weights with `torch.load` and as pytrees.

    `vera-func --help` runs without importing torch.
    """
    if "torch" in sys.modules:
        import_module(f"{__name__}.quant.value")


_register_quantized_weights()
