"""`train`, `evaluate` and `generate` on texts, completions, chats and preferences, with one adapter or several."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import MistralConfig, MistralForCausalLM

import vera_func as vf
from vera_func.cli.training import loop, unlabelled
from vera_func.data.dataset import open_dataset, split_rows
from vera_func.data.metadata import Metadata, read_metadata
from vera_func.data.models import load_base

from hostile import hostile, jsonl


WORDS = ["film", "plot", "actor", "scene", "end", "joy", "great", "bore", "dull", "one", "two", "three"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} [EOS] {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """The tiny model with a chat template."""
    path = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(folder, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def words(seed, most=8):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, most)))


ROWS = {
    "text": lambda i: {"text": f"the film was {words(i)}"},
    "completion": lambda i: {"prompt": f"{words(i)} :", "completion": " great joy"},
    "chat": lambda i: {
        "messages": [{"role": "user", "content": words(i)}, {"role": "assistant", "content": "dull bore"}]
    },
    "preference": lambda i: {"prompt": f"{words(i)} :", "chosen": " joy", "rejected": " bore"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 40 rows of each kind."""
    path = tmp_path_factory.mktemp("data")
    for kind, row in ROWS.items():
        (path / f"{kind}.jsonl").write_text(jsonl([row(i) for i in range(40)]))
    (path / "stars.jsonl").write_text(jsonl([{"text": words(i), "label": i % 3} for i in range(9)]))
    (path / "single.jsonl").write_text(jsonl([ROWS["completion"](0)]))
    (path / "short.jsonl").write_text(jsonl([ROWS["text"](0)]))
    film = (f"{words(i)} {i},{('good', 'bad')[i % 2]},film" for i in range(30))
    (path / "film.csv").write_text("\n".join(["text,label,group", *film]))
    (path / "other.jsonl").write_text(jsonl([ROWS["text"](i) for i in range(100, 124)]))
    return path


@pytest.fixture
def train(run_json, model, tmp_path):
    """Trains in float32 with small batches: `(the result, the folder)`."""

    def call(*words, out="out"):
        options = ("--model", model, "--r", "8", "--batch-size", "4", "--dtype", "float32")
        found = run_json("train", *words, *options, "--out", tmp_path / out)
        assert sorted(path.name for path in tmp_path.glob(f"{out}.training*")) == []
        return found, tmp_path / out

    return call


@pytest.mark.parametrize("kind", ROWS)
def test_train_and_evaluate(train, run, run_json, data, model, tmp_path, kind):
    source = data / f"{kind}.jsonl"
    found, out = train("--data", source, "--steps", "30", "--learning-rate", "0.1", "--max-length", "40")
    assert (found["kind"], found["rows"], found["held_out"], found["steps"]) == (kind, 32, 8, 30)
    assert found["loss"] < found["loss_before"] - 0.01
    assert read_metadata(out) == Metadata(
        "nf4", kind=kind, data=[str(source)], max_length=40, truncate_side="end",
        beta=[0.1] if kind == "preference" else None,
    )  # fmt: skip
    # What is held out, from its own file: the metadata say all that is needed.
    rows = open_dataset(source)
    _, test = split_rows(rows.groups, 8, seed=0)
    lines = source.read_text().splitlines()
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines[i] for i in test.tolist()))
    (after,) = run_json("evaluate", "--adapter", out, "--data", tmp_path / "held_out.jsonl", "--dtype", "float32")
    names = ("loss", "accuracy", "margin") if kind == "preference" else ("loss", "perplexity")
    assert (after.pop("name"), after.pop("rows")) == ("out", 8)
    assert after == pytest.approx({name: found[name] for name in names}, rel=1e-4)
    base = ("--model", model, "--dtype", "float32", "--max-length", "40")
    (before,) = run_json("evaluate", "--data", tmp_path / "held_out.jsonl", *base)
    assert before["loss"] == pytest.approx(found["loss_before"], rel=1e-4)
    assert run_json("inspect", out)["trained_on"] == kind
    refused = run("evaluate", "--adapter", out)
    assert (refused[0], f"trained on data of the kind {kind!r}" in refused[2]) == (2, True)


def params_of(out, model):
    return vf.load_adapter(out, load_base(str(model), "nf4", torch.float32).model).params


