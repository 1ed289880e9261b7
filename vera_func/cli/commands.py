"""Evaluate adapters, predict labels and generate texts. Each function returns a table, as one dict per row."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..data.assets import quiet_transformers
from ..data.examples import Example
from ..data.models import Base
from ..data.prompts import Encoded, Score, batches_by_length, collate
from ..data.sources import Source, by_labels, load_adapters, task_of
from ..data.task import encode_examples, logits_of, score_of
from ..data.tokens import chat_prompt
from ..model.batch import select_adapters
from ..train.distributed import map_sharded, rank, world_size
from .report import adapters_title, bar


def evaluate(
    source: Source,
    base: Base,
    examples: Sequence[Example],
    *,
    prompt: str | None = None,
    chunk: int = 8,
    batch_size: int = 32,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Accuracy and mean loss of each adapter on the same examples, as one dict per adapter.

    Under torchrun, chunks of adapters are sharded across ranks, or if there are fewer chunks than ranks, batches of
    examples. Every rank returns the same rows, for any number of ranks.

    Args:
        source: From `open_source`.
        base: From `base_of`.
        examples: Labelled examples.
        prompt: Prompt template with `{text}`; None means the template used in training.
        chunk: Number of adapters per forward pass.
        batch_size: Number of examples per adapter and forward pass.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the adapters do not fit the model, or if an example has a label that the adapters were not
            trained on.
    """
    return [
        row
        for part in by_labels(source)
        for row in _evaluate(part, base, examples, prompt=prompt, chunk=chunk, batch_size=batch_size, progress=progress)
    ]


