"""DVoRA from the command line: training, inference with norms computed once, merging, export, and inspection."""

import json

import pytest
import torch
from torch.testing import assert_close

import vera_func as vf
from vera_func.cli import main as cli
from vera_func.core import adapter as core
from vera_func.data.examples import Example
from vera_func.data.models import load_base
from vera_func.data.prompts import collate
from vera_func.data.task import encode_examples, logits_of as label_logits, make_task


OPTIONS = ("--dtype", "float32")
WORDS = ("the film was joy", "the plot was dull", "the film was joy and a", "a")


@pytest.fixture(scope="module")
def dvora(folder, reviews, tmp_path_factory):
    """A DVoRA adapter, trained by `train --dora`."""
    out = tmp_path_factory.mktemp("out") / "dvora"
    line = f"train --data {reviews} --model {folder} --dora --r 8 --steps 8 --batch-size 4 --learning-rate 0.1 --json"
    assert cli.main([*line.split(), *OPTIONS, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def adapted(dvora, folder):
    return vf.load_adapter(dvora, load_base(str(folder), "nf4", torch.float32).model)


@pytest.fixture
def folded(monkeypatch):
    """No norm is computed inside a call of the model."""
    refuse = lambda *args, **kwargs: pytest.fail("a norm is computed in each call")
    monkeypatch.setattr(core, "fold_layer", refuse)


def logits_of(adapted, ids):
    with torch.no_grad():
        return adapted.apply(adapted.params, adapted.frozen, input_ids=ids).logits


def test_train(dvora, adapted):
    config = json.loads((dvora / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"]) == ("DVERA", True)
    layers = [key for key in adapted.params if key.endswith("magnitude")]
    assert len(layers) == 4
    fresh = vf.adapt(adapted.apply.model, adapted.config).params
    assert all(not torch.equal(adapted.params[key], fresh[key]) for key in layers)


@pytest.mark.parametrize("more", [(), ("--adapters", "2"), ("--data", "again.csv")])
def test_no_step_computes_norm_statistics(folder, reviews, run_json, tmp_path, monkeypatch, more):
    """Neither for one adapter, nor in a sweep, nor for several data sets: and these have no norms of single rows."""
    (tmp_path / "again.csv").write_text(reviews.read_text())
    more = [str(tmp_path / word) if word.endswith("csv") else word for word in more]
    monkeypatch.setattr(core, "norm_statistics", lambda *_: pytest.fail("statistics are computed in each call"))
    rows, fold = [], core.fold_layer
    monkeypatch.setattr(core, "fold_layer", lambda p, *a, **o: rows.append(p["lambda_b"].dim()) or fold(p, *a, **o))
    options = ("--model", folder, "--dora", "--r", "4", "--steps", "2", "--batch-size", "4", *OPTIONS)
    found = run_json("train", "--data", reviews, *more, *options, "--out", tmp_path / "out")
    assert found["trained"] == 2 * (64 + 4 + 64 + 32 + 4 + 32)
    assert not any(dims > 1 for dims in rows)


@pytest.mark.parametrize("kind", ["text", "preference"])
def test_other_kinds_of_data(folder, run_json, tmp_path, kind):
    row = {"text": "the film was joy"} if kind == "text" else {"prompt": "the film", "chosen": "joy", "rejected": "a"}
    rows = [{key: f"{value} {'a ' * (i % 3)}" for key, value in row.items()} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--model", folder, "--dora", "--r", "4", "--steps", "3", "--batch-size", "4", *OPTIONS)
    found = run_json("train", "--data", tmp_path / "data.jsonl", *options, "--out", tmp_path / "out")
    assert found["loss"] < found["loss_before"]
    (row,) = run_json("evaluate", "--adapter", tmp_path / "out", "--data", tmp_path / "data.jsonl", *OPTIONS)
    assert row["rows"] == 20


def test_inference_has_norms_computed_once(run_json, dvora, adapted, reviews, folder, folded):
    ids = torch.arange(4, 18).reshape(2, 7)
    with torch.no_grad(), pytest.raises(pytest.fail.Exception):  # what is measured is there
        adapted.apply(adapted.params, adapted.frozen, input_ids=ids)
    (row,) = run_json("evaluate", "--adapter", dvora, "--data", reviews, "--batch-size", "8", *OPTIONS)
    (base,) = run_json("evaluate", "--model", folder, "--data", reviews, *OPTIONS)
    assert row["loss"] < base["loss"]
    assert len(run_json("predict", "--adapter", dvora, "--batch-size", "2", *WORDS, *OPTIONS)) == 4
    (row,) = run_json("generate", "--adapter", dvora, WORDS[0], "--max-new-tokens", "3", *OPTIONS)
    assert row["prompt"] == WORDS[0]


def test_predictions_are_those_of_the_unfolded_adapter(run_json, dvora, adapted, folder):
    """And a bank's are those of its adapters."""
    base = load_base(str(folder), "nf4", torch.float32)
    task = make_task(base, ["bad", "good"])
    batch = collate(encode_examples(base, task, [Example(text, "bad", text) for text in WORDS]), task.pad_id)
    expected = label_logits(adapted, task)(adapted.params, batch).softmax(-1).max(-1)
    rows = run_json("predict", "--adapter", dvora, *WORDS, *OPTIONS)
    assert [row["label"] for row in rows] == [task.labels[i] for i in expected.indices]
    assert_close(torch.tensor([row["probability"] for row in rows]), expected.values, rtol=1e-4, atol=1e-5)


def test_convert_both_ways(run_json, dvora, adapted, tmp_path):
    bank = tmp_path / "bank.safetensors"
    run_json("convert", dvora, "--out", bank)
    one, other = (run_json("predict", *words, *WORDS, *OPTIONS) for words in (("--adapter", dvora), ("--bank", bank)))
    assert [row["label"] for row in one] == [row["label"] for row in other]
    found, expected = (torch.tensor([row["probability"] for row in rows]) for rows in (other, one))
    assert_close(found, expected, rtol=1e-6, atol=0)
    run_json("convert", bank, "--out", tmp_path / "back")
    back = vf.load_adapter(tmp_path / "back" / "dvora", adapted.apply.model)
    assert_close(back.params, adapted.params, rtol=0, atol=0)


@pytest.mark.parametrize(("to", "most"), [("float32", 1e-4), ("bfloat16", 0.2), ("nf4", 0.8)])
def test_merge(run_json, dvora, adapted, tmp_path, to, most):
    from transformers import AutoModelForCausalLM

    done = run_json("merge", "--adapter", dvora, "--to", to, "--out", tmp_path / to, *OPTIONS)
    assert len(done["modules"]) == 4
    ids = torch.arange(4, 18).reshape(2, 7)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / to).eval()(input_ids=ids).logits.float()
    expected = logits_of(adapted, ids)
    fresh = vf.adapt(adapted.apply.model, adapted.config)
    assert (merged - expected).norm() < most * (expected - logits_of(fresh, ids)).norm()


def test_export_lora(run_json, dvora, folder, tmp_path):
    from peft import PeftModel

    done = run_json("export-lora", "--adapter", dvora, "--out", tmp_path / "lora")
    assert done["largest_error"] == 0
    assert "DoRA" in done["servers"]
    dense = load_base(str(folder), "none", torch.float32).model
    expected = logits_of(vf.load_adapter(dvora, dense), ids := torch.arange(4, 18).reshape(2, 7))
    with torch.no_grad():
        got = PeftModel.from_pretrained(dense, tmp_path / "lora")(input_ids=ids).logits
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_inspect(run, run_json, dvora, adapted):
    found = run_json("inspect", dvora)
    assert found["method"] == "DVoRA"
    assert found["trained"] == sum(value.numel() for value in adapted.params.values())
    rows = {row["modules"]: row for row in found["modules"]}
    norms = [value.norm() for key, value in adapted.params.items() if key.endswith("q_proj.magnitude")]
    assert rows["q_proj"]["magnitude_norm"] == pytest.approx(sum(norms).item() / 2)
    assert rows.keys() == {"q_proj", "v_proj"}
    status, said, _ = run("inspect", dvora)
    assert status == 0
    assert "method: DVoRA" in said


def test_a_reference_decides_itself(run, dvora, folder, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "joy", "rejected": "dull"}\n' * 9)
    words = ("train", "--data", tmp_path / "pairs.jsonl", "--reference", dvora, "--dora", "--out", tmp_path / "out")
    status, _, said = run(*words, "--model", folder)
    assert status == 2
    assert "leave out --targets, --dropout and --dora" in said


def test_checkpointing_gives_the_same_adapter(run_json, folder, reviews, tmp_path, adapted):
    options = (
        "--data",
        reviews,
        "--model",
        folder,
        "--dora",
        "--r",
        "4",
        "--steps",
        "3",
        "--batch-size",
        "4",
        *OPTIONS,
    )
    for more, out in (((), "plain"), (("--checkpointing",), "again")):
        run_json("train", *options, *more, "--out", tmp_path / out)
    plain, again = (vf.load_adapter(tmp_path / out, adapted.apply.model).params for out in ("plain", "again"))
    assert_close(plain, again, rtol=1e-4, atol=1e-5)