@pytest.mark.parametrize("extra", [(), ("--no-packing", "--accumulate", "3", "--weight-decay", "0.1")])
def test_data_sets_together_are_as_alone(train, data, model, extra):
    sources, steps, rates = [data / "text.jsonl", data / "other.jsonl"], ["14", "7"], ["0.1", "0.05"]
    options = ("--max-length", "24", "--warmup", "0.2", *extra)
    both = [word for source in sources for word in ("--data", source)]
    found, out = train(*both, "--steps", ",".join(steps), "--learning-rate", ",".join(rates), *options)
    bank = vf.open_bank(out / "bank.safetensors")
    assert bank.names == ("text", "other")
    assert read_metadata(bank.path).data == [str(source) for source in sources]
    for i, row in enumerate(found["adapters"]):
        assert (row["name"], row["steps"], row["learning_rate"]) == (bank.names[i], int(steps[i]), float(rates[i]))
        one = ("--data", sources[i], "--steps", steps[i], "--learning-rate", rates[i], *options)
        alone, folder = train(*one, out=f"alone{i}")
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert row["loss"] < row["loss_before"]
        for key, value in params_of(folder, model).items():
            difference = (bank.read([bank.names[i]])[key][0] - value).abs().max()
            assert difference <= 1e-5 * value.abs().max(), key


def test_the_base_is_evaluated_on_the_rows_of_the_adapter(train, run, run_json, data, model):
    """Texts are split as in training, so that losses can be compared."""
    source = data / "other.jsonl"
    _, out = train("--data", source, "--steps", "1", "--learning-rate", "1e-9", "--max-length", "8")
    (after,) = run_json("evaluate", "--adapter", out, "--data", source, "--dtype", "float32")
    lengths = {}
    for length in (8, 40):
        base = ("--model", model, "--dtype", "float32", "--max-length", length)
        (lengths[length],) = run_json("evaluate", "--data", source, *base)
    assert lengths[8]["rows"] == after["rows"] > lengths[40]["rows"]
    assert lengths[8]["loss"] == pytest.approx(after["loss"], rel=1e-4)
    line = ("--model", model, "--max-length", "4096")
    assert "has 2048 positions" in run("evaluate", "--data", source, *line)[2]
    refused = run("evaluate", "--adapter", out, "--data", source, "--batch-size", "32")
    said = "vera-func: --batch-size has no effect on data without labels: leave out --batch-size.\n"
    assert refused == (2, "", said)


def test_documents_are_not_packed_where_a_model_would_mix_them(run_json, data, model, tmp_path):
    """The mask of packed rows replaces the sliding window of Mistral; without packing, the loss is the model's own."""
    path = tmp_path / "mistral"
    shutil.copytree(model, path)
    sizes = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=8)).save_pretrained(path)
    line = ["train", "--data", data / "text.jsonl", "--model", path, "--r", 4, "--steps", 3, "--dtype", "float32"]
    with pytest.warns(UserWarning, match="attends to 8 tokens only.*documents are not packed"):
        found = run_json(*line, "--max-length", 24, "--out", tmp_path / "a")
    assert found == run_json(*line, "--max-length", 24, "--no-packing", "--out", tmp_path / "b") | {
        key: found[key] for key in ("out", "seconds")
    }
    run_json(*line, "--max-length", 8, "--out", tmp_path / "c")  # within the window


