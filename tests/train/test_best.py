"""The best params of a run: of each adapter its own, and the same ones after a resume."""

import pytest
import torch
from torch.testing import assert_close

from vera_func.train.best import better, load_best, save_best, start_best


NAN = float("nan")


def test_each_adapter_keeps_its_own_best():
    best = start_best({"p": torch.zeros(3, 2)}, (3,))
    for step, metrics in enumerate([[3.0, NAN, 3.0], [2.0, 5.0, 3.0], [4.0, 4.0, 1.0], [2.0, NAN, NAN]], start=1):
        best = better(best, {"p": torch.full((3, 2), float(step))}, torch.tensor(metrics), step)
    assert best.params["p"][:, 0].tolist() == best.step.tolist() == [2, 3, 3]
    assert best.metric.tolist() == [2, 4, 1]


def test_one_adapter_and_its_file(tmp_path):
    start = start_best({"p": torch.zeros(2, dtype=torch.bfloat16)})
    best = better(start, {"p": torch.ones(2, dtype=torch.bfloat16)}, torch.tensor(0.5), 7)
    save_best(tmp_path / "best", best)
    read = load_best(tmp_path / "best", start)
    assert_close(read.params, best.params)
    assert (read.metric.item(), read.step.item()) == (0.5, 7)
    with pytest.raises(ValueError, match="belongs to another run"):
        load_best(tmp_path / "best", start_best({"q": torch.zeros(2)}))
    (tmp_path / "best").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_best(tmp_path / "best", start)
