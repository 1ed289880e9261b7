"""Generate the model card of an adapter, a `README.md` with metadata for the Hugging Face hub."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.keys import adapted_modules, is_vector, split_key
from ..model.config import VeraConfig
from .files import written_by
from .hub import is_repository


CARD = "README.md"
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_LOADING = """
## Loading

`adapter` is the id of this repository or a local directory, and `model` is the base model.

With vera_func, as a pure function:

```python
import vera_func as vf

apply, params, frozen, config = vf.load_adapter(adapter, model)
output = apply(params, frozen, input_ids=input_ids)
```
{peft}
For servers without VeRA, export the adapter as an equivalent LoRA{dora} in PEFT's format:

```python
vf.export_lora("lora", params, frozen, config, model)
```
"""

_PEFT = """
With [PEFT](https://github.com/huggingface/peft):

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, adapter)
```
"""


def card_text(params: Mapping[str, Tensor], config: VeraConfig, metrics: Mapping[str, float] | None = None) -> str:
    r"""Return the text of an adapter's model card.

    If `config.base_model_name_or_path` is not a hub id `user/repo`, the metadata omit the base model, because the hub
    rejects a `base_model` that is not a hub id. The `library_name` is "peft", so that the hub shows how to load the
    adapter. For DVoRA, which PEFT does not support, the `library_name` is "vera_func".

    Args:
        params: Params of a single adapter.
        config: The configuration of the adapter.
        metrics: Evaluation results, by name.

    Raises:
        ValueError: If `metrics` is not a dict of numbers.

    Example:
        >>> import torch
        >>> params = {"q.lambda_b": torch.ones(6), "q.lambda_d": torch.ones(4)}
        >>> print("\n".join(card_text(params, VeraConfig(r=4, base_model_name_or_path="a/b")).splitlines()[:4]))
        ---
        library_name: "peft"
        base_model: "a/b"
        tags: ["vera", "vera_func", "base_model:adapter:a/b"]
    """
    if not isinstance(metrics, Mapping | None):
        raise ValueError(
            f"metrics must be a dict from names to numbers, such as {{'accuracy': 0.9}}, got {type(metrics).__name__}."
        )
    for name, value in (metrics or {}).items():
        if not isinstance(value, int | float):
            raise ValueError(f"metrics[{name!r}] must be a number, got {type(value).__name__}.")
    base = config.base_model_name_or_path
    fields = _front_matter(config, base if is_repository(base) else None, list(metrics or {}))
    # A JSON value is a YAML value.
    front = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in fields.items())
    method = "DVoRA" if config.use_dora else "VeRA"
    title = f"# {method} adapter for {base}" if base else f"# {method} adapter"
    intro = (
        "Trained with [VeRA](https://arxiv.org/abs/2310.11454), `W x + lambda_b * (B (lambda_d * (A x)))`: two vectors "
        "for each adapted layer; `A` and `B` are random, frozen and shared by all layers."
    )
    if config.use_dora:
        intro += (
            " The rows of each adapted weight are scaled to trained magnitudes, as in "
            "[DoRA](https://arxiv.org/abs/2402.09353). PEFT can't load this adapter."
        )
    text = f"---\n{front}---\n\n{title}\n\n{intro}\n\n{_table(('', ''), _facts(params, config))}"
    if metrics:
        rows = [(name, f"{value:.6g}") for name, value in metrics.items()]
        text += f"\n## Metrics\n\n{_table(('metric', 'value'), rows)}"
    peft, dora = ("", " with `use_dora`") if config.use_dora else (_PEFT, "")
    return text + _LOADING.replace("{peft}", peft).replace("{dora}", dora)


def _front_matter(config: VeraConfig, base: str | None, metrics: list[str]) -> dict[str, Any]:
    fields = {
        "library_name": "vera_func" if config.use_dora else "peft",
        "base_model": base,
        "tags": ["vera", "vera_func", *([f"base_model:adapter:{base}"] if base else [])],
        "pipeline_tag": _PIPELINES.get(config.task_type or ""),
        "metrics": metrics,
    }
    return {key: value for key, value in fields.items() if value}


def _facts(params: Mapping[str, Tensor], config: VeraConfig) -> list[tuple[str, str]]:
    layers = adapted_modules(params)
    targets = config.target_modules
    if isinstance(targets, str):
        matched = f"`{targets}`"
    else:
        matched = ", ".join(f"`{end}`" for end in sorted({split_key(name)[1] for name in targets or layers}))
    vectors = sum(value.numel() for key, value in params.items() if is_vector(key))
    total = sum(value.numel() for value in params.values())
    own = f", {total - vectors:,} of them the model's own (biases, heads)" if total > vectors else ""
    drawn = f"not stored, drawn from the seed {config.projection_prng_key}"
    return [
        ("base model", config.base_model_name_or_path or "not named"),
        ("method", "DVoRA" if config.use_dora else "VeRA"),
        ("rank r", f"{config.r:,}"),
        ("target modules", matched),
        ("adapted layers", f"{len({*layers}):,}"),
        ("trained parameters", f"{total:,}{own}"),
        ("projections", "stored" if config.save_projection else drawn),
        ("written by", written_by()),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)
