"""The command line: options reach the function, and failures become one sentence and a status."""

import builtins
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from vera_func import cli


@pytest.fixture
def demo(monkeypatch):
    """A stand-in for `vera_func.demo`: it records the call, and raises what it is told."""
    stub = ModuleType("vera_func.demo")
    stub.calls, stub.error = [], None

    def run(**options):
        stub.calls.append(options)
        if stub.error is not None:
            raise stub.error

    stub.demo = run
    monkeypatch.setitem(sys.modules, "vera_func.demo", stub)
    return stub


def test_defaults(demo):
    assert cli.main(["demo"]) == 0
    (options,) = demo.calls
    assert options.pop("say") is not None
    assert options == {
        "model": None,
        "data": None,
        "quant": "nf4",
        "r": 256,
        "targets": None,
        "steps": None,
        "out": "vera-demo",
        "seed": 0,
        "learning_rate": 2e-2,
        "batch_size": 16,
        "dtype": None,
    }


def test_every_option_arrives(demo):
    line = (
        "demo --model dir --data x.csv --quant int8 --r 64 --targets q_proj,k_proj --steps 7 "
        "--out there --seed 3 --learning-rate 1e-3 --batch-size 4 --dtype float32"
    )
    assert cli.main(line.split()) == 0
    (options,) = demo.calls
    del options["say"]
    assert options == {
        "model": "dir",
        "data": "x.csv",
        "quant": "int8",
        "r": 64,
        "targets": ["q_proj", "k_proj"],
        "steps": 7,
        "out": "there",
        "seed": 3,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "dtype": torch.float32,
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "COMMAND"),
        ("dance", "dance"),
        ("demo --r 0", "must be positive"),
        ("demo --r x", "invalid int value: 'x'"),
        ("demo --learning-rate nan", "must be positive"),
        ("demo --learning-rate inf", "must be positive"),
        ("demo --steps -1", "must be positive"),
        ("demo --quant nf5", "nf5"),
        ("demo --dtype int8", "int8"),
        ("demo --targets ,", "q_proj,v_proj"),
    ],
)
def test_usage_mistakes(demo, capsys, line, said):
    with pytest.raises(SystemExit) as info:
        cli.main(line.split())
    assert info.value.code == 2
    assert said in capsys.readouterr().err
    assert demo.calls == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a row\n  is bad"), 2),
        (FileNotFoundError(2, "No such file", "x.csv"), 2),
        (ConnectionError("no network"), 1),
        (OSError("disk full"), 1),
        (RuntimeError("out of memory"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failures_are_one_line_on_stderr(demo, capsys, error, status):
    demo.error = error
    assert cli.main(["demo"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vera-func: ")
    assert err.count("\n") == 1


def test_an_unforeseen_error_keeps_its_traceback(demo):
    demo.error = TypeError("a bug")
    with pytest.raises(TypeError):
        cli.main(["demo"])


@pytest.mark.parametrize("missing", ["transformers", "tqdm.auto", "gguf"])
def test_a_missing_extra_says_what_to_install(demo, capsys, missing):
    demo.error = ModuleNotFoundError(f"No module named {missing!r}", name=missing)
    assert cli.main(["demo"]) == 1
    assert 'pip install "vera-func[demo]"' in capsys.readouterr().err


def test_a_missing_module_that_is_no_extra_is_a_bug(demo):
    demo.error = ModuleNotFoundError("No module named 'vera_func.gone'", name="vera_func.gone")
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(["demo", "--help"])
    assert info.value.code == 0
    assert "vera-func demo --data reviews.csv" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from vera_func import cli\n"
        "try: cli.main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'transformers', 'bitsandbytes', 'gguf'} & sys.modules.keys()\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "vera_func", "demo", "--r", "-3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "must be positive" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_real_mistake_ends_in_one_sentence(capsys, tmp_path):
    """Through the demo itself, which reads the data first: no model, no network."""
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\nA joy.,good\nToo long.,\n")
    assert cli.main(["demo", "--data", str(path)]) == 2
    err = capsys.readouterr().err
    assert "reviews.csv, line 3: 'label'" in err
    assert err.count("\n") == 1


def test_missing_transformers_through_the_demo_itself(capsys, monkeypatch, tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(30)))
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["demo", "--data", str(path), "--model", str(tmp_path)]) == 1
    assert 'pip install "vera-func[demo]"' in capsys.readouterr().err
