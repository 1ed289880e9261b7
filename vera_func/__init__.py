"""VeRA adapters as pure functions on `torch.func`, over bitsandbytes 4-bit and 8-bit weights."""

from .core.adapter import (
    delta_weight as delta_weight,
    dropout_mask as dropout_mask,
    init_params as init_params,
    vera_forward as vera_forward,
)
from .core.projection import init_projections as init_projections
from .io.bank import (
    Bank as Bank,
    append_to_bank as append_to_bank,
    export_adapters as export_adapters,
    import_adapters as import_adapters,
    open_bank as open_bank,
    save_bank as save_bank,
)
from .io.checkpoint import load_adapter as load_adapter, save_adapter as save_adapter
from .io.lora import export_lora as export_lora
from .merging.layer import (
    MergeReport as MergeReport,
    merge_calibrated as merge_calibrated,
    merge_dense as merge_dense,
    merge_quantized as merge_quantized,
    merge_report as merge_report,
    merge_stochastic as merge_stochastic,
)
from .merging.model import merge as merge, merge_advice as merge_advice, merge_reports as merge_reports
from .merging.second_moments import calibrated_weights as calibrated_weights, layer_grams as layer_grams
from .model.adapt import Adapted as Adapted, adapt as adapt
from .model.algebra import add_adapters as add_adapters, scale_adapter as scale_adapter
from .model.batch import (
    num_adapters as num_adapters,
    pool_adapters as pool_adapters,
    select_adapters as select_adapters,
    stack_adapters as stack_adapters,
    unstack_adapters as unstack_adapters,
    vmap_adapters as vmap_adapters,
)
from .model.config import VeraConfig as VeraConfig
from .model.convert import dequantize_model as dequantize_model
from .model.layers import Linear as Linear, Linear4bit as Linear4bit, Linear8bitLt as Linear8bitLt
from .model.module import to_module as to_module
from .quant.bnb import from_bnb as from_bnb, to_bnb as to_bnb
from .quant.linear import quantized_linear as quantized_linear
from .quant.value import (
    Quantized4bit as Quantized4bit,
    Quantized8bit as Quantized8bit,
    dequantize as dequantize,
    quantize_4bit as quantize_4bit,
    quantize_8bit as quantize_8bit,
)
from .train.distributed import mean_over_parts as mean_over_parts, processes as processes, spread as spread
from .train.fit import Fit as Fit, batch_indices as batch_indices, fit as fit
from .train.optim import (
    adamw_init as adamw_init,
    adamw_update as adamw_update,
    clip_by_norm as clip_by_norm,
    constant as constant,
    global_norm as global_norm,
    linear_warmup_cosine as linear_warmup_cosine,
)
from .train.sweep import sweep as sweep, sweep_table as sweep_table