def test_of_one_long_document_the_end_is_held_out(train, run_json, tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl([{"text": " ".join(words(i) for i in range(100))}]))
    found, _ = train("--data", tmp_path / "a.jsonl", "--steps", "20", "--learning-rate", "0.1", "--max-length", "16")
    assert found["rows"] + found["held_out"] > 30
    assert found["held_out"] == -(-(found["rows"] + found["held_out"]) // 5)
    assert found["loss"] < found["loss_before"]


def test_each_file_of_a_folder_in_chunks(train, data, tmp_path):
    folder = tmp_path / "all"
    (folder / "c").mkdir(parents=True)
    for i, name in enumerate(("a.jsonl", "b.jsonl", "c/one.jsonl", "c/two.jsonl")):
        (folder / name).write_text(jsonl([ROWS["completion"](100 * i + k) for k in range(12)]))
    options = ("--each", "--steps", "5", "--learning-rate", "0.1")
    found, out = train("--data", folder, *options)
    rows = {row["name"]: row["rows"] + row["held_out"] for row in found["adapters"]}
    assert rows == {"a": 12, "b": 12, "c": 24}
    chunks, other = train("--data", folder, *options, "--together", "2", out="chunks")
    one, two = (vf.open_bank(path / "bank.safetensors").read() for path in (out, other))
    assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert [row["loss"] for row in chunks["adapters"]] == pytest.approx([row["loss"] for row in found["adapters"]])


def test_betas_in_one_run(train, run_json, data, model, tmp_path):
    options = ("--data", data / "preference.jsonl", "--steps", "12", "--learning-rate", "0.1")
    found, out = train(*options, "--beta", "0.05,0.5")
    assert [(row["name"], row["beta"]) for row in found["adapters"]] == [("beta0.05", 0.05), ("beta0.5", 0.5)]
    bank = vf.open_bank(out / "bank.safetensors")
    for i, beta in enumerate(("0.05", "0.5")):
        row = found["adapters"][i]
        assert row["loss_before"] == pytest.approx(0.693147, rel=1e-4)  # the base is the reference
        assert "accuracy_before" not in row  # of margins that are 0, but for rounding
        alone, folder = train(*options, "--beta", beta, out=f"alone{i}")
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert (row["accuracy"], row["margin"]) == pytest.approx((alone["accuracy"], alone["margin"]), rel=1e-4)
        for key, value in params_of(folder, model).items():
            assert_close(bank.read([bank.names[i]])[key][0], value, rtol=1e-4, atol=1e-5)
    rows = run_json("evaluate", "--bank", bank.path, "--data", data / "preference.jsonl", "--dtype", "float32")
    # The margin is beta times what the adapter changed: each has its own beta from the metadata.
    assert rows[0]["loss"] > rows[1]["loss"]
    assert [row["rows"] for row in rows] == [40, 40]
    # Also if they go through directories, in another order.
    run_json("convert", bank.path, "--out", tmp_path / "each")
    assert [read_metadata(tmp_path / "each" / name).beta for name in bank.names] == [[0.05], [0.5]]
    swapped = tmp_path / "swapped.safetensors"
    run_json("convert", *(tmp_path / "each" / name for name in reversed(bank.names)), "--out", swapped)
    assert read_metadata(swapped).beta == [0.5, 0.05]
    again = run_json("evaluate", "--bank", swapped, "--data", data / "preference.jsonl", "--dtype", "float32")
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in reversed(rows)], rel=1e-5)


def test_a_reference_is_where_training_begins_and_is_not_changed(train, run_json, data, tmp_path):
    _, first = train("--data", data / "completion.jsonl", "--steps", "20", "--learning-rate", "0.1", out="first")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    options = ("--data", data / "preference.jsonl", "--reference", first, "--learning-rate", "0.05")
    found, out = train(*options, "--steps", "10")
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert found["loss_before"] == pytest.approx(0.693147, rel=1e-4)
    assert found["loss"] < found["loss_before"]
    assert read_metadata(out).reference == str(first.resolve())
    (row,) = run_json("evaluate", "--adapter", out, "--data", data / "preference.jsonl", "--dtype", "float32")
    assert row["loss"] < 0.69
    (same,) = run_json("evaluate", "--adapter", first, "--data", data / "preference.jsonl", "--dtype", "float32")
    assert same["loss"] != pytest.approx(0.693147, rel=1e-3)  # its reference is the base


@pytest.mark.parametrize("kind", ["text", "preference"])
def test_a_killed_run_resumes_to_the_same_bits(train, run, data, model, tmp_path, monkeypatch, kind):
    several = ["--beta", "0.1,0.5"] if kind == "preference" else ["--data", data / "other.jsonl"]
    options = ["--data", data / f"{kind}.jsonl", *several, "--steps", "17", "--learning-rate", "0.2"]
    options += ["--eval-every", "3", "--dropout", "0.1", "--accumulate", "2"]
    right, out = train(*options)
    mean, calls = loop.mean_over_micro_batches, []

    def dies(*args, **kwargs):
        calls.append(0)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return mean(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "mean_over_micro_batches", dies)
        line = ("--model", model, "--r", "8", "--batch-size", "4", "--dtype", "float32", "--out", tmp_path / "killed")
        assert run("train", *options, *line)[0] == 130
    assert len(list(tmp_path.glob("killed.training*"))) == 2  # the run and its best
    calls.clear()
    monkeypatch.setattr(loop, "mean_over_micro_batches", lambda *a, **k: (calls.append(0), mean(*a, **k))[1])
    found, killed = train(*options, out="killed")
    assert len(calls) == 7
    one, two = (vf.open_bank(path / "bank.safetensors").read() for path in (out, killed))
    assert all(torch.equal(one[key], two[key]) for key in one)
    for row, other in zip(found["adapters"], right["adapters"], strict=True):
        assert {**row, "data": 0} == {**other, "data": 0}


