"""Every block of Python in the README runs, in order, in one namespace, as a reader would paste it."""

import re
from pathlib import Path

import pytest


README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 2
    namespace = {}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), namespace)
    printed = capsys.readouterr().out
    assert len(README.read_text().splitlines()) <= 150
    # The first example ends in a number that should be about 0.
    assert float(printed.split()[0]) == pytest.approx(0, abs=1e-4)
