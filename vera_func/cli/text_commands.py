"""Commands that process texts: demo, train, evaluate, predict, generate."""

import sys
from typing import Annotated, Any

import typer

from . import options as o


def demo(
    data: o.ExamplesOrReviews = None,
    prompt: o.Prompt = None,
    model: o.ModelToTrain = None,
    quant: o.Quant = None,
    dtype: o.Dtype = None,
    r: o.Rank = 256,
    targets: o.Targets = None,
    steps: o.Steps = None,
    batch_size: o.TrainingBatch = 16,
    learning_rate: o.LearningRate = 2e-2,
    adapters: o.Adapters = 1,
    parts: o.MicroBatches = None,
    seed: o.TrainingSeed = 0,
    out: Annotated[str, o.folder("Folder for the adapter.")] = "vera-demo",
    json: o.Json = False,
) -> None:
    """End-to-end example with a narrated log; --adapters N runs a sweep.

    Quantizes a language model, trains an adapter that classifies texts, saves
    it, and checks that the loaded adapter gives the same logits.

    Example:
      vera-func demo
      vera-func demo --adapters 8 --steps 100 --out my-sweep
    """
    _train(narrated=not json, **locals())


def train(
    data: o.Examples,
    out: Annotated[str, o.folder("Folder for the adapter.")],
    prompt: o.Prompt = None,
    model: o.ModelToTrain = None,
    quant: o.Quant = None,
    dtype: o.Dtype = None,
    r: o.Rank = 256,
    targets: o.Targets = None,
    steps: o.Steps = None,
    batch_size: o.TrainingBatch = 16,
    learning_rate: o.LearningRate = 2e-2,
    adapters: o.Adapters = 1,
    parts: o.MicroBatches = None,
    seed: o.TrainingSeed = 0,
    json: o.Json = False,
) -> None:
    """Train an adapter to classify your texts, and save it as a PEFT directory.

    A fifth of the examples, at most 1,000, is held out to measure accuracy. An
    interrupted run resumes from OUT.training-<hash>, which is deleted on
    success. Labels must begin with different tokens.

    Example:
      vera-func train --data reviews.csv --model ./my-model --out my-adapter
      vera-func train --data messages.csv --out my-adapter \\
        --prompt 'Message: {text}\\nTopic:'
    """
    _train(narrated=False, **locals())


def _train(*, narrated: bool, prompt: str | None, dtype: str | None, json: bool, **options: Any) -> None:
    from rich.text import Text

    from .demo import demo
    from .report import describe, show, show_result

    def narrate(line: str) -> None:
        show(line if "\n" in line else Text(line))  # tables and commands are not wrapped

    if prompt:
        options["prompt"] = prompt
    result = demo(dtype=o.dtype_of(dtype), say=narrate if narrated else _ignore, **options)
    if not narrated:
        fields, out = result._asdict(), options["out"]
        following = f"Next: vera-func predict --adapter {out} 'A new text.'; vera-func inspect {out}"
        show_result(fields, json, *describe(fields, "sweep"), following)


def evaluate(
    adapter: o.Adapter = None,
    bank: o.Bank = None,
    name: o.Names = None,
    model: o.ModelOfAdapter = None,
    quant: o.Quant = None,
    dtype: o.Dtype = None,
    data: o.ExamplesOrReviews = None,
    prompt: o.Prompt = None,
    limit: Annotated[int | None, o.number("--limit", help="Use the first N examples only.", panel=o.DATA)] = None,
    chunk: o.Chunk = 8,
    batch_size: o.BatchSize = 32,
    out: o.Table = None,
    json: o.Json = False,
) -> None:
    """Accuracy and loss of one adapter, of every adapter of a bank, or of the base model.

    All examples of --data are used; without it, the demo's held-out reviews.
    Under torchrun, adapters are sharded across ranks in chunks; the only
    communication is one final all-gather.

    Example:
      vera-func evaluate --bank vera-demo/bank.safetensors --out table.csv
      vera-func evaluate --adapter my-adapter --data reviews.csv
    """
    from ..data.examples import read_examples
    from ..data.sources import open_source
    from .commands import evaluate
    from .demo import HELD_OUT, demo_examples, split_examples
    from .report import check_table_path, show_rows

    source = open_source(adapter, bank, name)
    if out:
        check_table_path(out)  # before an hour's work
    examples = read_examples(data) if data else split_examples(demo_examples(), HELD_OUT, seed=0)[1]
    base = o.load_base(source, model, quant, dtype)
    rows = evaluate(source, base, examples[:limit], prompt=prompt, chunk=chunk, batch_size=batch_size)
    show_rows(rows, out, json)


