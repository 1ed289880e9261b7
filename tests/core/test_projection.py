"""The draw of the projections: uniform, of its key alone, and the same everywhere."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import vera_func as vf

from helpers import IN, OUT, make_layer
from refused import Refused


def rows_of(*n, x=None, seed=0):
    """Stacked adapters of shape `n`, projections, a base and an input (*x, in)."""
    params, frozen, weight, _ = make_layer(*n, seed=seed)
    inputs = torch.randn(*(x or ()), IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return params, frozen, weight, inputs, lambda x: nn.functional.linear(x, weight)


class TestProjections:
    def test_wider_ones_are_sliced(self):
        params, frozen, _, x, base_fn = rows_of(x=(3,))
        narrow = {"vera_A": frozen["vera_A"][:, :IN], "vera_B": frozen["vera_B"][:OUT]}
        assert frozen["vera_A"].shape != narrow["vera_A"].shape
        expected = vf.vera_forward(params, narrow, x, base_fn)
        assert torch.equal(vf.vera_forward(params, frozen, x, base_fn), expected)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_the_draw_does_not_depend_on_the_default_dtype(self, dtype):
        expected = vf.init_projections(5, 37, 13, key=3)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            drawn = vf.init_projections(5, 37, 13, key=3)
        finally:
            torch.set_default_dtype(default)
        assert_close(drawn, expected, rtol=0, atol=0)
        assert drawn["vera_A"].dtype == torch.float32

    def test_the_draw_is_on_the_cpu_whatever_the_default_device(self):
        with torch.device("meta"):
            drawn = vf.init_projections(5, 37, 13)
        assert_close(drawn, vf.init_projections(5, 37, 13), rtol=0, atol=0)

    def test_the_draw_and_the_global_generator_leave_each_other_alone(self):
        torch.manual_seed(0)
        expected, state = vf.init_projections(5, 37, 13), torch.get_rng_state()
        assert torch.equal(state, torch.Generator().manual_seed(0).get_state())
        torch.manual_seed(1)
        assert_close(vf.init_projections(5, 37, 13), expected, rtol=0, atol=0)

    def test_the_draw_does_not_depend_on_the_number_of_threads(self):
        # Large enough for torch to split the work, if it would.
        expected, threads = vf.init_projections(64, 1021, 1031), torch.get_num_threads()
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            try:
                drawn = vf.init_projections(64, 1021, 1031)
            finally:
                torch.set_num_threads(threads)
            assert_close(drawn, expected, rtol=0, atol=0)

    def test_the_draw_is_the_same_in_another_process(self):
        code = (
            "import torch, vera_func as vf; torch.set_default_dtype(torch.float64); torch.manual_seed(5);"
            "print(*(t.view(torch.int32).long().sum().item() for t in vf.init_projections(5, 37, 13, key=3).values()))"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        sums = [t.view(torch.int32).long().sum().item() for t in vf.init_projections(5, 37, 13, key=3).values()]
        assert [int(part) for part in found.split()] == sums

    def test_the_draw_is_uniform_and_of_the_key(self):
        drawn, other = vf.init_projections(64, 1021, 1031, key=0), vf.init_projections(64, 1021, 1031, key=1)
        for name, fan_in in (("vera_A", 1021), ("vera_B", 64)):
            bound = (6 / fan_in) ** 0.5
            assert 0.999 * bound < drawn[name].abs().max() <= bound
            assert abs(drawn[name].std() - bound / 3**0.5) < 0.01 * bound
            assert not torch.equal(drawn[name], other[name])
        assert_close(vf.init_projections(64, 1021, 1031), drawn, rtol=0, atol=0)
        # A first, then B, from one generator: a taller B continues a shorter one, a wider A is another draw.
        taller = vf.init_projections(64, 1021, 2000, key=0)
        assert torch.equal(taller["vera_A"], drawn["vera_A"])
        assert torch.equal(taller["vera_B"][:1031], drawn["vera_B"])
        wider = vf.init_projections(64, 1022, 1031, key=0)
        assert not torch.equal(wider["vera_A"][:, :1021] * (1022 / 1021) ** 0.5, drawn["vera_A"])

    @pytest.mark.parametrize(
        "sizes", [(0, 3, 3), (3, 0, 3), (3, 3, -1), (3.0, 3, 3), (True, 3, 3), (3, "3", 3)], ids=str
    )
    def test_sizes_must_be_positive_integers(self, sizes):
        with pytest.raises(ValueError, match="must be a positive integer, got"):
            vf.init_projections(*sizes)

    def test_keys_must_be_integers_of_64_bits(self):
        for key in (1.0, "1", True, None):
            with pytest.raises(ValueError, match="key must be an integer seed"):
                vf.init_projections(2, 3, 4, key=key)
        for key in (2**70, -(2**70)):
            with pytest.raises(ValueError, match=r"64 bits|long long"):
                vf.init_projections(2, 3, 4, key=key)


# What is refused

bad = Refused()


for size in (0, -3, 1.5, "4", None, True):
    bad(
        "init_projections", f"in={size!r}", lambda _, size=size: vf.init_projections(4, size, 3),
        f"in_features must be a positive integer, got {size!r}",
    )  # fmt: skip

bad("init_projections", "a key of text", lambda _: vf.init_projections(4, 3, 3, "1"), "key must be an integer seed")
bad("init_projections", "a huge key", lambda _: vf.init_projections(4, 3, 3, 2**70), "key must fit in 64 bits")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