def _evaluate(
    source: Source,
    base: Base,
    examples: Sequence[Example],
    *,
    prompt: str | None,
    chunk: int,
    batch_size: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Evaluate adapters that share one set of labels."""
    task = task_of(source, base, {example.label for example in examples}, prompt)
    rows = encode_examples(base, task, examples)
    starts = range(0, len(source.names), chunk)
    by_chunk = len(starts) >= world_size()
    own = starts[rank()] if by_chunk else 0
    adapted, read = load_adapters(
        source._replace(names=source.names[own : own + chunk]), base.model, base.product_dtype
    )

    def evaluate_chunk(start: int) -> Score:
        names = source.names[start : start + chunk]
        params = read(names) if len(names) > 1 else {k: v[0] for k, v in read(names).items()}
        return score_of(
            adapted, task, params, rows, batch_size=batch_size, map=map if by_chunk else map_sharded,
            progress=bar(adapters_title(start, names, source.names), progress),
        )  # fmt: skip

    scores = map_sharded(evaluate_chunk, starts) if by_chunk else [evaluate_chunk(start) for start in starts]
    accuracy, loss = (torch.cat([value.reshape(-1) for value in column]) for column in zip(*scores, strict=True))
    return [
        {"name": name, "accuracy": right.item(), "loss": mean.item(), "texts": len(rows)}
        for name, right, mean in zip(source.names, accuracy, loss, strict=True)
    ]


def predict(
    source: Source,
    base: Base,
    texts: Sequence[str],
    *,
    labels: Sequence[str] = (),
    prompt: str | None = None,
    chunk: int = 8,
    batch_size: int = 32,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Predict the label of each text with each adapter; return one dict per pair of adapter and text.

    Probabilities are a softmax over the logits of the labels' first tokens. The most probable label is predicted.

    Args:
        texts: Texts to classify.
        labels: Labels to choose from if the metadata of the adapters contains no labels.
        source, base, prompt, chunk, batch_size, progress: As for `evaluate`.

    Raises:
        ValueError: If `texts` is empty or contains an empty text, if neither the metadata nor `labels` gives at least
            two labels, or if the adapters do not fit the model.
    """
    _check_texts("text", texts)
    return [
        row
        for part in by_labels(source)
        for row in _predict(
            part, base, texts, labels=labels, prompt=prompt, chunk=chunk, batch_size=batch_size, progress=progress
        )
    ]


def _predict(
    source: Source,
    base: Base,
    texts: Sequence[str],
    *,
    labels: Sequence[str],
    prompt: str | None,
    chunk: int,
    batch_size: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Predict with adapters that share one set of labels."""
    task = task_of(source, base, labels, prompt)
    rows = encode_examples(base, task, [Example(text, task.labels[0], text) for text in texts])
    batches = batches_by_length(rows, batch_size, task.pad_id)
    position = torch.cat([batch["row"] for batch in batches]).argsort()  # restores the order of texts
    adapted, read = load_adapters(source, base.model, base.product_dtype)
    found = []
    for start in range(0, len(source.names), chunk):
        names = source.names[start : start + chunk]
        logits = partial(logits_of(adapted, task, stacked=True), read(names))
        show = bar(adapters_title(start, names, source.names), progress)
        with torch.no_grad():
            outputs = [logits(batch) for batch in show(batches)]
        best, label = torch.cat(outputs, dim=1)[:, position].double().softmax(-1).max(-1)  # (adapters, texts)
        found += [
            {"text": text, "adapter": name, "label": task.labels[label[i, j]], "probability": best[i, j].item()}
            for i, name in enumerate(names)
            for j, text in enumerate(texts)
        ]
    return found


def check_labels_option(source: Source, labels: Sequence[str] | None) -> None:
    """Check that `--labels` is given only if the metadata contains no labels.

    Raises:
        ValueError: If labels are given, but the metadata of an adapter contains labels.
    """
    known = [part.metadata.labels for part in by_labels(source) if part.metadata.labels]
    if labels and known:
        raise ValueError(
            f"--labels has no effect on an adapter that was trained on the labels {known[0]}: leave out --labels."
        )


def generate(
    source: Source,
    base: Base,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Generate a continuation of each prompt; return one dict per prompt.

    Args:
        source: One adapter for all prompts, or one adapter per prompt.
        base: From `base_of`.
        prompts: Texts to continue.
        chat: Whether to apply the tokenizer's chat template, with each prompt as a message of the user.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: Sampling temperature; 0 means greedy decoding.
        seed: Seed for sampling.
        batch_size: Number of prompts per forward pass.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If `prompts` is empty or contains an empty prompt, or if the number of adapters is neither 1 nor the
            number of prompts.
    """
    _check_texts("prompt", prompts)
    names = source.names * len(prompts) if len(source.names) == 1 else source.names
    if len(names) != len(prompts):
        raise ValueError(
            f"got {len(names)} adapters for {len(prompts)} prompts, expected one adapter, or one adapter per prompt: "
            f"pass a single --name, such as --name {names[0]}, or one --name per prompt in the order of the prompts."
        )
    adapted, read = load_adapters(source, base.model)
    ids = (
        [chat_prompt(base.tokenizer, prompt) for prompt in prompts] if chat else base.tokenizer(list(prompts)).input_ids
    )
    encoded = [Encoded(one, 0) for one in ids]
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    texts: list[str] = []
    with quiet_transformers(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in bar("generate", progress)(range(0, len(prompts), batch_size)):
            rows = slice(start, start + batch_size)
            unique = list(dict.fromkeys(names[rows]))
            params = select_adapters(read(unique), [unique.index(name) for name in names[rows]])
            batch = collate(encoded[rows], base.pad_id)
            inputs = {name: batch[name].to(base.model.device) for name in ("input_ids", "attention_mask")}
            out = adapted.apply.generate(
                params, adapted.frozen, **inputs, **sampling, max_new_tokens=max_new_tokens, pad_token_id=base.pad_id
            )
            new = out[:, inputs["input_ids"].shape[1] :]
            texts += base.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [
        {"prompt": prompt, "adapter": name, "text": text}
        for prompt, name, text in zip(prompts, names, texts, strict=True)
    ]


def _check_texts(kind: str, texts: Sequence[str]) -> None:
    if not texts:
        raise ValueError(f"got no {kind}s, expected at least one {kind}: pass a {kind} as an argument or on stdin.")
    for i, text in enumerate(texts, 1):
        if not text.strip():
            raise ValueError(f"{kind} {i} of {len(texts)} is empty: remove this {kind}.")
