"""Evaluate adapters with EleutherAI's lm-evaluation-harness (`pip install lm_eval`).

One adapter can be evaluated on any task:

    from lm_eval.models.huggingface import HFLM
    lm_eval.simple_evaluate(model=HFLM(pretrained=vf.to_module(adapted), tokenizer=tokenizer), tasks=["piqa"])

All adapters of a bank can be evaluated on tasks that compare log-likelihoods, such as multiple choice. When a text is
scored for one adapter, a single forward pass computes and caches the scores of the text for all adapters:

    bank = vf.open_bank("all.safetensors")
    for name, lm in zip(bank.names, harness_models(bank.adapted(model), tokenizer)):
        print(name, lm_eval.simple_evaluate(model=lm, tasks=["piqa"])["results"])

Reference:
    https://github.com/EleutherAI/lm-evaluation-harness
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..model.adapt import Adapted
from ..model.batch import num_adapters, select_adapters
from ..model.head import hidden_and_head


class AdapterLM:
    """A model of lm-evaluation-harness for one adapter of a stack, returned by `harness_models`.

    Args:
        scores: Scores of all adapters of the stack.
        index: Index of the adapter in the stack.
    """

    rank, world_size = 0, 1

    def __init__(self, scores: "SharedScores", index: int) -> None:
        self.scores, self.index = scores, index
        self.tokenizer_name = str(scores.tokenizer.name_or_path).replace("/", "__")

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether greedy decoding returns the continuation."""
        pairs = [request.args for request in requests]
        found = self.scores.of(pairs)
        return [(found[pair].logprob[self.index].item(), bool(found[pair].greedy[self.index])) for pair in pairs]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Not supported."""
        raise NotImplementedError(_ONE_BY_ONE)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Not supported."""
        raise NotImplementedError(_ONE_BY_ONE)

    def set_cache_hook(self, hook: Any) -> None:
        """Ignored: `SharedScores` caches the scores."""


_ONE_BY_ONE = (
    "harness_models supports tasks that compare log-likelihoods of continuations, such as multiple choice. For other "
    "tasks evaluate one adapter at a time: HFLM(pretrained=vf.to_module(adapted), tokenizer=tokenizer)."
)


def harness_models(adapted: Adapted, tokenizer: Any, *, batch_size: int = 1) -> list[AdapterLM]:
    """Return an lm-evaluation-harness `LM` for each adapter of a stack; each forward pass evaluates all adapters.

    Args:
        adapted: A language model with stacked params, for example one from `Bank.adapted`.
        tokenizer: The tokenizer of transformers.
        batch_size: Texts per forward pass. With n adapters, a forward pass has `batch_size * n` rows.

    Raises:
        ModuleNotFoundError: If lm_eval is not installed.
        ValueError: If params are not stacked, or if `batch_size` is not a positive integer.
    """
    from lm_eval.api.model import LM

    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
    LM.register(AdapterLM)  # a virtual subclass, so that this module can be imported without lm_eval
    scores = SharedScores(adapted, tokenizer, batch_size)
    return [AdapterLM(scores, i) for i in range(num_adapters(adapted.params))]


class Score(NamedTuple):
    """The scores of a continuation.

    Attributes:
        logprob: Log-probability of the continuation with each adapter, (n,).
        greedy: Whether greedy decoding with each adapter returns the continuation, (n,).
    """

    logprob: Tensor
    greedy: Tensor


