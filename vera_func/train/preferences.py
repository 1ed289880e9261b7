"""Direct preference optimization (DPO) as a pure function of the log-probabilities of answers.

    losses = -log sigmoid(beta ((chosen - reference_chosen) - (rejected - reference_rejected)))

DPO needs the log-probabilities of a reference model. No second model is needed: the id -1 of `select_adapters` selects
the base model as the reference. The log-probabilities of the reference do not depend on beta and are computed once. In
this example, the first half of the rows of `ids` are the chosen answers, and one run trains an adapter for each beta:

    def logprobs(params, frozen, input_ids, labels):
        return sequence_logprobs(*hidden_and_head(apply, params, frozen, input_ids=input_ids), labels)

    base = select_adapters(stacked, [-1] * len(ids))  # or [k] * len(ids), another adapter of a stack
    with torch.no_grad():
        reference = logprobs(base, frozen, ids, labels)  # (2 * pairs,)

    def loss(stacked, batch):  # batch: indices of pairs; returns (n,)
        rows = torch.cat([batch, batch + len(ids) // 2])
        policy = vmap_adapters(logprobs, in_dims=None)(stacked, frozen, ids[rows], labels[rows])  # (n, 2 * rows)
        return dpo_loss(*policy.chunk(2, -1), *reference[rows].chunk(2), betas).losses.mean(-1)

    run = fit(loss, stacked, batches, steps=100, learning_rate=1e-2, num_adapters=len(betas))
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.shapes import described, require_positive


class PreferenceLoss(NamedTuple):
    """The DPO loss and the reward margin of each pair of answers.

    Attributes:
        losses: `-log sigmoid(margins)`.
        margins: Reward of the chosen answer minus reward of the rejected answer. A reward is `beta * (log p - log
            p_reference)`. The reward accuracy is `(margins > 0).float().mean()`.
    """

    losses: Float[Tensor, "*pairs"]
    margins: Float[Tensor, "*pairs"]


def dpo_loss(
    chosen: Float[Tensor, "*pairs"],
    rejected: Float[Tensor, "*pairs"],
    reference_chosen: Float[Tensor, "*pairs"],
    reference_rejected: Float[Tensor, "*pairs"],
    beta: Float[Tensor, "*n"] | float,
) -> PreferenceLoss:
    """Compute the loss of direct preference optimization (DPO) for pairs of answers from their log-probabilities.

    Compute the log-probabilities of the reference once, under `torch.no_grad`, with the base model (id -1 of
    `select_adapters`) or with another adapter.

    Args:
        chosen: Log-probabilities of the better answers, from `sequence_logprobs`: (pairs,), or (n, pairs) for stacked
            adapters.
        rejected: Log-probabilities of the worse answers.
        reference_chosen: Log-probabilities of the better answers under the reference; (pairs,) if stacked adapters
            share the reference.
        reference_rejected: Log-probabilities of the worse answers under the reference.
        beta: Positive coefficient; larger values keep the policy closer to the reference. The shape of a tensor
            `beta` must equal the leading axes of `chosen`, such as (n,) for one value per stacked adapter.

    Returns:
        `(losses, margins)`, each with the shape of `chosen`.

    Raises:
        ValueError: If the shapes do not match, or if `beta` is a number that is not positive.

    Example:
        >>> import torch
        >>> chosen, rejected, reference = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]), torch.zeros(2)
        >>> losses, margins = dpo_loss(chosen, rejected, reference, reference, beta=0.1)
        >>> margins, (margins > 0).float().mean()
        (tensor([ 0.1000, -0.1000]), tensor(0.5000))

        Three stacked adapters with different beta share the reference:

        >>> betas = torch.tensor([0.05, 0.1, 0.5])
        >>> policy = torch.randn(3, 4), torch.randn(3, 4)  # from vmap_adapters
        >>> dpo_loss(*policy, torch.zeros(4), torch.zeros(4), betas).losses.mean(-1).shape
        torch.Size([3])

    Reference:
        Rafailov et al. (2023), Direct Preference Optimization, equation 7.
    """
    given = {"chosen": chosen, "rejected": rejected}
    references = {"reference_chosen": reference_chosen, "reference_rejected": reference_rejected}
    for name, value in {**given, **references}.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a tensor of log-probabilities, from sequence_logprobs, got {described(value)}."
            )
        fits = value.shape == chosen.shape
        if name in references:  # may be shared along leading axes
            fits = value.dim() <= chosen.dim() and value.shape == chosen.shape[chosen.dim() - value.dim() :]
        if not fits:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but chosen has shape {tuple(chosen.shape)}: pass one value "
                "per pair."
            )
    if not isinstance(beta, Tensor):
        require_positive("beta", beta)
    elif beta.dim():
        if beta.shape != chosen.shape[: beta.dim()]:
            raise ValueError(
                f"beta has shape {tuple(beta.shape)}, but chosen has shape {tuple(chosen.shape)}: pass one value, or "
                "one value per stacked adapter."
            )
        beta = beta.to(chosen.dtype).reshape(*beta.shape, *[1] * (chosen.dim() - beta.dim()))
    margins = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return PreferenceLoss(-logsigmoid(margins), margins)
