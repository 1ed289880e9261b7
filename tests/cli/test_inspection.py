"""`inspect` of adapters, banks and models."""

import pytest
import transformers

from helpers import llama


# inspect


def test_inspect_an_adapter(run, run_json, trained, folder):
    found = run_json("inspect", trained)
    assert {"adapters": 1, "r": 16, "quant": "nf4", "labels": ["bad", "good"]}.items() <= found.items()
    assert found["prompt"] == "Review: {text}\nSentiment:"
    assert [row["modules"] for row in found["modules"]] == ["q_proj", "v_proj"]
    # q is (64, 64) and v (32, 64), in two layers.
    assert found["trained"] == 2 * (64 + 16 + 32 + 16)
    assert found["bytes"] == (trained / "adapter_model.safetensors").stat().st_size
    assert "merge" not in found
    found = run_json("inspect", trained, "--model", folder, "--to", "bfloat16")
    assert found["merge"]["to"] == "bfloat16"
    assert [row["count"] for row in found["merge"]["modules"]] == [2, 2]
    assert all(row["size"] > 0 for row in found["merge"]["modules"])
    status, said, _ = run("inspect", trained, "--model", folder)
    assert status == 0
    assert "advice: " in said
    assert r"prompt: Review: {text}\nSentiment:" in said.splitlines()
    assert len(said.splitlines()) < 40


def test_inspect_a_bank(run_json, trained, folder):
    bank = trained / "bank.safetensors"
    found = run_json("inspect", bank)
    assert (found["kind"], found["adapters"], found["trained"]) == ("bank", 4, 2 * (64 + 16 + 32 + 16))
    name = found["names"][1]
    found = run_json("inspect", bank, "--name", name, "--model", folder)
    assert found["names"] == [name]
    assert found["merge"]["name"] == name


def test_inspect_a_model(run, run_json, folder):
    found = run_json("inspect", folder, "--r", "16")
    assert (found["kind"], found["type"], found["quantization"]) == ("model", "llama", None)
    assert found["dtype"] == "float32"
    assert found["parameters"] == sum(p.numel() for p in llama().parameters())
    assert found["would_train"] == 2 * (64 + 16 + 32 + 16)
    assert found["projections"] == 16 * (64 + 64)
    rows = {row["modules"]: row for row in found["modules"]}
    assert rows["v_proj"] | {"modules": "v_proj"} == {
        **{"modules": "v_proj", "count": 2, "in": "64", "out": "32", "weights": 2 * 64 * 32},
        **{"would_adapt": 2, "would_train": 2 * (32 + 16)},
    }
    assert rows["down_proj"]["would_adapt"] == rows["lm_head"]["would_adapt"] == 0
    dense = found["parameters"] - sum(row["weights"] for row in found["modules"] if row["modules"] != "lm_head")
    assert found["stays_dense"] == dense / found["parameters"]
    assert found["fused_experts"] is None
    found = run_json("inspect", folder, "--targets", "down_proj")
    assert found["would_train"] == 2 * (64 + 256)
    status, said, _ = run("inspect", folder)
    assert status == 0
    assert "parameters: " in said


def test_inspect_a_model_with_fused_experts(run, run_json, tmp_path):
    sizes = {"vocab_size": 67, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(**sizes, intermediate_size=64, num_key_value_heads=2, num_local_experts=8)
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    found = run_json("inspect", tmp_path)
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    assert found["fused_experts"] == pytest.approx(experts / found["parameters"])
    assert found["stays_dense"] > found["fused_experts"] > 0.5
    status, said, _ = run("inspect", tmp_path)
    assert status == 0
    assert "fused_experts: 0.8" in said
