"""Run the commands `train` and `demo`: choose the training function for the data."""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from ...data.files import find_files, is_hub_id
from ...data.prompts import MAX_TOKENS, PROMPT
from ..data_kinds import kind_of, refuse_options
from ..groups import BaseOptions, TrainOptions, dtype_of
from ..report import describe, show, show_result
from .jobs import expand_sources, value_of
from .outputs import output_folder
from .settings import Recipe, Run, micro_batches


def classify(base: BaseOptions, *, narrated: bool, prompt: str | None, json: bool, **options: Any) -> None:
    """Run the command `demo`, or the command `train` on one data set with labels."""
    from .classifier import demo

    def narrate(line: str) -> None:
        if narrated:
            show(line if "\n" in line else Text(line))  # tables and commands are not wrapped

    options |= {"prompt": prompt} if prompt else {}
    options |= {"device": base.device} if base.device else {}
    result = demo(model=base.model, quant=base.quant, dtype=dtype_of(base.dtype), say=narrate, **options)
    if not narrated:
        fields, out = result._asdict(), options["out"]
        following = f"Next: vera-func predict --adapter {out} 'A new text.'; vera-func inspect {out}"
        said = f"The prompt was {prompt or PROMPT!r} (--prompt)."
        show_result(fields, json, *describe(fields, "sweep"), said, following)


def train(data: Sequence[str], out: str, base: BaseOptions, options: TrainOptions, *, json: bool) -> None:
    """Run the command `train`, on data sets of any kind."""
    if options.steps and options.epochs:
        raise ValueError("got --steps and --epochs: pass --steps or --epochs, not both.")
    if options.log:
        output_folder(options.log, "--log")
    sources = expand_sources(data, options.each)
    for source in sources if len(sources) > 1 or options.beta or options.reference else ():
        _ = is_hub_id(source) or find_files(source)  # raises if the file does not exist
    labelled = kind_of(sources[0]) == "label"
    if labelled:
        packing = "--no-packing" if options.packing is False else "--packing"
        refuse_options({"--beta": options.beta, "--reference": options.reference}, "with labels")
        refuse_options({"--truncate-side": options.truncate_side, packing: options.packing}, "with labels")
    else:
        refuse_options({"--prompt": options.prompt}, "without labels")
    if labelled and len(sources) == 1:
        _train_classifier(sources[0], out, base, options, json)
        return
    if options.adapters > 1:
        found = f"{len(sources)} data sets" if labelled else "data without labels"
        raise ValueError(f"--adapters requires a single data set with labels, got {found}: leave out --adapters.")
    run = _run_of(out, base, options)
    if labelled:
        from .label_sets import train_label_sets

        result = train_label_sets(sources, run, prompt=options.prompt or PROMPT)
    else:
        from .unlabelled import train_language

        result = train_language(
            sources, run, betas=options.beta, reference=options.reference, truncate_side=options.truncate_side or "end",
            packing=options.packing is not False,
        )  # fmt: skip
    what = f"--bank {result['bank']}" if "bank" in result else f"--adapter {out}"
    command = f"predict {what} 'A new text.'" if labelled else f"generate {what} 'A prompt'"
    following = f"Next: vera-func {command}; vera-func evaluate {what} --data FILE"
    show_result(result, json, *describe(result, "adapters"), following)


def _train_classifier(source: str, out: str, base: BaseOptions, options: TrainOptions, json: bool) -> None:
    """Train one adapter, or a sweep of adapters, on one data set with labels."""
    same = ("prompt", "r", "targets", "epochs", "batch_size", "parts", "adapters", "seed")
    classify(
        base, narrated=False, json=json, data=source, out=out, recipe=_recipe_of(options),
        steps=value_of("--steps", options.steps, 0, 1) if options.steps else None,
        learning_rate=value_of("--learning-rate", options.learning_rate, 0, 1),
        max_length=options.max_length or MAX_TOKENS, **{name: getattr(options, name) for name in same},
    )  # fmt: skip


def _recipe_of(options: TrainOptions) -> Recipe:
    same = {name: value for name, value in options._asdict().items() if name in Recipe._fields}
    return Recipe(micro_batches=micro_batches(options.parts), **same)


def _run_of(out: str, base: BaseOptions, options: TrainOptions) -> Run:
    return Run(
        out, _recipe_of(options), base.model, base.quant, dtype_of(base.dtype), base.device or "auto", options.r,
        options.targets, options.steps, options.epochs, options.learning_rate, options.max_length, options.together,
    )  # fmt: skip