def predict(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts (default: --data, or the lines of stdin).")
    ] = None,
    adapter: o.Adapter = None,
    bank: o.Bank = None,
    name: o.Names = None,
    model: o.ModelOfAdapter = None,
    quant: o.Quant = None,
    dtype: o.Dtype = None,
    data: o.Texts = None,
    prompt: o.Prompt = None,
    labels: o.Labels = None,
    chunk: o.Chunk = 8,
    batch_size: o.BatchSize = 32,
    out: o.Table = None,
    json: o.Json = False,
) -> None:
    """Predict the label of texts, with its probability.

    The prediction is the argmax over the labels' first tokens (generate uses
    the full vocabulary). Prompts of more than 256 tokens are truncated at the
    end of the text.

    Example:
      vera-func predict --adapter vera-demo 'A joy to watch.' 'Too long.'
      vera-func predict --adapter vera-demo --data new.csv --out labelled.csv
    """
    from ..data.examples import read_texts
    from ..data.sources import open_source
    from .commands import predict
    from .report import check_table_path, show_rows

    if texts and data:
        raise ValueError("give texts or --data, not both.")
    source = open_source(adapter, bank, name)
    if out:
        check_table_path(out)  # before an hour's work
    texts = texts or (read_texts(data) if data else _lines())
    base = o.load_base(source, model, quant, dtype)
    rows = predict(source, base, texts, labels=labels or (), prompt=prompt, chunk=chunk, batch_size=batch_size)
    show_rows(rows, out, json)


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help=r"Prompts, with \n for a line break (default: the lines of stdin)."),
    ] = None,
    adapter: o.Adapter = None,
    bank: o.Bank = None,
    name: o.Names = None,
    model: o.ModelOfAdapter = None,
    quant: o.Quant = None,
    dtype: o.Dtype = None,
    max_new_tokens: Annotated[int, o.number("--max-new-tokens", help="Maximum number of tokens to generate.")] = 40,
    temperature: Annotated[
        float | None, o.number("--temperature", help="Sample at this temperature (default: greedy).", kind=float)
    ] = None,
    seed: Annotated[int, o.option("--seed", help="Seed of the samples.", metavar="N", parser=int)] = 0,
    batch_size: Annotated[int, o.number("--batch-size", help="Prompts per forward pass.")] = 16,
    json: o.Json = False,
) -> None:
    """Continue prompts with one adapter, or each prompt with another adapter of a bank.

    With several adapters, the i-th prompt gets the i-th --name.

    Example:
      vera-func generate --adapter vera-demo 'Review: A joy.\\nSentiment:'
      vera-func generate --bank all.safetensors 'One day' 'One night' \\
        --name a --name b
    """
    from ..data.sources import open_source
    from .commands import generate
    from .report import show_result

    source = open_source(adapter, bank, name)
    lines = [o.newlines(prompt) for prompt in prompts or _lines()]
    rows = generate(
        source,
        o.load_base(source, model, quant, dtype),
        lines,
        max_new_tokens=max_new_tokens,
        temperature=temperature or 0.0,
        seed=seed,
        batch_size=batch_size,
    )
    show_result(rows, json, "\n\n".join(f"[{row['adapter']}] {row['prompt']}{row['text']}" for row in rows))


def _lines() -> list[str]:
    return [line.rstrip("\n") for line in sys.stdin if line.strip()]


def _ignore(line: str) -> None:
    pass
