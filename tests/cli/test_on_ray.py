"""Evaluation on a local Ray: the rows of one process, also if an actor is killed, and its errors."""

import os
import sys
from pathlib import Path

import pytest
import torch

import vera_func as vf
from vera_func.cli import on_ray
from vera_func.cli.on_ray import _actors, evaluate_on_ray
from vera_func.data.models import load_base
from vera_func.data.sources import open_source

from helpers import randomized


ADAPTERS = 64
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bank(folder, tmp_path_factory):
    """64 adapters of the model in the folder."""
    base = load_base(str(folder), "nf4", torch.float32)
    config = vf.VeraConfig(r=16, target_modules=["q_proj", "v_proj"], base_model_name_or_path=str(folder))
    _, params, frozen, config = vf.adapt(base.model, config)
    stacked = vf.stack_adapters([randomized(params, seed) for seed in range(ADAPTERS)])
    names = [f"a{i:02}" for i in range(ADAPTERS)]
    return vf.save_bank(tmp_path_factory.mktemp("bank") / "bank.safetensors", stacked, frozen, config, names)


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine alone; one for all tests, since it takes long to start."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def dying(log, name):
    """An `Evaluator` that logs its groups and ends its process when it first gets the adapter of this name."""

    class Dying(on_ray.Evaluator):  # a local class, which Ray sends as a whole
        def rows(self, names):
            first = name in names and name not in (log.read_text() if log.exists() else "")
            with log.open("a") as file:
                print(*names, file=file)
            if first:
                os._exit(1)
            return super().rows(names)

    return Dying


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_killed_actor_costs_its_group(cluster, run, bank, reviews, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setattr(on_ray, "Evaluator", dying(log, "a20"))
    monkeypatch.setattr(on_ray, "_actors", lambda nodes: (2, {"num_cpus": 1}))
    monkeypatch.chdir(bank.parent)  # relative paths are those of this process
    line = ["evaluate", "--bank", bank.name, "--data", reviews, "--dtype", "float32", "--chunk", "4"]
    status, _, err = run(*line, "--ray", "auto", "--out", tmp_path / "ray.csv")
    assert status == 0, err
    groups = log.read_text().splitlines()
    assert len(groups) == len({*groups}) + 1 == 9  # 8 adapters each, and one group twice
    assert run(*line, "--out", tmp_path / "alone.csv")[0] == 0
    assert (tmp_path / "ray.csv").read_text() == (tmp_path / "alone.csv").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_errors_of_actors(cluster, bank, reviews, tmp_path, monkeypatch):
    source = open_source(bank=str(bank))

    def load():
        raise ValueError("there is no such model")

    with pytest.raises(ValueError, match=r"^there is no such model$"):
        evaluate_on_ray(source, load, str(reviews), address="auto", progress=False)
    monkeypatch.setattr(on_ray, "RETRIES", 0)
    monkeypatch.setattr(on_ray, "Evaluator", dying(tmp_path / "log", "a00"))
    with pytest.raises(RuntimeError, match=r"^the evaluation on Ray failed: The actor"):
        evaluate_on_ray(source, load, str(reviews), address="auto", progress=False)


def test_what_is_refused(run, bank, reviews, monkeypatch):
    line = ["evaluate", "--bank", bank, "--data", reviews, "--ray"]
    with monkeypatch.context() as patch:
        patch.setattr(on_ray, "world_size", lambda: 2)
        status, _, err = run(*line, "auto")
        assert (status, err.split(": ")[1]) == (2, "got --ray under torchrun, but Ray shards the adapters itself")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        assert run(*line, "auto")[::2] == (1, 'vera-func: ray is not installed: pip install "vera-func[ray]"\n')
    monkeypatch.setattr(pytest.importorskip("ray"), "is_initialized", lambda: False)  # the cluster of the tests above
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"):
        status, _, err = run(*line, address)
        assert status == 1
        assert err.startswith(f"vera-func: no Ray cluster answers at {address}: ")


def test_actors():
    def node(alive=True, **resources):
        return {"Alive": alive, "Resources": resources}

    assert _actors([node(CPU=8.0, GPU=2.0), node(CPU=4.0), node(False, CPU=1.0, GPU=4.0)]) == (2, {"num_gpus": 1})
    assert _actors([node(CPU=8.0), node(CPU=2.0), node(memory=1.0), node(False, CPU=1.0)]) == (2, {"num_cpus": 2.0})
    with pytest.raises(RuntimeError, match="no node with a CPU"):
        _actors([node(memory=1.0)])
