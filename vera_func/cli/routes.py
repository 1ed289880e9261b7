"""Which function trains or evaluates on which kind of data."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..data.dataset import open_dataset, peek_kind
from ..data.examples import read_examples
from ..data.files import find_files, is_hub_id
from ..data.models import Base
from ..data.sources import Source
from .jobs import expand_sources, value_of
from .report import describe, show_result


def train(
    *,
    data: Sequence[str],
    each: bool,
    out: str,
    classify: Callable[..., None],
    show: bool,
    dtype: str | None,
    device: str | None,
    prompt: str | None,
    max_length: int | None,
    truncate_side: Literal["end", "start"],
    packing: bool,
    steps: list[int] | None,
    epochs: float | None,
    learning_rate: list[float],
    parts: int | None,
    beta: list[float] | None,
    reference: str | None,
    together: int,
    adapters: int,
    **options: Any,
) -> None:
    """The command `train`: classification of labelled texts, or language modelling."""
    if steps and epochs:
        raise ValueError("give --steps or --epochs, not both.")
    sources = expand_sources(data, each)
    recipe = {name: options.pop(name) for name in _RECIPE}
    for source in sources if len(sources) > 1 or beta or reference else ():
        _ = is_hub_id(source) or find_files(source)  # raises if there is no such file
    from ..train.distributed import under_torchrun
    from .options import dtype_of

    if _kind(sources[0]) == "label":
        _refuse({"--beta": beta, "--reference": reference}, "text and label")
        if len(sources) == 1:
            lr, count = value_of("--learning-rate", learning_rate, 0, 1), value_of("--steps", steps or [0], 0, 1)
            classify(
                narrated=False, data=sources[0], out=out, dtype=dtype, device=device, prompt=prompt, json=show,
                steps=count or None, learning_rate=lr, parts=parts, adapters=adapters,
                **_changed(recipe, max_length, epochs), **options,
            )  # fmt: skip
            return
        from .label_sets import train_label_sets as train_sets

        options |= {"prompt": prompt} if prompt else {}
        options |= {"max_length": max_length or 256}
    else:
        _refuse({"--prompt": prompt}, "no labels")
        from .language import train_language as train_sets  # type: ignore[assignment]

        options |= {"betas": beta, "reference": reference, "truncate_side": truncate_side, "packing": packing}
        options |= {"max_length": max_length}
    if adapters > 1:
        raise ValueError("--adapters sweeps over one data set with labels: leave it out.")
    batch_size, seed = options.pop("batch_size"), options.pop("seed")
    from .recipe import Recipe

    result = train_sets(
        sources,
        out=out,
        recipe=Recipe(batch_size, parts or (4 if under_torchrun() else 1), seed=seed, **recipe),
        dtype=dtype_of(dtype),
        device=device or "auto",
        steps=steps,
        epochs=epochs,
        learning_rates=learning_rate,
        chunk=together,
        **options,
    )
    what = f"--bank {result['bank']}" if "bank" in result else f"--adapter {out}"
    command = f"predict {what} 'A new text.'" if result["kind"] == "label" else f"generate {what} 'A prompt'"
    following = f"Next: vera-func {command}; vera-func evaluate {what} --data FILE"
    show_result(result, show, *describe(result, "adapters"), following)


def evaluate(
    source: Source,
    load: Callable[[], Base],
    data: str | None,
    *,
    prompt: str | None,
    limit: int | None,
    chunk: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """The command `evaluate`, by the kind of the data; all rows are checked before the model is loaded."""
    if data is not None and _kind(data) != "label":
        _refuse({"--prompt": prompt}, "no labels")
        from .scoring import evaluate_language

        rows = open_dataset(data)
        return evaluate_language(source, load(), rows, limit=limit, chunk=chunk)
    from ..data.examples import HELD_OUT, demo_examples, split_examples
    from .commands import evaluate

    examples = read_examples(data) if data else split_examples(demo_examples(), HELD_OUT, seed=0)[1]
    return evaluate(source, load(), examples[:limit], prompt=prompt, chunk=chunk, batch_size=batch_size)


# Options of the recipe, which `demo` takes as one.
_RECIPE = ("schedule", "warmup", "weight_decay", "clip", "dropout", "checkpointing", "eval_every", "patience", "log")


def _kind(source: str) -> str:
    """The kind of a data set; the reader of labelled texts reports a file that does not exist."""
    there = is_hub_id(source) or Path(source).exists() or any(sign in source for sign in "*?[")
    return peek_kind(source) if there else "label"


def _changed(recipe: dict[str, Any], max_length: int | None, epochs: float | None) -> dict[str, Any]:
    from .recipe import Recipe

    own = Recipe(**recipe)
    changed = {"recipe": own if own != Recipe() else None, "max_length": max_length, "epochs": epochs}
    return {name: value for name, value in changed.items() if value is not None}


def _refuse(options: dict[str, Any], what: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} has no effect on data with {what}: leave it out.")
