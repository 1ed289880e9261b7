"""Commands that process texts: demo, train, evaluate, predict, generate."""

import sys
from functools import partial
from typing import Annotated

import typer

from . import options as o
from .groups import AdapterOptions, BaseOptions, TrainOptions
from .parsers import newlines


def demo(
    *,
    data: o.ExamplesOrReviews = None,
    prompt: o.Prompt = None,
    base: BaseOptions,
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
    """Run an end-to-end example: train, save and load an adapter.

    The command quantizes a language model, trains an adapter that classifies
    texts, saves the adapter, and checks that loading restores the same logits.

    Example:
      vera-func demo
      vera-func demo --adapters 8 --steps 100 --out my-sweep
    """
    from .training.start import run_of, train_one_set

    options = TrainOptions(
        r=r,
        targets=targets,
        steps=None if steps is None else [steps],
        batch_size=batch_size,
        parts=parts,
        learning_rate=[learning_rate],
        seed=seed,
    )
    run = run_of(out, base, options)
    train_one_set(run, data=data, prompt=prompt, adapters=adapters, narrated=not json, json=json)


def train(
    *,
    data: o.DataSets,
    out: Annotated[str, o.folder("Folder for the adapter.")],
    base: BaseOptions,
    options: TrainOptions,
    json: o.Json = False,
) -> None:
    """Train an adapter and save it as a PEFT directory, or train several adapters and save them as a bank.

    The columns of the data determine the kind of training: text and label
    (classification), text (language modelling), prompt and completion, messages
    (chats), or prompt, chosen and rejected (preferences). All rows are checked
    before the model is loaded. For language modelling, texts of more than
    --max-length tokens are split.

    A fifth of the rows, at most 1,000, is held out. The command reports the
    accuracy (labels) or the loss (other data) on the held-out rows, before and
    after training. After training, the command also reports the reward accuracy
    (preferences) or the perplexity (texts, completions and chats).

    One run trains an adapter for each data set (for preferences, an adapter for
    each pair of a data set and a --beta). An interrupted run resumes from the
    checkpoint OUT.training-<hash>, which is deleted on success.

    Example:
      vera-func train --data reviews.csv --model ./my-model --out my-adapter
      vera-func train --data chats.jsonl --epochs 2 --out my-chat
      vera-func train --data a.jsonl --data b.jsonl --steps 60,100 --out both
      vera-func train --data pairs.jsonl --beta 0.05,0.1,0.5 --out swept
      vera-func train --data messages.csv --out my-adapter \\
        --prompt 'Message: {text}\\nTopic:'
    """
    from .training.start import train

    train(data, out, base, options, json=json)


def evaluate(
    *,
    adapters: AdapterOptions,
    base: BaseOptions,
    data: o.RowsOrReviews = None,
    prompt: o.Prompt = None,
    max_length: o.MaxLengthOfRows = None,
    limit: Annotated[int | None, o.number("--limit", help="Evaluate on the first N rows only.", panel=o.DATA)] = None,
    chunk: o.Chunk = 8,
    batch_size: o.ExamplesPerPass = None,
    ray: o.Ray = None,
    out: o.Table = None,
    json: o.Json = False,
) -> None:
    """Evaluate one adapter, all adapters of a bank, or the base model.

    The command measures the accuracy and loss (labels), the loss and perplexity
    (texts, completions and chats), or the loss, reward accuracy and reward margin
    (preferences). Rewards are relative to the reference.

    Without --adapter and --bank, the base model is evaluated. To compare the base
    model with an adapter, pass the same --max-length and --prompt as in the
    adapter's training. Under torchrun, adapters or batches are sharded across
    ranks. With --ray, adapters are sharded across a Ray cluster.

    Example:
      vera-func evaluate --bank vera-demo/bank.safetensors --out table.csv
      vera-func evaluate --adapter my-adapter --data reviews.csv
      vera-func evaluate --adapter my-chat --data chats.jsonl
      vera-func evaluate --data chats.jsonl --max-length 512
    """
    from .evaluation import evaluate
    from .report import check_table_path, show_rows

    source = adapters.open(base.model)
    if max_length:
        source = source._replace(metadata=source.metadata._replace(max_length=max_length))
    if out:
        check_table_path(out)  # fails before the work, not after it

    load = partial(base.load, source)
    if ray:
        from .on_ray import evaluate_on_ray

        rows = evaluate_on_ray(
            source, load, data, address=ray, prompt=prompt, limit=limit, chunk=chunk, batch_size=batch_size
        )
    else:
        rows = evaluate(source, load, data, prompt=prompt, limit=limit, chunk=chunk, batch_size=batch_size)
    show_rows(rows, out, json)


def predict(
    *,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts to classify (default: --data, or the lines of stdin)."),
    ] = None,
    adapters: AdapterOptions,
    base: BaseOptions,
    data: o.Texts = None,
    prompt: o.Prompt = None,
    labels: o.Labels = None,
    chunk: o.Chunk = 8,
    batch_size: o.BatchSize = 32,
    out: o.Table = None,
    json: o.Json = False,
) -> None:
    """Predict the label of each text, with the probability of the label.

    The predicted label is the label with the most probable first token; tokens
    that do not begin a label are ignored. If a prompt exceeds the maximum length
    used in training (default: 256 tokens), the text is truncated at the end.

    Example:
      vera-func predict --adapter vera-demo 'A joy to watch.' 'Too long.'
      vera-func predict --adapter vera-demo --data new.csv --out labelled.csv
    """
    from ..data.examples import read_texts
    from .prediction import check_labels_option, predict
    from .report import check_table_path, show_rows

    if texts and data:
        raise ValueError("got texts and --data: pass texts or --data, not both.")
    source = adapters.open(base.model)
    check_labels_option(source, labels)
    if out:
        check_table_path(out)  # fails before the work, not after it
    texts = texts or (read_texts(data) if data else _lines())
    rows = predict(
        source, base.load(source), texts, labels=labels or (), prompt=prompt, chunk=chunk, batch_size=batch_size
    )
    show_rows(rows, out, json)


