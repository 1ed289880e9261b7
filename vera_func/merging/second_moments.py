"""Compute input second moments E[x xᵀ] of each layer of a model, for a calibrated merge.

    H = Σ_t w_t x_t x_tᵀ / Σ_t w_t,        w_t = 1 or ‖∂ readout / ∂ y_t‖²

With equal weights w_t, a calibrated merge preserves the outputs of each layer equally well at all tokens. But most
tokens have little influence on the model's answer. With a `readout`, such as the answer's logit, the weight of a token
is the squared norm of the readout's gradient with respect to the layer's output y. Weighted second moments move the
error of the merge to tokens with little influence.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.shapes import require_finite, without_autocast
from ..model.adapt import Adapted, require_adapted
from ..model.module import adapted_module
from ..model.targets import adapted_layers
from ..quant.bnb import from_bnb, is_bnb_linear
from ..quant.value import Quantized, Quantized4bit
from .layer import merge_calibrated


UNIFORM = 0.1  # fraction of unweighted second moments in the result, for a well-conditioned matrix


def second_moments(
    adapted: Adapted,
    batches: Iterable[Mapping[str, Any]],
    *,
    readout: Callable[[Any], Tensor] | None = None,
) -> dict[str, Float[Tensor, "in in"]]:
    """Return the mean of `x xᵀ` over the inputs `x` of each adapted layer, as a dict keyed by module name.

    The inputs come from one forward pass of the adapted model per batch. With `readout`, each batch also needs a
    backward pass. Each layer needs the memory of an (in, in) matrix. Tokens with an `attention_mask` (b, seq) of 0 are
    excluded.

    Args:
        adapted: The model with the adapter to merge.
        batches: Batches of keyword arguments of the model, such as `{"input_ids": ..., "attention_mask": ...}`. A few
            thousand tokens in total are enough.
        readout: Function that takes the model's output and returns one scalar per example, with shape (b,). For a
            classifier that answers with a token, return the difference between the logits of two answers. The weight of
            each token is the squared norm of the readout's gradient with respect to the layer's output. None weights
            all tokens equally.

    Raises:
        ValueError: If there are no batches, if a batch is not a mapping, if the readout does not depend on an adapted
            layer, or if a value is not finite.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> adapted = adapt(nn.Sequential(nn.Linear(2, 3)), VeraConfig(r=4, target_modules=["0"]))
        >>> second_moments(adapted, [{"input": torch.eye(2)}])["0"]
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])

    Reference:
        Second moments weighted by the gradient with respect to a layer's output, as in
        https://arxiv.org/abs/2505.07004.
    """
    if readout is not None and torch.is_inference_mode_enabled():
        raise ValueError("a readout needs gradients: call second_moments outside of torch.inference_mode().")
    module = adapted_module(adapted)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    sums = {name: _Sums() for name in adapted.apply.targets}
    captured: list[tuple[str, Tensor, Tensor]] = []
    for name in sums:
        module.get_submodule(name).register_forward_hook(partial(_capture, captured, name, readout is not None))
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(f"a batch must be a mapping of the model's keyword arguments, got {type(batch).__name__}.")
        with torch.set_grad_enabled(readout is not None):
            output = module(**batch)
            if readout is not None:
                value = readout(output)
                if not (isinstance(value, Tensor) and value.requires_grad):
                    raise ValueError(
                        "the readout does not depend on any adapted layer: check that no output is detached."
                    )
                value.sum().backward()
        for name, x, y in captured:  # a shared layer is called several times
            included = _token_mask(x, batch.get("attention_mask"))
            sums[name].add(x[included].float(), None if y.grad is None else y.grad[included].float())
        captured.clear()
    moments = {name: total.mean(name, weighted=readout is not None) for name, total in sums.items()}
    for name, mean in moments.items():
        require_finite(f"the second moments of {name!r}", mean, "check the batches, the model and the adapter")
    return moments


def calibrate_weights(
    adapted: Adapted,
    moments: Mapping[str, Float[Tensor, "in in"]],
    *,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> dict[str, Quantized]:
    """Merge every adapted 4-bit layer of a model with calibration, and return the merged weights, keyed by module name.

    Pass the result to `merge(..., weights=...)`. A layer of width 576 takes about one second on two cores.

    Args:
        adapted: A model whose adapted layers are 4-bit, with a single adapter.
        moments: From `second_moments`.
        progress: Function such as `tqdm.tqdm` that wraps the iterable of layer names.

    Raises:
        ValueError: If an adapted layer is not a 4-bit layer, or has no second moments in `moments`.

    Example:
        >>> from vera_func import VeraConfig, adapt, merge, quantize_4bit, to_bnb
        >>> model = nn.Sequential(to_bnb(quantize_4bit(torch.randn(32, 64))))
        >>> adapted = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> moments = second_moments(adapted, [{"input": torch.randn(99, 64)}])
        >>> weights = calibrate_weights(adapted, moments)
        >>> type(merge(model, adapted.params, adapted.frozen, weights=weights)[0]).__name__
        'Linear4bit'
    """
    require_adapted(adapted)
    layers = adapted_layers(adapted.apply.model, adapted.params)
    weights: dict[str, Quantized] = {}
    for name in progress(list(layers)):
        module = adapted.apply.model.get_submodule(name)
        q = from_bnb(module)[0] if is_bnb_linear(module) else None
        if not isinstance(q, Quantized4bit):
            raise ValueError(
                f"{name!r} is a {type(module).__name__}, but only 4-bit layers can be calibrated: call merge without "
                "calibrated weights."
            )
        if name not in moments:
            raise ValueError(
                f"moments lacks the layer {name!r}, got {sorted(moments)[:3]}: pass the moments of all adapted layers."
            )
        weights[name] = merge_calibrated(q, layers[name], adapted.frozen, gram=moments[name])
    return weights


class _Sums:
    """Sums over the tokens of all batches, for the second moments of one layer."""

    def __init__(self) -> None:
        self.count = 0
        self.plain: Any = 0.0  # Σ x xᵀ, (in, in)
        self.weighted: Any = 0.0  # Σ w x xᵀ, (in, in)
        self.mass: Any = 0.0  # Σ w

    def add(self, x: Float[Tensor, "tokens in"], gradient: Float[Tensor, "tokens out"] | None) -> None:
        """Add the inputs of a batch. A token's weight is the squared norm of `gradient`, the readout's gradient."""
        self.count += len(x)
        with without_autocast(x.device):
            self.plain = self.plain + x.T @ x
            if gradient is not None:
                weights = gradient.square().sum(-1)
                self.weighted = self.weighted + (x.T * weights) @ x
                self.mass = self.mass + weights.sum()

    def mean(self, name: str, weighted: bool) -> Float[Tensor, "in in"]:
        if not self.count:
            raise ValueError("batches must contain at least one token to calibrate with, got none.")
        plain = self.plain / self.count
        if not weighted:
            return plain
        if not self.mass > 0:
            raise ValueError(f"the readout does not depend on {name!r}: check that no output is detached.")
        return UNIFORM * plain + (1 - UNIFORM) * self.weighted / self.mass


def _capture(
    captured: list[tuple[str, Tensor, Tensor]],
    name: str,
    with_grad: bool,
    layer: nn.Module,
    args: tuple,
    output: Tensor,
) -> None:
    """Forward hook: append a layer's name, input and output, and retain the output's gradient if `with_grad`."""
    if with_grad:
        if not output.requires_grad:
            output.requires_grad_(True)
        output.retain_grad()
    captured.append((name, args[0].detach(), output))


def _token_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return a boolean mask (*batch,) of the rows of `x` (*batch, in) that are tokens and not padding."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return mask.bool()
    return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
