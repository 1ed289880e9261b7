"""Commands on a tiny model with a tiny tokenizer: evaluate, predict, generate, merge, export, convert, and mistakes."""

import csv
import io
import json
import random
import shutil

import pytest
import torch
from torch.testing import assert_close

import vera_func as vf
from vera_func.data.assets import SMOLLM2_NAME
from vera_func.data.examples import read_examples
from vera_func.data.metadata import Metadata, read_metadata, write_metadata
from vera_func.data.models import load_base
from vera_func.data.task import encode_examples, make_task, score_of

from helpers import llama


# evaluate


def same(row, other):
    return row["name"] == other["name"] and row["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_evaluate_a_bank(run, run_json, trained, reviews, tmp_path):
    bank = trained / "bank.safetensors"
    rows = run_json("evaluate", "--bank", bank, "--data", reviews)
    assert [row["name"] for row in rows] == list(vf.open_bank(bank).names)
    assert all(row["texts"] == 60 and 0 <= row["accuracy"] <= 1 and row["loss"] > 0 for row in rows)
    # In other chunks and batches, or one alone, they are the same.
    again = run_json("evaluate", "--bank", bank, "--data", reviews, "--chunk", "3", "--batch-size", "7")
    for row, other in zip(rows, again, strict=True):
        assert same(row, other)
    (one,) = run_json("evaluate", "--bank", bank, "--data", reviews, "--name", rows[2]["name"])
    assert same(one, rows[2])
    (best,) = run_json("evaluate", "--adapter", trained, "--data", reviews)
    assert any(best["loss"] == pytest.approx(row["loss"], rel=1e-4) for row in rows)

    table = tmp_path / "table.csv"
    status, said, err = run("evaluate", "--bank", bank, "--data", reviews, "--out", table, "--limit", "10")
    assert (status, said) == (0, f"4 rows written to {table}\n")
    assert "adapters 1-4 of 4" in err
    with table.open() as file:
        read = list(csv.DictReader(file))
    assert [row["name"] for row in read] == [row["name"] for row in rows]
    assert {row["texts"] for row in read} == {"10"}
    status, said, _ = run("evaluate", "--bank", bank, "--data", reviews, "--out", tmp_path / "table.json")
    assert [row["name"] for row in json.loads((tmp_path / "table.json").read_text())] == [row["name"] for row in rows]
    status, said, _ = run("evaluate", "--bank", bank, "--data", reviews)
    assert said.splitlines()[0].split() == ["name", "accuracy", "loss", "texts"]


# predict


def test_predictions_are_what_evaluate_counts(run_json, trained, reviews, tmp_path):
    header, *lines = reviews.read_text().splitlines()
    random.Random(0).shuffle(lines)  # predictions come in the order of the file, whatever that of the batches is
    reviews = tmp_path / "shuffled.csv"
    reviews.write_text("\n".join([header, *lines]) + "\n")
    bank, examples = trained / "bank.safetensors", read_examples(reviews)
    rows = run_json("predict", "--bank", bank, "--data", reviews, "--batch-size", "7", "--chunk", "3")
    names = vf.open_bank(bank).names
    assert [(row["adapter"], row["text"]) for row in rows] == [(n, e.text) for n in names for e in examples]
    for score in run_json("evaluate", "--bank", bank, "--data", reviews):
        own = [row for row in rows if row["adapter"] == score["name"]]
        right = [row["label"] == example.label for row, example in zip(own, examples, strict=True)]
        assert sum(right) / len(right) == pytest.approx(score["accuracy"])
        # Of two labels the likelier one, so that the loss can be told from it.
        p = torch.tensor([row["probability"] for row in own], dtype=torch.float64)
        assert p.min() >= 0.5
        loss = -torch.where(torch.tensor(right), p, 1 - p).log().mean()
        assert loss.item() == pytest.approx(score["loss"], rel=1e-4)


def test_predict_takes_texts_from_everywhere(run, run_json, trained, folder, tmp_path, monkeypatch):
    texts = ["the film was joy", "the plot was dull and the end was dull"]
    rows = run_json("predict", "--adapter", trained, *texts)
    assert [row["text"] for row in rows] == texts
    assert {row["adapter"] for row in rows} == {"sweep"}
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": 7}) + "\n" for text in texts))
    assert run_json("predict", "--adapter", trained, "--data", file) == rows
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([texts[0], "", texts[1], ""])))
    assert run_json("predict", "--adapter", trained) == rows
    status, said, _ = run("predict", "--adapter", trained, *texts, "--out", tmp_path / "labels.csv")
    assert (status, said) == (0, f"2 rows written to {tmp_path / 'labels.csv'}\n")
    with (tmp_path / "labels.csv").open() as lines:
        assert [(row["text"], row["label"]) for row in csv.DictReader(lines)] == [(r["text"], r["label"]) for r in rows]
    # A base that nothing is known of can choose from labels that are given.
    (row, _) = run_json("predict", "--model", folder, *texts, "--labels", "good,bad")
    assert (row["adapter"], row["label"] in ("good", "bad")) == ("base", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "TRAINED", "a text", "--data", "new.csv"], "texts or --data, not both"),
        (["--model", "FOLDER", "a text"], "has no labels in its metadata: pass --labels a,b"),
        (["--model", "FOLDER", "a text", "--labels", "good"], "pass --labels a,b"),
        (
            ["--adapter", "TRAINED", "a text", "--labels", "x,y"],
            "--labels has no effect on an adapter that was trained on the labels ['bad', 'good']: leave out --labels.",
        ),
        (["--adapter", "TRAINED", " "], "text 1 of 1 is empty"),
        (["--adapter", "TRAINED", "a", "--out", "labels.txt"], "must be .csv or .json"),
    ],
)
def test_predictions_that_cannot_be_made(run, trained, folder, words, message):
    words = [{"TRAINED": trained, "FOLDER": folder}.get(word, word) for word in words]
    status, said, err = run("predict", *words)
    assert (status, said) == (2, "")
    assert message in err


