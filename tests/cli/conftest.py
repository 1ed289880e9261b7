"""What the tests of several commands share: the command line itself, and what `demo` leaves."""

import json

import pytest

from vera_func.cli import main as cli


@pytest.fixture(scope="module")
def trained(folder, reviews, tmp_path_factory):
    """What `demo --adapters 4` leaves: the best adapter, and the bank of all."""
    out = tmp_path_factory.mktemp("out") / "sweep"
    line = f"demo --model {folder} --data {reviews} --r 16 --steps 6 --batch-size 4 --adapters 4 --json"
    assert cli.main([*line.split(), "--dtype", "float32", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(capsys):
    """Runs a command line: `(status, stdout, stderr)`."""

    def call(*words):
        status = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def run_json(run):
    def call(*words):
        status, out, err = run(*words, "--json")
        assert status == 0, err
        return json.loads(out)

    return call
