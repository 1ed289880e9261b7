"""Recognize the quantized layers of other libraries, which are not supported, by class name.

The kernels of other libraries have no derivatives, or derivatives for plain autograd only. vera_func has no type for
the weights of other libraries. The libraries need not be installed.
"""

import re
from typing import NamedTuple

from torch import nn


class Library(NamedTuple):
    """A quantization library.

    Attributes:
        name: Name for error messages.
        packages: Python packages that define the library's layers or tensors.
        classes: Regular expression for class names of the library's layers, in any Python package.
        dequantize: Expression for the dense weight of a layer, or None if the library has no public function.
        holds: Attribute that a layer must have in addition to a matching class name, or None.
    """

    name: str
    packages: tuple[str, ...]
    classes: str = ""
    dequantize: str | None = None
    holds: str | None = None


# The first match counts, since GPTQModel also has AWQ layers.
LIBRARIES = (
    Library("AWQ", ("awq",), r"WQLinear\w*|Awq\w*Linear\w*"),
    Library("GPTQ", ("auto_gptq", "gptqmodel"), r"\w*QuantLinear\w*", "layer.dequantize_weight().T", "qweight"),
    Library("HQQ", ("hqq",), r"HQQLinear\w*", "layer.dequantize()"),
    Library("EETQ", ("eetq",), r"E[Ee][Tt][Qq]Linear|W8A16Linear"),
    Library("torchao", ("torchao",), dequantize="layer.weight.dequantize()"),
    Library("Quanto", ("optimum.quanto", "quanto"), dequantize="layer.weight.dequantize()"),
    Library("AQLM", ("aqlm",)),
    Library("compressed-tensors", ("compressed_tensors",), r"CompressedTensors\w*Linear|CompressedLinear"),
    Library("FP8", (), r"FP8\w*Linear|FbgemmFp8Linear"),
)


def foreign_layer(model: nn.Module) -> tuple[str, str, Library] | None:
    """Return the name, class name and library of the first layer that another library quantized, or None.

    Example:
        >>> foreign_layer(nn.Linear(3, 5)) is None
        True
        >>> HQQLinear = type("HQQLinear", (nn.Module,), {})
        >>> name, kind, library = foreign_layer(nn.Sequential(nn.ReLU(), HQQLinear()))
        >>> name, kind, library.name
        ('1', 'HQQLinear', 'HQQ')
    """
    known: dict[type, Library | None] = {}
    for name, module in model.named_modules():
        for part in (module, module._parameters.get("weight")):  # some libraries replace only the class of the weight
            kind = type(part)
            if kind not in known:
                known[kind] = next((library for library in LIBRARIES if _belongs(part, library)), None)
            library = known[kind]
            if library is not None:
                return name, kind.__name__, library
    return None


def foreign_error(name: str, kind: str, library: Library) -> str:
    """Return the error message for a layer of another library."""
    dense = f" Or replace each layer by an nn.Linear with weight {library.dequantize}." if library.dequantize else ""
    return (
        f"{name!r} is quantized by {library.name} ({kind}), but only dense and bitsandbytes layers are supported. "
        "Load the original weights and quantize them: vf.quantize_model(model, 'nf4'), or "
        f"BitsAndBytesConfig(load_in_4bit=True) in transformers.{dense}"
    )


def _belongs(part: object, library: Library) -> bool:
    packages = tuple(f"{package}." for package in library.packages)
    if any(f"{kind.__module__}.".startswith(packages) for kind in type(part).__mro__):
        return True
    named = bool(library.classes) and re.fullmatch(library.classes, type(part).__name__) is not None
    return named and (library.holds is None or hasattr(part, library.holds))