class SharedScores:
    """Scores of continuations with all adapters of a stack, computed together and cached.

    Args:
        adapted: A language model with stacked params.
        tokenizer: Tokenizer of the model.
        batch_size: Texts per forward pass.
    """

    def __init__(self, adapted: Adapted, tokenizer: Any, batch_size: int) -> None:
        self.adapted, self.tokenizer, self.batch_size = adapted, tokenizer, batch_size
        self.n = num_adapters(adapted.params)
        config: Any = getattr(adapted.apply.model, "config", None)
        self.max_length = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.known: dict[tuple[str, str], Score] = {}

    def of(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Score]:
        """Return the scores of pairs `(context, continuation)`; each pair is computed only once."""
        # If the continuations have one token each, as in most multiple-choice tasks, they have the same input.
        inputs: dict[tuple[int, ...], list[tuple[tuple[str, str], list[int]]]] = {}
        for pair in dict.fromkeys(pairs):
            if pair not in self.known:
                context, continuation = encode_pair(self.tokenizer, *pair)
                # The last token is predicted, but is not part of the input.
                read = (context + continuation)[-(self.max_length + 1) :][:-1]
                inputs.setdefault(tuple(read), []).append((pair, continuation))
        rows = sorted(inputs, key=len)  # so that the rows of a batch have similar lengths
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            width = max(len(continuation) for row in batch for _, continuation in inputs[row])
            for row, logprobs in zip(batch, self._logprobs(batch, width).unbind(1), strict=True):
                self.known |= {pair: _score(logprobs, continuation) for pair, continuation in inputs[row]}
        return self.known

    @torch.no_grad()
    def _logprobs(self, rows: Sequence[Sequence[int]], width: int) -> Tensor:
        """Log-probabilities of the next token at the last `width` positions of each row, (n, rows, width, vocab)."""
        model: Any = self.adapted.apply.model
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):  # padding is on the right, where causal attention does not see it
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        many = {"input_ids": ids.repeat(self.n, 1), "attention_mask": mask.repeat(self.n, 1)}
        many = {name: value.to(model.device) for name, value in many.items()}
        params = select_adapters(self.adapted.params, torch.arange(self.n).repeat_interleave(len(rows)))
        hidden, head = hidden_and_head(self.adapted.apply, params, self.adapted.frozen, **many)
        # For a row shorter than `width`, the first results are meaningless, and are not used.
        at = (torch.tensor([len(row) for row in rows])[:, None] - width + torch.arange(width)).clamp(min=0)
        at = at.repeat(self.n, 1)[:, :, None].to(hidden.device)
        hidden = hidden.gather(1, at.expand(-1, -1, hidden.shape[-1]))
        logits = hidden if head is None else linear(hidden, head) if isinstance(head, Tensor) else head(hidden)
        return logits.float().log_softmax(-1).unflatten(0, (self.n, len(rows)))


def _score(logprobs: Tensor, continuation: list[int]) -> Score:
    """Compute the score of a continuation from the last positions of `logprobs` (n, width, vocab)."""
    own = logprobs[:, logprobs.shape[1] - len(continuation) :]
    tokens = torch.tensor(continuation, device=own.device).expand(len(own), -1)
    chosen = own.gather(2, tokens[:, :, None])[:, :, 0]
    return Score(chosen.sum(1).cpu(), (own.argmax(2) == tokens).all(1).cpu())


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokenize a context and its continuation in the same way as lm-evaluation-harness.

    Spaces between the context and the continuation belong to the continuation. An empty context becomes the BOS
    token, or the EOS token if there is no BOS token.

    Args:
        tokenizer: A tokenizer of transformers.
        context: A text, or "".
        continuation: The text after the context.

    Raises:
        ValueError: If the continuation has no tokens.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not context:
        tokens = tokenizer.encode(continuation, add_special_tokens=False)
        head, rest = ([start], tokens) if tokens[:1] != [start] else (tokens[:1], tokens[1:])
    else:
        spaces = context[len(context.rstrip()) :]
        context = context.rstrip()
        options = {"add_special_tokens": False} if context.startswith(tokenizer.decode(start)) else {}
        whole = tokenizer.encode(context + spaces + continuation, **options)
        head = tokenizer.encode(context, **options)
        rest = whole[len(head) :]
    if not rest:
        raise ValueError(f"the continuation {continuation!r} has no tokens.")
    return head, rest