def test_the_best_is_kept_and_the_others_stop(train, data):
    """At a rate that is far too large each evaluation is worse than the one before."""
    options = ("--data", data / "text.jsonl", "--data", data / "other.jsonl", "--schedule", "constant")
    found, _ = train(*options, "--steps", "30", "--learning-rate", "0.1,20", "--eval-every", "2", "--patience", "2")
    good, bad = found["adapters"]
    assert bad["steps"] < good["steps"] <= 30
    last, _ = train(*options, "--steps", "30", "--learning-rate", "0.1,20", out="last")
    assert bad["loss"] < last["adapters"][1]["loss"]
    assert last["adapters"][1]["steps"] == 30


def test_generate_applies_the_chat_template(train, run, run_json, data, model):
    options = ("--steps", "40", "--learning-rate", "0.2", "--targets", "all-linear", "--schedule", "linear")
    found, out = train("--data", data / "chat.jsonl", *options)
    assert found["trained"] > 1000  # all linear layers
    asked = ("generate", "film plot", "--max-new-tokens", "3", "--dtype", "float32", "--adapter", out)
    (row,) = run_json(*asked)
    assert row["text"].split() == ["dull", "bore"]
    assert run_json(*asked, "--chat") == [row]
    assert run_json(*asked, "--no-chat") != [row]
    assert "film plot\ndull bore" in run(*asked)[1]


