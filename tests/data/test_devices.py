"""Where the model is: names of devices, and batches that follow the model.

Devices that are mixed are found on the meta device, which every machine has, in forward passes without values, and on a
GPU, where there is one. Fake CUDA tensors do not serve: their batches are read (lengths, data pointers).
"""

import json

import pytest
import torch
import transformers

import vera_func as vf
from vera_func.cli import main as cli
from vera_func.data.batches import Item, Part, collate_items
from vera_func.data.models import Base, find_device, load_base, native_dtype
from vera_func.data.objective import loss_of_rows, sequence_losses
from vera_func.data.prompts import Encoded, collate
from vera_func.data.task import Task, loss_of
from vera_func.data.tokens import TokenRows

from helpers import llama


def test_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="there is no GPU cuda: torch finds none; pass --device cpu"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)  # of rank 2 under torchrun
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 2)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="there is no GPU cuda:4: torch finds 4 GPUs"):
        find_device("cuda:4")
    for name in ("", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0"):
        with pytest.raises(ValueError, match="the device must be auto, cpu, cuda or cuda:N"):
            find_device(name)
    assert native_dtype(torch.device("cuda", 1)) == torch.bfloat16


def test_a_base_that_cannot_be_there_is_not_loaded(folder, monkeypatch):
    monkeypatch.setattr("vera_func.data.models._load", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no GPU"):
        load_base(str(folder), device="cuda")


def packed_rows():
    ids = torch.arange(3, 27).int()
    rows = TokenRows(ids, ids.clone(), torch.tensor([0, 5, 14, 17, 24]), 1, torch.arange(4))
    return rows.pack(torch.arange(4), 14)


@pytest.fixture
def elsewhere():
    """An adapted model on another device, and the name of the device."""
    if transformers.__version__.startswith("5.0."):
        pytest.skip("transformers 5.0 calls autocast, which knows no meta device")
    return vf.adapt(llama(attention="eager").to("meta"), vf.VeraConfig(r=8)), "meta"


def test_language_batches_follow_the_model(elsewhere):
    adapted, device = elsewhere
    assert {leaf.device.type for leaf in adapted.params.values()} == {device}
    rows = packed_rows()
    part = Part(rows, torch.arange(len(rows.packed)))
    batch = collate_items([part], [Item(0, i) for i in range(len(rows.packed))], device=device)
    assert "attention_mask" in batch
    with torch.no_grad():
        assert sequence_losses(adapted, adapted.params, batch, stacked=False).device.type == device
        assert loss_of_rows(adapted)(adapted.params, batch).device.type == device


def test_label_batches_follow_the_model(elsewhere):
    adapted, device = elsewhere
    accepts = frozenset(("input_ids", "attention_mask", "position_ids", "logits_to_keep"))
    task = Task(["a", "b"], "{text}:", torch.tensor([5, 6]), 0, accepts)
    batch = collate([Encoded([5, 6, 7], 1), Encoded([8], 0)])
    with torch.no_grad():
        assert loss_of(adapted, task)(adapted.params, batch).device.type == device


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["text", "label", "preference"])
def test_the_commands_on_a_gpu(folder, reviews, tmp_path, capsys, kind):
    rows = {
        "text": {"text": "the film was great joy and the plot was dull"},
        "preference": {"prompt": "the film was", "chosen": " joy", "rejected": " bore"},
    }
    source = reviews
    if kind != "label":
        source = tmp_path / "rows.jsonl"
        lines = ({k: f"{v} {i}" if k in ("text", "prompt") else v for k, v in rows[kind].items()} for i in range(30))
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = ["train", "--data", source, "--model", folder, "--r", 8, "--steps", 6, "--batch-size", 4]
    more = [[]] if kind == "label" else [[], ["--data", source]]
    for i, several in enumerate(more):
        out = tmp_path / f"out{i}"
        assert cli.main([str(word) for word in [*train, *several, "--out", out, "--device", "cuda", "--json"]]) == 0
        assert json.loads(capsys.readouterr().out)["trained"] > 0
        adapter = ["--bank", out / "bank.safetensors"] if several else ["--adapter", out]
        for line in (["evaluate", *adapter, "--data", source], ["generate", "the film", *adapter]):
            name = ["--name", "rows-1"] if several and line[0] == "generate" else []
            assert cli.main([str(word) for word in [*line, *name, "--device", "cuda"]]) == 0
    assert cli.main(["merge", "--adapter", str(tmp_path / "out0"), "--to", "nf4", "--out", str(tmp_path / "m")]) == 0


@pytest.mark.cuda
@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
def test_a_base_on_a_gpu(folder, quant):
    base = load_base(str(folder), quant, device="cuda")
    assert isinstance(base, Base)
    assert {leaf.device.type for leaf in base.model.parameters()} == {"cuda"}
    assert base.dtype == torch.bfloat16
