"""New adapters of the command line, and the arithmetic in which trained ones are loaded."""

import pytest
import torch

import vera_func as vf
from vera_func.cli.training.outputs import new_adapter, output_folder
from vera_func.cli.training.settings import Recipe
from vera_func.data.models import load_base
from vera_func.data.sources import load_adapters, open_source


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.bfloat16), (torch.float32, None)])
def test_products_are_in_16_bits_where_the_base_computes_in_bfloat16(dtype, expected, folder, tmp_path):
    base = load_base(str(folder), "none", dtype)
    apply, params, frozen, config = new_adapter(base, 4, ["q_proj"], Recipe())
    assert apply.product_dtype == expected
    directory = vf.save_adapter(tmp_path / "adapter", params, frozen, config)
    bank = vf.save_bank(tmp_path / "bank.safetensors", vf.stack_adapters([params]), frozen, config, names=["one"])
    for source in (open_source(str(directory)), open_source(bank=str(bank))):
        loaded, _ = load_adapters(source, base.model, base.product_dtype)
        assert loaded.apply.product_dtype == expected
        assert load_adapters(source, base.model)[0].apply.product_dtype is None  # as `generate` loads them


def test_a_result_is_a_folder(tmp_path):
    (tmp_path / "file").touch()
    assert output_folder(str(tmp_path / "new")) == tmp_path / "new"
    with pytest.raises(ValueError, match=r"^out .* is a file, but must be a folder or not exist"):
        output_folder(tmp_path / "file")