def test_hostile_data_is_refused_before_a_model_is_loaded(run, tmp_path, monkeypatch):
    def load_base(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(unlabelled, "load_base", load_base)
    monkeypatch.setattr("vera_func.cli.training.classifier.load_base", load_base)
    files = hostile(tmp_path)
    assert len(files) >= 120
    for name, (path, place, said) in files.items():
        status, out, err = run("train", "--data", path, "--out", tmp_path / "out")
        assert (status, out) == (2, ""), name
        assert err.startswith("vera-func: ")
        assert err.count("\n") == 1, err
        assert place in err, (name, err)
        assert said in err, (name, err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--data {data}/text.jsonl --data {data}/chat.jsonl", "must be of one kind"),
        ("--data {data}/text.jsonl --beta 0.1", "'text', but --beta and --reference require preferences"),
        (
            "--data {data}/text.jsonl --adapters 4",
            "--adapters requires a single data set with labels, got data without labels",
        ),
        ("--data {data}/text.jsonl --prompt {{text}}:", "--prompt has no effect on data without labels"),
        ("--data {data}/text.jsonl --steps 5 --epochs 2", "--steps or --epochs, not both"),
        ("--data {data}/text.jsonl --steps 5,6", "--steps got 2 values for 1 adapter: pass a single value"),
        ("--data {data}/text.jsonl --patience 2", "pass --eval-every as well"),
        ("--data {data}/text.jsonl --warmup 7 --steps 7", "less than the 7 steps"),
        ("--data {data}/text.jsonl --data {data}/gone.jsonl", "there is no file"),
        ("--data {data}/chat.jsonl --model {folder}", "row 1: the tokenizer has no chat template"),
        ("--data {data}/preference.jsonl --reference {data}", "adapter_config.json"),
        ("--data {data}/text.jsonl --device cuda:7", "there is no GPU cuda:7"),
        ("--data {data}/text.jsonl --device tpu", "auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("--data {data}/text.jsonl --dropout 1", "must be below 1"),
        ("--data {data}/text.jsonl --dropout 0.1 --checkpointing", "supports one adapter without dropout"),
        ("--data {data}/text.jsonl --beta 0", "must be positive"),
        ("--data {data}/text.jsonl --max-length 4096", "has 2048 positions: pass --max-length 2048 or less"),
        (
            "--data {data}/preference.jsonl --reference {first} --dropout 0.1",
            "--reference determines the target layers, dropout",
        ),
        ("--data {data}/preference.jsonl --reference {first} --model=", "first does not name its base model"),
        ("--data {data}/text.jsonl --out {data}/text.jsonl", "is a file"),
        ("--data {data}/text.jsonl --log {data}/text.jsonl", "is a file, but must be a folder or not exist"),
        ("--data {reviews} --beta 0.1", "--beta has no effect on data with labels: leave out --beta"),
        ("--data {reviews} --truncate-side end", "--truncate-side has no effect on data with labels: leave out"),
        (
            "--data {reviews} --data {reviews} --truncate-side start",
            "--truncate-side has no effect on data with labels",
        ),
        ("--data {reviews} --packing", "--packing has no effect on data with labels: leave out --packing."),
        ("--data {reviews} --no-packing", "--no-packing has no effect on data with labels: leave out --no-packing."),
        ("--data {reviews} --steps 4,5", "--steps got 2 values for 1 adapter: pass a single value"),
        ("--data {reviews} --data {data}/text.jsonl", "'label' must be a non-empty string, got None"),
        ("--data {data}/single.jsonl", "single.jsonl has one row"),
        ("--data {data}/short.jsonl", "short.jsonl: 1 rows in 1 groups can't be split"),
        ("--data {data}/film.csv", "film.csv: 30 examples in 1 groups can't be split"),
        ("--data {reviews} --data {data}/film.csv", "film.csv: 30 examples in 1 groups can't be split"),
        ("--data {reviews} --adapters 2 --clip 0.5", "a sweep, which does not support --clip: leave out"),
    ],
)
def test_mistakes_are_one_sentence(run, data, model, folder, reviews, tmp_path, line, said):
    first = tmp_path / "first"
    if "{first}" in line:
        adapted = vf.adapt(load_base(str(model), "none", torch.float32).model, vf.VeraConfig(r=4))
        config = dataclasses.replace(adapted.config, base_model_name_or_path=None)
        vf.save_adapter(first, adapted.params, adapted.frozen, config)
    line = line.format(data=data, folder=folder, reviews=reviews, first=first)
    given = {"--model": model, "--out": tmp_path / "out", "--r": 8, "--dtype": "float32"}
    options = [word for name, value in given.items() if name not in line for word in (name, value)]
    status, out, err = run("train", *line.split(), *options)
    last = err.strip().splitlines()[-1]
    assert (status, out) == (2, "")
    assert last.startswith("vera-func: ")
    assert said in last


def test_labels_take_the_options_of_a_trainer(run_json, run, folder, reviews, tmp_path):
    line = ("train", "--model", folder, "--data", reviews, "--r", "8", "--batch-size", "4", "--dtype", "float32")
    more = ("--epochs", "2", "--schedule", "linear", "--warmup", "0.1", "--weight-decay", "0.01", "--clip", "0.5")
    more += ("--dropout", "0.1", "--eval-every", "5", "--max-length", "64", "--targets", "all-linear")
    one, two = (run_json(*line, *more, "--learning-rate", "0.1", "--out", tmp_path / name) for name in "ab")
    assert one["after"] >= one["before"]
    assert one["trained"] > 1000
    assert read_metadata(tmp_path / "a").max_length == 64
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["vera_dropout"] == 0.1
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert one["after"] == two["after"]


def test_a_parquet_folder_of_labels(run_json, folder, reviews, tmp_path):
    import pyarrow.csv
    import pyarrow.parquet

    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(reviews), tmp_path / "data" / "reviews.parquet")
    line = ("--model", folder, "--r", "8", "--steps", "2", "--batch-size", "4", "--dtype", "float32")
    one = run_json("train", "--data", reviews, *line, "--out", tmp_path / "a")
    two = run_json("train", "--data", tmp_path / "data", *line, "--out", tmp_path / "b")
    assert one["held_out"] == two["held_out"] == 12
    (row,) = run_json("evaluate", "--adapter", tmp_path / "b", "--data", tmp_path / "data", "--dtype", "float32")
    assert row["texts"] == 60


