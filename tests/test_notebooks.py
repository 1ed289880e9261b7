"""Every notebook runs from top to bottom, what it predicts holds, and it was committed with its outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The same claims from fewer numbers, where a notebook as a reader runs it takes longest.
SMALLER = {
    "03_four_domains": {"STEPS, BATCH": "10, 8", "TRAIN, HELD_OUT": "96, 16"},
    "04_sweep": {"RATES": "[0.004 * 4**i for i in range(4)]", "HELD_OUT": "16"},
}


def notebook(path):
    """All but those that make their own weights download the demo's model and texts."""
    downloads = "load_base" in path.read_text("utf-8")
    return pytest.param(path, id=path.stem, marks=[pytest.mark.network, pytest.mark.slow] if downloads else [])


def printed(code):
    return "".join(output.get("text", "") for cell in code for output in cell.outputs)


def test_the_readme_lists_the_notebooks_by_number():
    assert NOTEBOOKS
    readme = (ROOT / "README.md").read_text("utf-8")
    listed = re.findall(r"\[(\d+)\. ([^]]+)\]\(notebooks/([^)]+)\)", readme)
    assert [name for _, _, name in listed] == [path.name for path in NOTEBOOKS]
    for number, (place, title, name) in enumerate(listed, start=1):
        first = nbformat.read(ROOT / "notebooks" / name, as_version=4).cells[0].source.splitlines()[0]
        assert int(place) == int(name[:2]) == number
        assert first.startswith(f"# {number}. {title}")


@pytest.mark.filterwarnings("ignore")  # of the kernel's machinery, in this process; the notebook's own are shown in it
@pytest.mark.parametrize("path", [notebook(path) for path in NOTEBOOKS])
def test_runs(path, tmp_path, monkeypatch):
    # torch 2.14 warns of its own use of torch.jit.script, as pyproject.toml explains.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:`torch.jit.script`:FutureWarning")
    content = nbformat.read(path, as_version=4)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in code), "committed without outputs"
    assert "image/png" in str(code), "committed without a figure"
    assert not re.search(r"/(home|opt|root|tmp|Users)/", printed(code)), "the output names a path of some machine"
    for names, value in SMALLER.get(path.stem, {}).items():
        code[0].source, count = re.subn(rf"^{names} = [^#\n]*", f"{names} = {value}  ", code[0].source, flags=re.M)
        assert count == 1, f"no {names} among the notebook's first lines"
    NotebookClient(content, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "Warning" not in printed(code)
    assert "False" not in printed(code), "something predicted was not measured"