def test_evaluate_the_base_alone(run_json, folder, reviews):
    (row,) = run_json("evaluate", "--model", folder, "--data", reviews, "--dtype", "float32")
    base = load_base(str(folder), "nf4", torch.float32)
    task = make_task(base, ["bad", "good"])
    adapted = vf.adapt(base.model, vf.VeraConfig(r=2))
    score = score_of(adapted, task, adapted.params, encode_examples(base, task, read_examples(reviews)))
    assert row["name"] == "base"
    assert row["loss"] == pytest.approx(score.loss.item(), rel=1e-5)


def test_an_adapter_of_the_model_from_pypi_finds_it_again(run, run_json, folder, reviews, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "vera_func.data.models.load_smollm2", lambda dtype, _: load_base(str(folder), "none", dtype)[:2]
    )
    line = f"demo --data {reviews} --r 8 --steps 2 --batch-size 4 --adapters 2 --dtype float32"
    run_json(*line.split(), "--out", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    bank = tmp_path / "bank.safetensors"
    assert config["base_model_name_or_path"] == vf.open_bank(bank).config.base_model_name_or_path == SMOLLM2_NAME
    sources = [["--adapter", tmp_path], ["--bank", bank]]
    for source in sources:
        assert run_json("predict", *source, "a text", "--dtype", "float32")
        assert run_json("evaluate", *source, "--data", reviews, "--dtype", "float32")
    assert run_json("export-lora", *sources[0], "--out", tmp_path / "lora")
    assert (
        json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == SMOLLM2_NAME
    )
    assert run_json("inspect", tmp_path)["model"] == SMOLLM2_NAME


def test_the_note_says_what_the_adapter_was_trained_over(run_json, folder, reviews, tmp_path):
    line = f"train --model {folder} --data {reviews} --quant int8 --r 8 --steps 2 --batch-size 4 --dtype float32"
    result = run_json(*line.split(), "--prompt", "the {text}:", "--out", tmp_path / "a")
    assert read_metadata(tmp_path / "a") == Metadata("int8", ["bad", "good"], "the {text}:")
    asked = ("evaluate", "--adapter", tmp_path / "a", "--data", reviews, "--dtype", "float32")
    (noted,) = run_json(*asked)
    (said,) = run_json(*asked, "--quant", "int8", "--prompt", "the {text}:", "--model", folder)
    assert noted == said
    assert result["trained"] == 2 * (64 + 8 + 32 + 8)
    for change in (("--quant", "nf4"), ("--prompt", "a {text}:")):
        (other,) = run_json(*asked, *change)
        assert other["loss"] != pytest.approx(noted["loss"], rel=1e-4)


# generate


def test_generate(run, run_json, trained, folder, monkeypatch, tmp_path):
    opened = vf.open_bank(trained / "bank.safetensors")
    names, generator = opened.names, torch.Generator().manual_seed(0)
    # Barely trained ones all say the same.
    loud = {key: torch.randn(leaf.shape, generator=generator) for key, leaf in opened.read().items()}
    bank = vf.save_bank(tmp_path / "loud.safetensors", loud, opened.frozen(), opened.config, names)
    prompts = ["the film was", "a great plot and the end", "joy"]
    options = ("--max-new-tokens", "5", "--dtype", "float32")
    mixed = run_json(
        "generate", *prompts, "--bank", bank, *(word for name in names[:3] for word in ("--name", name)), *options
    )
    assert [row["adapter"] for row in mixed] == list(names[:3])
    for prompt, name, row in zip(prompts, names, mixed, strict=False):
        (alone,) = run_json("generate", prompt, "--bank", bank, "--name", name, *options)
        assert alone == row
        assert alone["prompt"] == prompt
        (other,) = run_json("generate", prompt, "--bank", bank, "--name", names[3], *options)
        assert other["text"] != alone["text"]
    chunks = run_json("generate", *prompts, "--adapter", trained, "--batch-size", "2", *options)
    assert [row["adapter"] for row in chunks] == ["sweep"] * 3
    drawn = [
        run_json("generate", *prompts, "--model", folder, "--temperature", "5", "--seed", seed, *options)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0]["adapter"] == "base"

    monkeypatch.setattr("sys.stdin", ["the film was\n", "\n", r"joy\njoy" + "\n"])
    status, said, _ = run("generate", "--adapter", trained, *options)
    assert status == 0
    assert said.startswith("[sweep] the film was")
    assert "[sweep] joy\njoy" in said


# merge, export-lora


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def strong(trained, tmp_path_factory):
    """A trained adapter with large vectors, so that every format keeps something of it."""
    base = load_base(vf.open_bank(trained / "bank.safetensors").config.base_model_name_or_path, "nf4", torch.float32)
    adapted = vf.load_adapter(trained, base.model)
    path = tmp_path_factory.mktemp("strong") / "strong"
    params = {k: torch.full_like(v, 0.3) if k.endswith("lambda_b") else v for k, v in adapted.params.items()}
    vf.save_adapter(path, params, adapted.frozen, adapted.config)
    write_metadata(path, read_metadata(trained))
    return path, base, vf.load_adapter(path, base.model)


@pytest.mark.parametrize("to", ["nf4", "int8", "float32", "bfloat16"])
def test_merge(run_json, strong, tmp_path, to):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, _, adapted = strong
    done = run_json("merge", "--adapter", path, "--to", to, "--out", tmp_path / to, "--dtype", "float32")
    assert done["to"] == to
    assert done["quant"] == "nf4"
    assert len(done["modules"]) == 4
    assert "erg" in done["advice"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / to).eval()
    ids = torch.arange(4, 18).reshape(2, 7)
    expected = adapted.apply(adapted.params, adapted.frozen, input_ids=ids).logits.detach()
    base = adapted.apply({k: 0 * v for k, v in adapted.params.items()}, adapted.frozen, input_ids=ids).logits.detach()
    error = (logits(merged, ids).float() - expected).norm() / (expected - base).norm()
    assert error < {"nf4": 0.6, "int8": 0.2, "float32": 1e-4, "bfloat16": 0.1}[to]
    assert AutoTokenizer.from_pretrained(tmp_path / to)("joy").input_ids


def test_a_calibrated_merge(run, run_json, strong, reviews, tmp_path):
    path, _, _ = strong
    line = ("merge", "--adapter", path, "--to", "nf4", "--dtype", "float32", "--calibrate", "--data", reviews)
    done = run_json(*line, "--out", tmp_path / "m")
    assert done["calibrated_on"] == 45
    assert done["answers"]["texts"] == 15
    assert done["answers"]["error"] < 0.5  # rounded, it is several times that
    assert "15 held-out examples" in done["advice"]
    options = ("--data", reviews, "--dtype", "float32")
    (merged,) = run_json("evaluate", "--model", tmp_path / "m", *options)
    (unmerged,) = run_json("evaluate", "--adapter", path, *options)
    assert merged["loss"] == pytest.approx(unmerged["loss"], rel=0.1)
    status, said, _ = run(*line, "--out", tmp_path / "n")
    assert status == 0
    assert said.startswith("On 15 held-out examples")


def test_a_merged_model_is_a_model(run, run_json, strong, reviews, tmp_path):
    """One in 4 bits, too: evaluated as it is, without being quantized again."""
    path, _, _ = strong
    status, said, _ = run("merge", "--adapter", path, "--to", "nf4", "--out", tmp_path / "m", "--dtype", "float32")
    assert status == 0
    assert said.splitlines()[0].split() == ["modules", "count", "kept", "kept_least", "error", "size"]
    options = ("--data", reviews, "--dtype", "float32")
    (merged,) = run_json("evaluate", "--model", tmp_path / "m", *options)
    (unmerged,) = run_json("evaluate", "--adapter", path, *options)
    assert merged["loss"] == pytest.approx(unmerged["loss"], rel=0.2)
    assert read_metadata(tmp_path / "m") == read_metadata(path)._replace(quant=None)
    found = run_json("inspect", tmp_path / "m")
    assert found["quantization"] == "nf4"
    status, _, err = run("evaluate", "--model", tmp_path / "m", *options, "--quant", "int8")
    assert status == 2
    assert "already quantized to nf4" in err


def test_a_merged_model_is_asked_as_its_adapter_was(run, run_json, strong, reviews, tmp_path):
    """With its prompt, and in the format it was merged to: 16 bits are not quantized again."""
    path, _, _ = strong
    adapter = shutil.copytree(path, tmp_path / "adapter")
    write_metadata(adapter, read_metadata(path)._replace(prompt="Text: {text}\nAnswer:"))
    for form in ("float32", "nf4"):
        status, *_ = run("merge", "--adapter", adapter, "--to", form, "--out", tmp_path / form, "--dtype", "float32")
        assert status == 0
    options = ("--data", reviews, "--dtype", "float32")
    (unmerged,) = run_json("evaluate", "--adapter", adapter, *options)
    (exact,) = run_json("evaluate", "--model", tmp_path / "float32", *options)
    assert exact["loss"] == pytest.approx(unmerged["loss"], rel=1e-4)
    assert read_metadata(tmp_path / "nf4") == read_metadata(adapter)._replace(quant=None)


@pytest.mark.parametrize("rank", [None, 4])
def test_export_lora(run_json, strong, folder, tmp_path, rank):
    from peft import PeftModel

    path, _, _ = strong
    words = ("export-lora", "--adapter", path, "--out", tmp_path / "lora", *(["--rank", rank] if rank else []))
    done = run_json(*words)
    assert (done["rank"], done["modules"]) == (rank or 16, 4)
    assert (done["largest_error"] == 0) == (rank is None)
    assert (done["advice"] is None) == (rank is None)
    assert done["servers"] is None  # vLLM's default is rank 16
    dense = load_base(str(folder), "none", torch.float32).model
    adapted = vf.load_adapter(path, dense)
    ids = torch.arange(4, 18).reshape(2, 7)
    expected = adapted.apply(adapted.params, adapted.frozen, input_ids=ids).logits.detach()
    got = logits(PeftModel.from_pretrained(dense, tmp_path / "lora"), ids)
    if rank is None:
        assert_close(got, expected, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.allclose(got, expected, rtol=1e-3)


def test_export_for_llama_cpp(run_json, strong, tmp_path):
    import gguf

    done = run_json("export-lora", "--adapter", strong[0], "--out", tmp_path / "x.gguf", "--format", "gguf")
    assert (done["out"], done["rank"], done["servers"]) == (str(tmp_path / "x.gguf"), 16, None)
    assert done["bytes"] == (tmp_path / "x.gguf").stat().st_size
    assert len(gguf.GGUFReader(tmp_path / "x.gguf").tensors) == 2 * done["modules"]


def test_export_says_what_servers_refuse(run_json, strong, folder, tmp_path):
    adapted = vf.adapt(load_base(str(folder), "nf4", torch.float32).model, vf.VeraConfig(r=17, task_type="CAUSAL_LM"))
    vf.save_adapter(tmp_path / "wide", *adapted[1:])
    done = run_json("export-lora", "--adapter", tmp_path / "wide", "--model", folder, "--out", tmp_path / "lora")
    assert "vLLM: rank 17 is above its default maximum of 16 (start it with --max-lora-rank 32)." in done["servers"]


# convert


def test_convert_both_ways(run_json, trained, tmp_path):
    bank = trained / "bank.safetensors"
    done = run_json("convert", bank, "--out", tmp_path / "all")
    assert done["names"] == list(vf.open_bank(bank).names)
    assert len(done["paths"]) == 4
    back = run_json("convert", *reversed(done["paths"]), "--out", tmp_path / "back.safetensors")
    assert back["names"] == done["names"][::-1]
    before, after = vf.open_bank(bank).read(done["names"]), vf.open_bank(back["out"]).read(done["names"])
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert read_metadata(back["out"]) == read_metadata(bank)
    one = run_json("convert", bank, "--name", done["names"][2], "--out", tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == one["names"] == [done["names"][2]]


# What goes wrong


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """An adapter of a model that is wider."""
    path = tmp_path_factory.mktemp("other") / "other"
    adapted = vf.adapt(llama(hidden_size=128), vf.VeraConfig(r=16))
    vf.save_adapter(path, *adapted[1:])
    return path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("evaluate --bank {trained}/gone.safetensors", "no bank"),
        ("evaluate --bank {trained}", "pass a PEFT directory with --adapter"),
        ("evaluate --adapter {bank}", "pass a bank with --bank"),
        ("evaluate --bank {bank} --adapter {trained}", "not both"),
        ("evaluate --adapter {trained} --name x", "pass --bank as well"),
        ("evaluate --bank {bank} --name x", "no adapter 'x'. Its 4 adapters are"),
        ("evaluate --bank {bank} --data {tmp}/gone.csv", "gone.csv"),
        ("evaluate --bank {bank} --data {reviews} --out table.txt", ".csv or .json"),
        ("evaluate --bank {bank} --data {reviews} --out {tmp}/no/table.csv", "no folder"),
        ("evaluate --bank {bank} --data {odd}", "label 'ugly'"),
        ("evaluate --bank {bank} --data {reviews} --prompt Review", "contain {{text}} exactly once"),
        ("evaluate --adapter {folder}", "contains a model, not an adapter"),
        ("evaluate --adapter {tmp}/gone", "no adapter directory"),
        ("evaluate --adapter {other} --data {reviews}", "does not name its base model"),
        ("evaluate --adapter {other} --model {folder} --data {reviews}", "needs the shape"),
        ("evaluate --adapter {trained} --model {trained} --data {reviews}", "an adapter, not a model"),
        ("evaluate --adapter {trained} --model {tmp} --data {reviews}", "no config.json"),
        ("evaluate --adapter {trained} --model {tmp}/gone --data {reviews}", "no folder"),
        ("generate --adapter {trained} --model {folder} a ' '", "prompt 2 of 3 is empty"),
        ("generate a b --bank {bank}", "got 4 adapters for 2 prompts, expected one adapter, or one adapter per prompt"),
        ("merge --bank {bank} --to nf4 --out {tmp}/m", "choose one with --name (lr0.005-d0.1"),
        ("merge --model {folder} --to nf4 --out {tmp}/m", "an adapter is required"),
        ("merge --adapter {trained} --to nf4 --data {reviews} --out {tmp}/m", "require --calibrate"),
        ("merge --adapter {trained} --to int8 --calibrate --data {reviews} --out {tmp}/m", "pass --to nf4"),
        ("merge --adapter {trained} --to nf4 --out {folder}", "choose another folder"),
        ("merge --adapter {trained} --to nf4 --out {trained}", "choose another folder"),
        ("export-lora --adapter {trained} --out {trained}", "another folder"),
        ("export-lora --adapter {trained} --out {tmp}/l --rank 17", "rank must be an integer from 1 to 16"),
        ("inspect {tmp}/gone", "does not exist"),
        ("inspect {tmp}", "adapter_config.json"),
        ("inspect {reviews}", "not a complete safetensors file"),
        ("inspect {trained}/adapter_model.safetensors", "not an adapter bank"),
        ("inspect {trained} --to nf4", "pass --model as well"),
        ("inspect {trained} --name x", "a folder"),
        ("inspect {folder} --targets nope", "target_modules"),
        ("convert {bank} {bank} --out {tmp}/x", "got 2 sources, of which"),
        ("convert {bank} --out {reviews}", "is a file"),
        ("convert {bank} --name x --out {tmp}/x", "no adapter 'x'"),
        ("convert {tmp}/gone.safetensors --out {tmp}/x", "does not exist"),
        ("convert {trained} --out {tmp}/x", "does not end in .safetensors"),
        ("convert {trained} --out {bank}", "already exists: remove"),
        ("convert {trained} --name x --out {tmp}/x.safetensors", "selects adapters of a bank"),
        ("convert {trained} {trained} --out {tmp}/x.safetensors", "named ['sweep', 'sweep'], but"),
        ("convert {trained} {other} --out {tmp}/x.safetensors", "needs the shape"),
        ("train --model {folder} --data {reviews} --out {reviews}", "is a file"),
        ("train --model {folder} --data {reviews} --out {tmp}/x --prompt Review", "once"),
        ("train --model {folder} --data {reviews} --out {tmp}/x --targets nope", "nope"),
        (
            "train --model {folder} --data {reviews} --out {tmp}/x --batch-size 99",
            "48 training examples do not fill a batch of 99 (12 more are held out)",
        ),
    ],
)
def test_mistakes_are_one_sentence(run, trained, folder, reviews, other, tmp_path, line, said):
    odd = tmp_path / "odd.csv"
    odd.write_text("text,label\na,good\nb,ugly\n")
    places = {"trained": trained, "bank": trained / "bank.safetensors", "folder": folder, "reviews": reviews}
    words = [word.strip("'") or " " for word in line.format(**places, other=other, tmp=tmp_path, odd=odd).split(" ")]
    words = [word for word in words if word != "'"]
    status, out, err = run(*words)
    last = err.strip().splitlines()[-1]
    assert (status, out) == (2, "")
    assert last.startswith("vera-func: ")
    assert said.format() in last
    assert "Traceback" not in err