def test_sets_of_labels_together_are_as_alone(run_json, folder, reviews, tmp_path):
    header, *lines = reviews.read_text().splitlines()
    options = ("--model", folder, "--r", "8", "--batch-size", "4", "--dtype", "float32", "--max-length", "30")
    sources, steps, rates = [tmp_path / "a.csv", tmp_path / "b.csv"], ["12", "6"], ["0.1", "0.05"]
    for source, some in zip(sources, (lines[:36], lines[36:]), strict=True):
        source.write_text("\n".join([header, *some]) + "\n")
    both = [word for source in sources for word in ("--data", source)]
    two = ("--steps", ",".join(steps), "--learning-rate", ",".join(rates), "--accumulate", "3")
    found = run_json("train", *both, *two, *options, "--out", tmp_path / "both")
    bank = vf.open_bank(tmp_path / "both" / "bank.safetensors")
    assert bank.names == ("a", "b")
    assert [(row["rows"], row["held_out"], row["steps"]) for row in found["adapters"]] == [(28, 8, 12), (19, 5, 6)]
    for i, name in enumerate("ab"):
        one = ("--data", sources[i], "--steps", steps[i], "--learning-rate", rates[i])
        alone = run_json("train", *one, *options, "--out", tmp_path / name)
        assert found["adapters"][i]["after"] == alone["after"]
        assert found["adapters"][i]["before"] == alone["before"]
        for key, value in params_of(tmp_path / name, folder).items():
            assert_close(bank.read([name])[key][0], value, rtol=1e-4, atol=1e-5)
    rows = run_json("predict", "--bank", bank.path, "--name", "b", "the film was joy", "--dtype", "float32")
    assert rows[0]["label"] in ("good", "bad")
    row, _ = run_json("evaluate", "--bank", bank.path, "--data", reviews, "--dtype", "float32")
    assert row["texts"] == 60


@pytest.mark.parametrize("kind", ["text", "preference", "label"])
def test_checkpointing_gives_the_same_adapter(run_json, data, model, reviews, tmp_path, kind):
    source = reviews if kind == "label" else data / f"{kind}.jsonl"
    options = ("--data", source, "--steps", "6", "--learning-rate", "0.1", "--accumulate", "2", "--batch-size", "4")
    for more, out in (((), "plain"), (("--checkpointing",), "again")):
        run_json("train", *options, *more, "--model", model, "--dtype", "float32", "--r", "8", "--out", tmp_path / out)
    plain, again = (params_of(tmp_path / out, model) for out in ("plain", "again"))
    assert_close(plain, again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "line",
    [
        "demo --data {reviews}",
        "train --data {reviews} --out x",
        "train --data {reviews} --data {reviews} --out x",
        "train --data {data}/text.jsonl --out x",
        "evaluate --data {data}/text.jsonl",
        "evaluate --data {reviews}",
        "predict a",
        "generate a",
        "merge --adapter {first} --to nf4 --out x",
        "export-lora --adapter {first} --out x",
        "inspect {first} --model y",
        "convert {first} --out {first}/x.safetensors",
    ],
)
def test_the_device_of_every_command(run, data, reviews, tmp_path, monkeypatch, line):
    def load_base(*args, device, **kwargs):
        raise ValueError(f"on {device}")

    for module in ("cli.training.classifier", "cli.training.unlabelled", "cli.training.label_sets", "data.sources"):
        monkeypatch.setattr(f"vera_func.{module}.load_base", load_base)
    adapted = vf.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), vf.VeraConfig(r=2, target_modules=["0"]))
    config = dataclasses.replace(adapted.config, base_model_name_or_path="somewhere")
    vf.save_adapter(tmp_path / "first", adapted.params, adapted.frozen, config)
    words = line.format(data=data, reviews=reviews, first=tmp_path / "first").split()
    assert run(*words) == (2, "", "vera-func: on auto\n")
    assert run(*words, "--device", "cuda:1") == (2, "", "vera-func: on cuda:1\n")


@pytest.mark.slow
def test_under_torchrun_the_adapters_are_the_same(train, data, model, tmp_path):
    """With a chunk for each adapter they are sharded across the ranks; in one chunk their micro-batches are."""
    options = [*("--data", data / "text.jsonl", "--data", data / "other.jsonl"), "--steps", "6", "--eval-every", "4"]
    _, out = train(*options, "--learning-rate", "0.1", "--accumulate", "4")
    right = vf.open_bank(out / "bank.safetensors").read()
    for together in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        line = ["--learning-rate", "0.1", "--together", together, "--model", model, "--rank", "8", "--batch-size", "4"]
        words = [
            *command,
            "-m",
            "vera_func",
            "train",
            *options,
            *line,
            "--dtype",
            "float32",
            "--out",
            tmp_path / together,
        ]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("kind: text") == 1  # rank 0 alone says so
        assert_close(vf.open_bank(tmp_path / together / "bank.safetensors").read(), right, rtol=1e-4, atol=1e-5)
        assert not list(tmp_path.glob(f"{together}.training*"))
