"""What the layers of a running model read: second moments of their inputs, for a merge by calibration.

    H = Σ_t w_t x_t x_tᵀ / Σ_t w_t,        w_t = 1, or the squared derivative of what is read off the model

With equal weights a merge keeps the outputs of each layer at all tokens alike. Most tokens hardly matter for what
the model is asked, though; weighted by the derivative of that answer in the layer's output, the error goes where
it does no harm.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..model.adapt import Adapted
from ..model.module import adapted_module
from ..model.targets import adapted_layers
from ..quant.bnb import from_bnb, is_bnb_linear
from ..quant.value import Quantized, Quantized4bit
from .layer import merge_calibrated


UNIFORM = 0.1  # share of equal weights beside those of the derivative, so that no direction is free


def second_moments(
    adapted: Adapted,
    batches: Iterable[Mapping[str, Any]],
    *,
    readout: Callable[[Any], Tensor] | None = None,
) -> dict[str, Float[Tensor, "in in"]]:
    """The mean of `x xᵀ` over the inputs of every adapted layer of the adapted model, by module name.

    Costs a forward of each batch (with `readout`, a backward, too) and an (in, in) matrix for each layer. Tokens
    that an `attention_mask` (b, seq) leaves out are not counted.

    Args:
        adapted: The model with the adapter that is to be merged; a few thousand tokens in `batches` are enough.
        batches: Keyword arguments of the model, such as `{"input_ids": ..., "attention_mask": ...}`.
        readout: What is read off the model's output, as one number for each row, (b,): for a classification by
            answering, the logits' gap between two answers. A token then counts by the squared derivative of it in
            the layer's output. None counts all tokens alike.

    Raises:
        ValueError: If there are no batches, one is no mapping, the readout depends on no adapted layer, or something is
            not finite.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> adapted = adapt(nn.Sequential(nn.Linear(2, 3)), VeraConfig(r=4, target_modules=["0"]))
        >>> second_moments(adapted, [{"input": torch.eye(2)}])["0"]
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])

    Reference:
        Second moments weighted by the gradient in a layer's output, as in https://arxiv.org/abs/2505.07004.
    """
    module = adapted_module(adapted)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    names = adapted.apply.targets
    sums: dict[str, list[Any]] = {name: [0.0, 0.0, 0.0, 0.0] for name in names}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple, output: Tensor) -> None:
            if readout is not None:
                if not output.requires_grad:
                    output.requires_grad_(True)
                output.retain_grad()
            seen[name] = args[0].detach(), output

        return hook

    for name in names:
        module.get_submodule(name).register_forward_hook(remember(name))
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(f"a batch must be a mapping of the model's keyword arguments, got {type(batch).__name__}.")
        with torch.set_grad_enabled(readout is not None):
            output = module(**batch)
            if readout is not None:
                value = readout(output)
                if not (isinstance(value, Tensor) and value.requires_grad):
                    raise ValueError("the readout depends on no adapted layer; see that it is not detached.")
                value.sum().backward()
        for name, (x, y) in seen.items():
            counted = _counted(x, batch.get("attention_mask"))
            rows = x[counted].float()
            total = sums[name]
            total[0] = total[0] + rows.T @ rows
            total[1] += len(rows)
            if y.grad is not None:
                weights = y.grad[counted].float().square().sum(-1)
                total[2] = total[2] + (rows.T * weights) @ rows
                total[3] = total[3] + weights.sum()
        seen.clear()
    moments = {}
    for name, (plain, count, weighted, mass) in sums.items():
        if not count:
            raise ValueError("there is nothing to calibrate with: batches are empty, or hold no token.")
        moments[name] = plain / count
        if readout is not None:
            if not mass > 0:
                raise ValueError(f"the readout does not depend on {name!r}; see that it is not detached.")
            moments[name] = UNIFORM * moments[name] + (1 - UNIFORM) * weighted / mass
        if not moments[name].isfinite().all():
            raise ValueError(f"what {name!r} reads is not finite: a batch, the model or the adapter holds NaN or inf.")
    return moments


def calibrate_weights(
    adapted: Adapted,
    moments: Mapping[str, Float[Tensor, "in in"]],
    *,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> dict[str, Quantized]:
    """`merge_calibrated` for every adapted 4-bit layer of a model; give the result to `merge(..., weights=...)`.

    Costs about a second a layer of width 576 on two cores.

    Args:
        adapted: The model, its adapted layers in 4 bits, and a single adapter.
        moments: From `second_moments`.
        progress: Wraps the names, such as `tqdm.tqdm`.

    Raises:
        ValueError: If an adapted layer is not a 4-bit one, or has no second moments.

    Example:
        >>> from vera_func import VeraConfig, adapt, merge, quantize_4bit, to_bnb
        >>> model = nn.Sequential(to_bnb(quantize_4bit(torch.randn(32, 64))))
        >>> adapted = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> moments = second_moments(adapted, [{"input": torch.randn(99, 64)}])
        >>> weights = calibrate_weights(adapted, moments)
        >>> type(merge(model, adapted.params, adapted.frozen, weights=weights)[0]).__name__
        'Linear4bit'
    """
    layers = adapted_layers(adapted.apply.model, adapted.params)
    weights: dict[str, Quantized] = {}
    for name in progress(list(layers)):
        module = adapted.apply.model.get_submodule(name)
        q = from_bnb(module)[0] if is_bnb_linear(module) else None
        if not isinstance(q, Quantized4bit):
            raise ValueError(f"{name!r} is a {type(module).__name__}; calibration is for 4-bit layers.")
        if name not in moments:
            raise ValueError(f"moments has nothing for {name!r}, only for {sorted(moments)[:3]}.")
        weights[name] = merge_calibrated(q, layers[name], adapted.frozen, gram=moments[name])
    return weights


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Which rows of `x` (*batch, in) are tokens, as a mask (*batch,)."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return mask.bool()
    return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
