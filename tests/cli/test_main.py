"""The command line: options reach the function, and failures become one sentence and a status."""

import builtins
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import typer
from torch.distributed.run import get_args_parser

from vera_func.cli import main as cli
from vera_func.cli.app import app
from vera_func.cli.training.settings import Recipe, Run
from vera_func.data.prompts import PROMPT


class Result(NamedTuple):
    after: float
    loss: float
    out: Path
    bank: Path | None


@pytest.fixture
def demo(monkeypatch):
    """A stand-in for `vera_func.cli.training.classifier`: it records the call, and raises what it is told."""
    stub = ModuleType("vera_func.cli.training.classifier")
    stub.calls, stub.error, stub.result = [], None, None

    def run(settings, **options):
        stub.calls.append((settings, options))
        if stub.error is not None:
            raise stub.error
        return stub.result

    stub.train_classifier = run
    monkeypatch.setitem(sys.modules, "vera_func.cli.training.classifier", stub)
    return stub


def test_defaults(demo):
    assert cli.main(["demo"]) == 0
    ((settings, options),) = demo.calls
    assert settings == Run(
        "vera-demo", Recipe(batch_size=16, micro_batches=1, seed=0), device="auto", r=256, learning_rates=[2e-2]
    )
    assert options.pop("say") is not None
    assert options == {"data": None, "prompt": PROMPT, "adapters": 1}


def test_every_option_arrives(demo):
    line = (
        "demo --model dir --data x.csv --quant int8 --r 64 --targets q_proj,k_proj --steps 7 "
        "--out there --seed 3 --learning-rate 1e-3 --batch-size 4 --dtype float32 --adapters 8 --parts 2 "
        "--prompt {text}\\n: --device cuda"
    )
    assert cli.main(line.split()) == 0
    ((settings, options),) = demo.calls
    assert settings == Run(
        "there", Recipe(batch_size=4, micro_batches=2, seed=3), "dir", "int8", torch.float32, "cuda", r=64,
        targets=["q_proj", "k_proj"], steps=[7], learning_rates=[1e-3],
    )  # fmt: skip
    del options["say"]
    assert options == {"data": "x.csv", "prompt": "{text}\n:", "adapters": 8}


def test_every_option_of_training_arrives(demo):
    line = (
        "train --data x.csv --out there --model dir --quant fp4 --dtype bfloat16 --device cpu --r 64 "
        "--targets all-linear --epochs 2.5 --learning-rate 1e-3 --batch-size 4 --accumulate 2 --max-length 99 "
        "--schedule linear --warmup 0.1 --weight-decay 0.01 --clip 0.5 --dropout 0.2 --dora --checkpointing "
        "--eval-every 3 --patience 4 --seed 5 --log there --together 6 --adapters 7 --prompt {text}:"
    )
    demo.result = Result(after=0.75, loss=0.5, out=Path("there"), bank=None)
    assert cli.main(line.split()) == 0
    ((settings, options),) = demo.calls
    recipe = Recipe(4, 2, "linear", 0.1, 0.01, 0.5, 0.2, True, True, 3, 4, 5, "there")
    targets, rates = ["all-linear"], [1e-3]
    assert settings == Run("there", recipe, "dir", "fp4", torch.bfloat16, "cpu", 64, targets, None, 2.5, rates, 99, 6)
    del options["say"]
    assert options == {"data": "x.csv", "prompt": "{text}:", "adapters": 7}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "Missing command"),
        ("dance", "dance"),
        ("tran", "Did you mean 'train'?"),
        ("demo --nope", "--nope"),
        ("demo --r 0", "must be positive"),
        ("demo --r x", "invalid int value: 'x'"),
        ("demo --learning-rate nan", "must be positive"),
        ("demo --learning-rate inf", "must be positive"),
        ("demo --steps -1", "must be positive"),
        ("demo --seed x", "'x'"),
        ("demo --quant nf5", "nf5"),
        ("demo --dtype int8", "int8"),
        ("demo --targets ,", "q_proj,v_proj"),
        ("demo --adapters 0", "must be positive"),
        ("train --out x", "--data"),
        ("train --data x.csv", "--out"),
        ("evaluate --chunk 0", "must be positive"),
        ("generate --temperature 0", "must be positive"),
        ("merge --adapter x --out y", "--to"),
        ("merge --adapter x --out y", "nf4, fp4, int8, float32, bfloat16, float16"),
        ("merge --adapter x --out y --to none", "none"),
        ("export-lora --adapter x", "--out"),
        ("inspect", "PATH"),
        ("convert --out x", "SOURCE"),
    ],
)
def test_usage_mistakes(demo, capsys, line, said):
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), demo.calls) == ("", 1, [])
    assert err.startswith("vera-func: ")
    assert said in err
    (hint,) = re.findall(r"see (vera-func.*) --help\)\.$", err)
    assert hint in ("vera-func", f"vera-func {line.split(' ')[0]}")


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
        "The prompt was 'Review: {text}\\nSentiment:' (--prompt).\n"
        "Next: vera-func predict --adapter there 'A new text.'; vera-func inspect there\n"
    )
    assert cli.main([*train, "--json"]) == 0
    assert cli.main(["demo", "--json"]) == 0
    one, other = capsys.readouterr().out.split("}\n{")
    assert json.loads(one + "}") == json.loads("{" + other)
    assert json.loads(one + "}") == {"after": 0.75, "loss": None, "out": "there", "bank": None}
    settings, options = demo.calls[0]
    assert (options["data"], settings.out, options["adapters"]) == ("x.csv", "there", 2)
    assert options["say"]("a line") is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("missing", ["transformers", "tqdm.auto", "gguf"])
