"""The command line: options reach the function, and failures become one sentence and a status."""

import builtins
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from vera_func.cli import main as cli


class Result(NamedTuple):
    after: float
    loss: float
    out: Path
    bank: Path | None


@pytest.fixture
def demo(monkeypatch):
    """A stand-in for `vera_func.cli.demo`: it records the call, and raises what it is told."""
    stub = ModuleType("vera_func.cli.demo")
    stub.calls, stub.error, stub.result = [], None, None

    def run(**options):
        stub.calls.append(options)
        if stub.error is not None:
            raise stub.error
        return stub.result

    stub.demo = run
    monkeypatch.setitem(sys.modules, "vera_func.cli.demo", stub)
    return stub


def test_defaults(demo):
    assert cli.main(["demo"]) == 0
    (options,) = demo.calls
    assert options.pop("say") is not None
    assert options == {
        "model": None,
        "data": None,
        "quant": None,
        "r": 256,
        "targets": None,
        "steps": None,
        "adapters": 1,
        "out": "vera-demo",
        "seed": 0,
        "learning_rate": 2e-2,
        "batch_size": 16,
        "parts": None,
        "dtype": None,
    }


def test_every_option_arrives(demo):
    line = (
        "demo --model dir --data x.csv --quant int8 --r 64 --targets q_proj,k_proj --steps 7 "
        "--out there --seed 3 --learning-rate 1e-3 --batch-size 4 --dtype float32 --adapters 8 --parts 2 "
        "--prompt {text}\\n:"
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
        "adapters": 8,
        "prompt": "{text}\n:",
        "out": "there",
        "seed": 3,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "parts": 2,
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
        ("demo --adapters 0", "must be positive"),
        ("train --out x", "--data"),
        ("train --data x.csv", "--out"),
        ("evaluate --chunk 0", "must be positive"),
        ("generate --temperature 0", "must be positive"),
        ("merge --adapter x --out y", "--to"),
        ("merge --adapter x --out y --to none", "none"),
        ("export-lora --adapter x", "--out"),
        ("inspect", "PATH"),
        ("convert --out x", "SOURCE"),
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


def test_train_is_the_same_without_the_talk(demo, capsys):
    demo.result = Result(after=0.75, loss=float("nan"), out=Path("there"), bank=None)
    train = ["train", "--data", "x.csv", "--out", "there"]
    assert cli.main([*train, "--adapters", "2"]) == 0
    assert capsys.readouterr().out == (
        "after: 0.75\nloss: nan\nout: there\n"
        "Next: vera-func predict --adapter there 'A new text.'; vera-func inspect there\n"
    )
    assert cli.main([*train, "--json"]) == 0
    assert cli.main(["demo", "--json"]) == 0
    one, other = capsys.readouterr().out.split("}\n{")
    assert json.loads(one + "}") == json.loads("{" + other)
    assert json.loads(one + "}") == {"after": 0.75, "loss": None, "out": "there", "bank": None}
    options = demo.calls[0]
    assert (options["data"], options["out"], options["adapters"]) == ("x.csv", "there", 2)
    assert options["say"]("a line") is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("missing", ["transformers", "tqdm.auto", "gguf"])
def test_a_missing_extra_says_what_to_install(demo, capsys, missing):
    demo.error = ModuleNotFoundError(f"No module named {missing!r}", name=missing)
    assert cli.main(["demo"]) == 1
    assert 'pip install "vera-func[demo]"' in capsys.readouterr().err


def test_a_missing_module_that_is_no_extra_is_a_bug(demo):
    demo.error = ModuleNotFoundError("No module named 'vera_func.gone'", name="vera_func.gone")
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


COMMANDS = ["demo", "train", "evaluate", "predict", "generate", "merge", "export-lora", "inspect", "convert"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_parses(capsys, command):
    with pytest.raises(SystemExit) as info:
        cli.main([command, "--help"])
    assert info.value.code == 0
    shown = capsys.readouterr().out
    assert "--json" in shown
    lines = shown.partition("example:\n")[2].strip().splitlines()
    assert lines
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "vera-func"
        assert cli._parser().parse_args(words).command == command


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert [command for command in COMMANDS if f"    {command}" not in shown] == []


def test_an_option_means_the_same_everywhere():
    """One metavar, type and help for a name, wherever a command has it and the help says no more of the default."""
    actions = {}
    (commands,) = (action for action in cli._parser()._actions if hasattr(action, "choices") and action.choices)
    for parser in commands.choices.values():
        for action in parser._actions:
            actions.setdefault(action.dest, []).append(action)
    for name in ("model", "quant", "dtype", "adapter", "bank", "name", "prompt", "targets", "json"):
        assert len({(a.metavar, str(a.choices), a.nargs, a.default) for a in actions[name]}) == 1, name
    assert {action.metavar for action in actions["out"]} == {"DIR", "FILE", "PATH"}
    assert {action.metavar for action in actions["data"]} == {"FILE"}


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from vera_func.cli import main as cli\n"
        f"for command in {COMMANDS}:\n"
        "    try: cli.main([command, '--help'])\n"
        "    except SystemExit: pass\n"
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


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("vera-func ")
