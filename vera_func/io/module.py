"""Convert an adapted model to an `nn.Module` that transformers' Trainer can train and save as an adapter.

The script below fine-tunes a 4-bit model. Each checkpoint is an adapter directory, which `load_adapter` and PEFT read.
After an interruption, a new run of the script resumes from the last checkpoint. At the end, Trainer loads the best
checkpoint.

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization)
    module = vf.to_module(vf.adapt(model, vf.VeraConfig(r=256, target_modules=["q_proj", "v_proj"])))
    args = TrainingArguments(
        "out", num_train_epochs=2, per_device_train_batch_size=4, learning_rate=2e-2, save_steps=2, eval_steps=2,
        eval_strategy="steps", load_best_model_at_end=True,
    )
    trainer = Trainer(module, args, train_dataset=train, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=get_last_checkpoint("out") if os.path.isdir("out") else None)
    trainer.save_model("my-adapter")
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..model.adapt import Adapted
from ..model.base_layers import QuantizedLinear
from ..model.config import VeraConfig
from ..model.layers import Projections
from ..model.module import adapted_module
from ..private import QUANTIZED_ATTRIBUTES
from .checkpoint import save_adapter
from .files import replacing


def to_module(adapted: Adapted) -> nn.Module:
    """Return the adapted model as an `nn.Module` of the model's class, with the params as trainable parameters.

    Use the module with APIs that require an `nn.Module`: transformers' Trainer, `torch.optim` optimizers, or activation
    checkpointing, which `torch.func` does not support. The frozen weights share memory with the base model. The
    trainable parameters are copies of the params. For a dict of the trainable parameters with the keys of `params`, use
    `{k: p for k, p in module.named_parameters() if p.requires_grad}`.

    If the model is from transformers, `save_pretrained` of the module calls `save_adapter`, so Trainer's checkpoints
    are adapter directories. For a quantized weight, `num_parameters` of the module counts the unpacked values.

    Args:
        adapted: The result of `adapt` or `load_adapter`, with the params of a single adapter.

    Raises:
        ValueError: If the params are stacked or do not fit the model.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> [name for name, p in to_module(adapted).named_parameters() if p.requires_grad]
        ['0.lambda_b', '0.lambda_d']
    """
    module: Any = adapted_module(adapted)
    for name in QUANTIZED_ATTRIBUTES:  # Trainer rejects a quantized model unless PEFT wraps it
        vars(module).pop(name, None)
    # Instance attributes rather than a subclass, so that the module keeps the model's class, also after unpickling.
    if hasattr(type(module), "save_pretrained"):
        module.save_pretrained = SavePretrained(module, adapted.config, tuple(adapted.params))
        module.register_load_state_dict_post_hook(_expect_only_the_adapter)
    if hasattr(type(module), "num_parameters"):
        module.num_parameters = NumParameters(module)
    return module


@dataclasses.dataclass(eq=False, repr=False)
class SavePretrained:
    """The method `module.save_pretrained(folder)`, which writes the adapter in PEFT's format.

    Attributes:
        module: The module from `to_module`.
        config: Configuration of the adapter.
        keys: Keys of the adapter's params.
    """

    module: nn.Module
    config: VeraConfig
    keys: tuple[str, ...]

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **ignored: Any,
    ) -> None:
        """Write the adapter to a folder. The signature is that of `PreTrainedModel.save_pretrained`.

        Args:
            save_directory: The folder to write.
            is_main_process: If False, nothing is written.
            state_dict: Dict from parameter name to the value to write. Parameters that are not in the dict are written
                with their current values.
            push_to_hub: Not supported; call `module.push_to_hub(name)`.
            ignored: Options for saving full models, such as `max_shard_size`. These options are ignored.
        """
        if push_to_hub:
            raise ValueError("save_pretrained does not support push_to_hub=True: call module.push_to_hub(repository).")
        if not is_main_process:
            return
        own = state_dict or {}
        params = {key: own.get(key, self.module.get_parameter(key)).detach() for key in self.keys}
        pair = next(module for module in self.module.modules() if isinstance(module, Projections))
        folder = save_adapter(save_directory, params, {"vera_A": pair.vera_A, "vera_B": pair.vera_B}, self.config)
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            # Trainer reloads an adapter only if PEFT wraps the model. Otherwise it passes a file with this name to
            # `load_state_dict`.
            with replacing(folder / "model.safetensors") as file:
                save_file({key: value.cpu().contiguous() for key, value in params.items()}, file, {"format": "pt"})


@dataclasses.dataclass(eq=False, repr=False)
class NumParameters:
    """The method `module.num_parameters()`, which counts the unpacked values of a quantized weight.

    Attributes:
        module: The module from `to_module`.
    """

    module: Any

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters. The signature is that of `PreTrainedModel.num_parameters`."""
        dense = type(self.module).num_parameters(self.module, only_trainable, exclude_embeddings)
        packed = {id(m.quantized): m.quantized for m in self.module.modules() if isinstance(m, QuantizedLinear)}
        return dense + (0 if only_trainable else sum(q.shape[0] * q.shape[1] for q in packed.values()))


def _expect_only_the_adapter(module: Any, incompatible: Any) -> None:
    """Do not report frozen parameters as missing if the loaded state dict contains exactly the adapter."""
    frozen = module.state_dict().keys() - {*module.save_pretrained.keys}
    if {*incompatible.missing_keys} == frozen:
        incompatible.missing_keys.clear()
