"""Layers that other libraries have quantized are refused by name; the libraries need not be installed."""

import pytest
import torch
from torch import nn

import vera_func as vf
from vera_func.quant.foreign import foreign_layer

from refused import CONFIGURATION, FROZEN, PARAMS


def layer(module, name, base=nn.Module, **attributes):
    """A module of a class as the library would define it."""
    made = type(name, (base,), {"__module__": module})(*((7, 5) if base is nn.Linear else ()))
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


def with_weight(module, name):
    """An `nn.Linear` whose weight is a tensor of a library's class."""
    kind = type(name, (torch.Tensor,), {"__module__": module})
    made = nn.Linear(7, 5)
    made.weight = nn.Parameter(made.weight.data.as_subclass(kind), requires_grad=False)
    assert type(made.weight) is kind
    return made


PACKED = {"qweight": torch.ones(1, dtype=torch.int32)}
LAYERS = {
    "GPTQ of auto_gptq": lambda: layer("auto_gptq.nn_modules.qlinear.qlinear_cuda", "QuantLinear", **PACKED),
    "GPTQ of gptqmodel": lambda: layer("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear", **PACKED),
    "GPTQ of elsewhere": lambda: layer("vendored.gptq", "ExllamaQuantLinear", **PACKED),
    "AWQ of autoawq": lambda: layer("awq.modules.linear.gemm", "WQLinear_GEMM", **PACKED),
    "AWQ of gptqmodel": lambda: layer("gptqmodel.nn_modules.qlinear.gemm_awq", "AwqGEMMQuantLinear", **PACKED),
    "HQQ of hqq": lambda: layer("hqq.core.quantize", "HQQLinear"),
    "EETQ of eetq": lambda: layer("eetq.modules.qlinear", "W8A16Linear"),
    "EETQ of transformers": lambda: layer("transformers.integrations.eetq", "EetqLinear"),
    "torchao of the weight": lambda: with_weight("torchao.quantization.quantize_.workflows", "Int4Tensor"),
    "torchao of training": lambda: layer("torchao.quantization.qat.linear", "FakeQuantizedLinear", nn.Linear),
    "Quanto of optimum": lambda: layer("optimum.quanto.nn.qlinear", "QLinear", nn.Linear),
    "AQLM of aqlm": lambda: layer("aqlm.inference", "QuantizedLinear"),
    "FP8 of transformers": lambda: layer("transformers.integrations.finegrained_fp8", "FP8Linear", nn.Linear),
    "compressed-tensors of the package": lambda: layer("compressed_tensors.linear", "CompressedLinear", nn.Linear),
}


@pytest.mark.parametrize("case", LAYERS)
def test_the_library_is_named_with_what_can_be_done(case, tmp_path):
    foreign = LAYERS[case]()
    model = nn.ModuleDict({"body": nn.Sequential(nn.ReLU(), foreign), "head": nn.Linear(5, 3)})
    library = case.partition(" of ")[0]
    message = rf"'body.1' is quantized by {library} \({foreign_layer(model)[1]}\).*vf.quantize_model\(model, 'nf4'\)"
    vf.save_adapter(tmp_path, PARAMS, FROZEN, CONFIGURATION)
    calls = [
        lambda: vf.adapt(model, vf.VeraConfig(r=4, target_modules=["head"])),
        lambda: vf.load_adapter(tmp_path, model),
        lambda: vf.quantize_model(model, "nf4"),
        lambda: vf.merge(model, PARAMS, FROZEN, torch.float32),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_layers_of_the_same_name_elsewhere_are_not():
    # I-BERT has a QuantLinear with an ordinary weight, for training with simulated quantization.
    plain = layer("transformers.models.ibert.quant_modules", "QuantLinear", weight=nn.Parameter(torch.ones(5, 7)))
    adapted = vf.adapt(nn.Sequential(nn.Linear(7, 5), plain), vf.VeraConfig(r=4, target_modules=["0"]))
    assert adapted.apply.targets == ("0",)


def test_bitsandbytes_is_no_foreign_library():
    assert foreign_layer(nn.Sequential(vf.to_bnb(vf.quantize_8bit(torch.ones(5, 7))))) is None
