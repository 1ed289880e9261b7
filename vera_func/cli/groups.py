"""Groups of command-line options, as named tuples.

If a parameter of a command is a group, `flatten` replaces the parameter with one option per field of the tuple.
"""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from . import options as o


if TYPE_CHECKING:
    import torch

    from ..data.models import Base
    from ..data.sources import Source


class BaseOptions(NamedTuple):
    """Options of the base model."""

    model: o.Model = None
    quant: o.Quant = None
    dtype: o.Dtype = None
    device: o.Device = None

    def load(self, source: "Source") -> "Base":
        """Load the base model that `source` names, with these options."""
        from ..data.sources import base_of

        return base_of(source, self.quant, dtype_of(self.dtype), self.device or "auto")


class AdapterOptions(NamedTuple):
    """Options that select adapters."""

    adapter: o.Adapter = None
    bank: o.Bank = None
    name: o.Names = None

    def open(self, model: str | None, *, one: bool = False) -> "Source":
        """Read the adapters' configuration and metadata; `model` replaces the configured base model."""
        from ..data.sources import open_source

        return open_source(self.adapter, self.bank, self.name, model, one=one)


class TrainOptions(NamedTuple):
    """The options of the command `train`, except for its data, base model and output."""

    each: o.Each = False
    prompt: o.Prompt = None
    max_length: o.MaxLength = None
    truncate_side: o.TruncateSide = None
    packing: o.Packing = None
    r: o.Rank = 256
    targets: o.Targets = None
    steps: o.TrainSteps = None
    epochs: o.Epochs = None
    batch_size: o.TrainingBatch = 16
    parts: o.Accumulate = None
    learning_rate: o.LearningRates = "2e-2"
    schedule: o.ScheduleName = "cosine"
    warmup: o.Warmup = 0.0
    weight_decay: o.WeightDecay = 0.0
    clip: o.Clip = 1.0
    dropout: o.Dropout = 0.0
    dora: o.Dora = False
    checkpointing: o.Checkpointing = False
    eval_every: o.EvalEvery = None
    patience: o.Patience = None
    log: o.Log = None
    beta: o.Betas = None
    reference: o.Reference = None
    together: o.Together = 64
    adapters: o.Adapters = 1
    seed: o.TrainingSeed = 0


def dtype_of(name: str | None) -> "torch.dtype | None":
    """The torch dtype for a value of `--dtype`."""
    import torch

    return getattr(torch, name) if name else None


def format_of(to: str) -> "str | torch.dtype":
    """The format of merged weights for a value of `--to`: a torch dtype, or the name of a quantization format."""
    import torch

    return to if to in ("nf4", "fp4", "int8") else getattr(torch, to)


def flatten(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Wrap a command for typer, with one parameter per option.

    The wrapper returns a function to be called outside typer, because typer would catch exceptions of the command.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, tuple)
    }

    @wraps(command)
    def parsed(**options: Any) -> Callable[[], None]:
        for name, group in groups.items():
            options[name] = group(**{field: options.pop(field) for field in group._fields})
        return partial(command, **options)

    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            signature = inspect.signature(groups[name])
            fields = get_type_hints(groups[name], include_extras=True)
            parameters += [each.replace(annotation=fields[key]) for key, each in signature.parameters.items()]
        else:
            parameters.append(parameter)
    options = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    parsed.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    parsed.__annotations__ = {each.name: each.annotation for each in options}
    return parsed