def generate(
    *,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help=r"Prompts; write \n for a line break (default: the lines of stdin)."),
    ] = None,
    adapters: AdapterOptions,
    base: BaseOptions,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Apply the chat template (default: only if trained on chats)."),
    ] = None,
    max_new_tokens: Annotated[int, o.number("--max-new-tokens", help="Maximum number of tokens to generate.")] = 40,
    temperature: Annotated[
        float | None, o.number("--temperature", help="Sampling temperature (default: greedy decoding).", kind=float)
    ] = None,
    seed: Annotated[int, o.option("--seed", help="Seed for sampling.", metavar="N", parser=int)] = 0,
    batch_size: Annotated[int, o.number("--batch-size", help="Number of prompts per forward pass.")] = 16,
    json: o.Json = False,
) -> None:
    """Continue prompts, with one adapter for all prompts or one adapter of a bank per prompt.

    If --name is repeated, the i-th --name selects the adapter for the i-th prompt.

    Example:
      vera-func generate --adapter vera-demo 'Review: A joy.\\nSentiment:'
      vera-func generate --bank all.safetensors 'One day' 'One night' \\
        --name a --name b
    """
    from .generation import generate
    from .report import show_result

    source = adapters.open(base.model)
    lines = [newlines(prompt) for prompt in prompts or _lines()]
    chat = source.metadata.kind == "chat" if chat is None else chat
    rows = generate(
        source,
        base.load(source),
        lines,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature or 0.0,
        seed=seed,
        batch_size=batch_size,
    )
    gap = "\n" if chat else ""
    show_result(rows, json, "\n\n".join(f"[{row['adapter']}] {row['prompt']}{gap}{row['text']}" for row in rows))


def _lines() -> list[str]:
    return [line.rstrip("\n") for line in sys.stdin if line.strip()]
