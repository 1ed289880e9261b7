"""Generate texts."""

from collections.abc import Sequence
from typing import Any

import torch

from ..data.assets import quiet_transformers
from ..data.models import Base
from ..data.prompts import Encoded, collate
from ..data.sources import Source, load_adapters
from ..data.tokens import chat_prompt
from ..model.batch import select_adapters
from .prediction import require_texts
from .report import bar


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
        chat: Whether to apply the tokenizer's chat template, with each prompt as a user message.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: Sampling temperature; 0 means greedy decoding.
        seed: Seed for sampling.
        batch_size: Number of prompts per forward pass.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If `prompts` is empty or contains an empty prompt, or if the number of adapters is neither 1 nor the
            number of prompts.
    """
    require_texts("prompt", prompts)
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