def test_a_missing_extra_says_what_to_install(demo, capsys, missing):
    demo.error = ModuleNotFoundError(f"No module named {missing!r}", name=missing)
    assert cli.main(["demo"]) == 1
    assert 'pip install "vera-func[demo]"' in capsys.readouterr().err


def test_a_package_that_a_library_asks_for(demo, capsys):
    """transformers raises an ImportError of its own, which names no module."""
    demo.error = ImportError("Loading a GGUF checkpoint requires\nGGUF to be installed.")
    assert cli.main(["demo"]) == 1
    said = 'vera-func: Loading a GGUF checkpoint requires GGUF to be installed: pip install "vera-func[demo]"\n'
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'vera_func.gone'", name="vera_func.gone"),
        ImportError("cannot import name 'gone'", name="vera_func.cli"),
    ],
)
def test_a_missing_module_that_is_no_extra_is_a_bug(demo, error):
    demo.error = error
    with pytest.raises(ImportError):
        cli.main(["demo"])


COMMANDS = ["demo", "train", "evaluate", "predict", "generate", "merge", "export-lora", "inspect", "convert", "push"]


@pytest.fixture
def parameters():
    """All parameters of all commands, as `(command, parameter)`."""
    group = typer.main.get_command(app)
    return [(name, parameter) for name, each in group.commands.items() for parameter in each.params]


@pytest.fixture
def help_of(capsys, monkeypatch):
    """What `--help` prints in a terminal of 80 columns."""

    def call(*words):
        monkeypatch.setenv("COLUMNS", "80")
        assert cli.main([*words, "--help"]) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        return shown

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_parses(help_of, command):
    shown = help_of(command)
    assert "--json" in shown
    assert "\n   vera-func " in shown  # indented
    examples = re.sub(r"\\\s*\n", " ", shown.partition("Example:")[2].partition("╭")[0]).strip().splitlines()
    assert examples
    for line in examples:
        program, *words = shlex.split(line)
        assert program == "vera-func"
        assert cli._parse(words).func.__name__.replace("_", "-") == command


def test_help_names_every_command(help_of):
    shown = help_of()
    places = [shown.find(f"│ {command} ") for command in COMMANDS]
    assert places == sorted(places)
    assert places[0] > 0
    assert "130: interrupted" in shown


def test_every_option_is_explained(parameters):
    for command, parameter in parameters:
        assert re.fullmatch(r"[A-Z][^\[\]]*\.", parameter.help), (command, parameter.name)  # rich reads [] as markup
    for prompt in (parameter for _, parameter in parameters if parameter.name == "prompt"):
        assert PROMPT.replace("\n", r"\n") in prompt.help


def test_an_option_means_the_same_everywhere(parameters):
    """One metavar, type, default and, wherever it does not depend on the command, help for a name."""
    found = {}
    for _, parameter in parameters:
        found.setdefault(parameter.name, []).append(parameter)
    for name in ("model", "quant", "dtype", "adapter", "bank", "name", "prompt", "targets", "json", "r", "chunk"):
        described = {(p.metavar, str(p.type_descriptor.annotation), p.nargs, str(p.default)) for p in found[name]}
        assert len(described) == 1, name
        assert len({tuple(p.opts) for p in found[name]}) == 1, name
    for name in ("quant", "dtype", "adapter", "bank", "prompt", "targets", "json", "r", "chunk"):
        assert len({parameter.help for parameter in found[name]}) == 1, name
    assert {parameter.metavar for parameter in found["out"]} == {"DIR", "FILE", "PATH"}
    assert {parameter.metavar for parameter in found["data"]} == {"FILE"}


def test_torchrun_leaves_every_option_a_name(parameters):
    """It takes what abbreviates an option of its own, even behind the program: `--r` may mean `--rdzv-backend`."""
    its = [name for action in get_args_parser()._actions for name in action.option_strings]
    for command, parameter in parameters:
        taken = [name for name in parameter.opts if any(other.startswith(name) for other in its)]
        assert len(taken) < len(parameter.opts), (command, parameter.opts)


@pytest.mark.parametrize(
    ("environment", "lines"),
    [
        ({}, ["--help", *(f"{command} --help" for command in COMMANDS)]),
        ({}, ["", "dance", "demo --r 0", "merge --adapter x --out y --to none"]),
        ({"_VERA_FUNC_COMPLETE": "complete_bash", "COMP_WORDS": "vera-func merge --to ", "COMP_CWORD": "3"}, [""]),
    ],
    ids=["help", "invalid", "completion"],
)
def test_nothing_heavy_is_imported_before_a_command_runs(environment, lines):
    """Modules are counted, not seconds: torch alone is 900."""
    code = f"""
import os, sys
before = set(sys.modules)
from vera_func.cli.main import main
os.environ.update({environment})
for line in {lines}:
    try: main(line.split())
    except SystemExit: pass
new = set(sys.modules) - before
heavy = {{"torch", "numpy", "transformers", "bitsandbytes", "safetensors", "gguf", "tqdm", "jaxtyping"}} & new
sys.exit(str(sorted(heavy)) if heavy else f"{{len(new)}} modules" if len(new) > 600 else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if environment:
        assert done.stdout.split() == ["nf4", "fp4", "int8", "float32", "bfloat16", "float16"]


@pytest.mark.parametrize("missing", ["typer", "rich"])
@pytest.mark.parametrize("words", [["--help"], ["demo", "--r", "0"], ["inspect", "x"]])
def test_without_the_extra_of_the_command_line(missing, words):
    """What `pip install vera-func` alone gives."""
    code = f"import sys; sys.modules[{missing!r}] = None; from vera_func.cli.main import main; sys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = f'vera-func: {missing} is not installed: pip install "vera-func[demo]"\n'
    assert (done.returncode, done.stderr) == (1, expected)


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
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vera-func ")
