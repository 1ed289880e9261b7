"""Run the commands `train` and `demo`: choose the training function for the data."""

from collections.abc import Sequence

from rich.text import Text

from ...data.files import find_files, is_hub_id
from ...data.prompts import PROMPT
from ..data_kinds import kind_of, refuse_options
from ..groups import BaseOptions, TrainOptions, dtype_of
from ..report import describe, show, show_result
from .jobs import expand_sources
from .outputs import output_folder
from .settings import Recipe, Run, micro_batches


def train_one_set(run: Run, *, data: str | None, prompt: str | None, adapters: int, narrated: bool, json: bool) -> None:
    """Run the command `demo`, or the command `train` on one data set with labels."""
    from .classifier import train_classifier

    def narrate(line: str) -> None:
        if narrated:
            show(line if "\n" in line else Text(line))  # tables and commands are not wrapped

    result = train_classifier(run, data=data, prompt=prompt or PROMPT, adapters=adapters, say=narrate)
    if not narrated:
        fields, out = result._asdict(), run.out
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
    run = run_of(out, base, options)
    if labelled and len(sources) == 1:
        train_one_set(run, data=sources[0], prompt=options.prompt, adapters=options.adapters, narrated=False, json=json)
        return
    if options.adapters > 1:
        found = f"{len(sources)} data sets" if labelled else "data without labels"
        raise ValueError(f"--adapters requires a single data set with labels, got {found}: leave out --adapters.")
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


def run_of(out: str, base: BaseOptions, options: TrainOptions) -> Run:
    """The options of a run, from the options of the command `train`."""
    return Run(
        out,
        Recipe(
            batch_size=options.batch_size,
            micro_batches=micro_batches(options.parts),
            schedule=options.schedule,
            warmup=options.warmup,
            weight_decay=options.weight_decay,
            clip=options.clip,
            dropout=options.dropout,
            dora=options.dora,
            checkpointing=options.checkpointing,
            eval_every=options.eval_every,
            patience=options.patience,
            seed=options.seed,
            log=options.log,
        ),
        model=base.model,
        quant=base.quant,
        dtype=dtype_of(base.dtype),
        device=base.device or "auto",
        r=options.r,
        targets=options.targets,
        steps=options.steps,
        epochs=options.epochs,
        learning_rates=options.learning_rate,
        max_length=options.max_length,
        together=options.together,
    )
