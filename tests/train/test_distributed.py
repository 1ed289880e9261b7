"""Several processes give what one gives, bit for bit; the death of one ends the others, and the run goes on from there.

A small part runs by default. `VERA_FUNC_FAULTS=20 pytest tests/train/test_distributed.py` kills 20 random processes at
random steps, tries 1, 2 and 4 processes, and as root three hosts as network namespaces, one of which is cut off.
"""

import ast
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import ones
from torch.testing import assert_close

import vera_func as vf
from vera_func.cli import main as cli
from vera_func.data.models import load_base
from vera_func.io.bank import open_bank
from vera_func.train import distributed
from vera_func.train.distributed import map_sharded, mean_over_micro_batches, process_group

import distributed_case
from helpers import randomized, relative_error
from refused import Refused, X


TESTS = Path(__file__).parents[1]
LIMIT = 400  # seconds after which torchrun has ended on hosts that have lost the one of its store
FAULTS = int(os.environ.get("VERA_FUNC_FAULTS", "0"))
CASE = [str(TESTS / "distributed_case.py")]
everything = pytest.mark.skipif(not FAULTS, reason="set VERA_FUNC_FAULTS=20")


def environment(**more):
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def launch(processes, *words, options=("--standalone",), timeout=300):
    """`torchrun`: the finished process, and how long it took."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(processes), *words]
    begin = time.monotonic()
    done = subprocess.run(
        [str(word) for word in command], env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    return done, time.monotonic() - begin


def same_files(one, other):
    a, b = load_file(one), load_file(other)
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def bank(folder, tmp_path_factory):
    """Four adapters of the model in the folder."""
    base = load_base(str(folder), "nf4", torch.float32)
    config = vf.VeraConfig(r=16, target_modules=["q_proj", "v_proj"], base_model_name_or_path=str(folder))
    _, params, frozen, config = vf.adapt(base.model, config)
    stacked = vf.stack_adapters([randomized(params, seed) for seed in range(4)])
    return vf.save_bank(tmp_path_factory.mktemp("bank") / "bank.safetensors", stacked, frozen, config, list("abcd"))


def training(folder, reviews, out, *more):
    sizes = ["--rank", "16", "--batch-size", "7", "--dtype", "float32", "--parts", "3", "--json"]
    return ["train", "--model", str(folder), "--data", str(reviews), "--out", str(out), *sizes, *more]


# Alone


def gradient(x):
    """Of `mean((p - x)^2)` at p = 0."""
    return {"p": -2 * x.mean(), "q": x.new_zeros(2, 3)}, x.square().mean()


def test_the_mean_over_parts_is_that_of_the_whole():
    x = torch.randn(11, generator=torch.Generator().manual_seed(0))
    grads, loss = mean_over_micro_batches(gradient, x.split([1, 0, 3, 7]), weight=len)
    expected, expected_loss = gradient(x)
    assert_close((grads, loss), (expected, expected_loss))
    one, _ = mean_over_micro_batches(gradient, [x], weight=len)
    assert torch.equal(one["p"], expected["p"])  # a single part keeps its bits
    backwards, _ = mean_over_micro_batches(gradient, x.split([1, 0, 3, 7])[::-1], weight=len)
    assert torch.equal(backwards["p"], grads["p"])
    with pytest.raises(ValueError, match="the mean of 2 micro-batches is undefined"):
        mean_over_micro_batches(gradient, [x[:0], x[:0]], weight=len)


def test_alone_there_is_one_process():
    assert (distributed.rank(), distributed.world_size(), distributed.under_torchrun()) == (0, 1, False)
    view = torch.ones(3, 1000, requires_grad=True)[1]
    (got,) = map_sharded(lambda leaf: {"a": leaf}, [view])
    assert not got["a"].requires_grad
    assert got["a"].untyped_storage().nbytes() == 4000
    with process_group():
        assert not distributed.under_torchrun()


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan", "soon"])
def test_a_timeout_is_a_positive_number(seconds, monkeypatch):
    monkeypatch.setenv("VERA_FUNC_TIMEOUT", seconds)
    message = f"VERA_FUNC_TIMEOUT must be a positive number of seconds, got '{seconds}'"
    with pytest.raises(ValueError, match=message), process_group():
        pass


def test_no_code_of_ours_sends_a_signal():
    """Stopping processes is torchrun's work: nothing in the package can end one that it did not start, or itself."""
    for path in Path(vf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            odd = {"kill", "killpg", "terminate", "send_signal", "signal", "_exit", "abort"} & {*names}
            assert not odd, f"{path.name}:{node.lineno} {odd}"


# Under torchrun


@pytest.mark.parametrize("processes", [1, 2, 4] if FAULTS else [2])
def test_several_give_what_one_gives(processes, bank, reviews, tmp_path):
    line = f"evaluate --bank {bank} --data {reviews} --batch-size 7 --chunk 1 --dtype float32".split()
    table, expected_table = tmp_path / "table.csv", tmp_path / "expected.csv"
    done, _ = launch(processes, *CASE, "results", tmp_path, *line, "--out", table)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"4 rows written to {table}\n"  # once
    assert done.stderr.count("9/9") == -(-4 // processes)  # bars of the first process only
    assert cli.main([*line, "--out", str(expected_table)]) == 0
    assert table.read_text() == expected_table.read_text()

    expected, whole = distributed_case.results()
    for k in range(processes):
        found = load_file(tmp_path / f"{k}.safetensors")
        assert found.keys() == expected.keys()
        assert found.pop("furthest") == processes - 1
        for key, value in found.items():
            if key.startswith("parts."):
                assert relative_error(value, expected[key]) <= 1e-6, key
            else:
                assert torch.equal(value, expected[key]), key
    for key, value in whole.params.items():
        assert relative_error(expected[f"parts.{key}"], value) <= 1e-4, key
    assert_close(expected["parts.losses"], whole.losses, rtol=1e-5, atol=1e-5)


def test_each_process_reads_its_own_rows(bank, reviews, monkeypatch):
    names, read = open_bank(bank).names, []
    monkeypatch.setattr("vera_func.cli.evaluation.rank", lambda: 1)
    monkeypatch.setattr("vera_func.cli.evaluation.world_size", lambda: 2)
    monkeypatch.setattr("vera_func.cli.evaluation.map_sharded", lambda f, items: [f(i) for i in list(items)[1::2]] * 2)
    whole = vf.Bank.read
    monkeypatch.setattr(vf.Bank, "read", lambda self, names=None: read.extend(names) or whole(self, names))
    line = f"evaluate --bank {bank} --data {reviews} --chunk 1 --dtype float32 --json"
    assert cli.main(line.split()) == 0
    assert set(read[1:]) == {names[1], names[3]}  # the first look at the file is at one row


@pytest.mark.parametrize("seed", range(FAULTS or 1))
def test_a_killed_process_costs_nothing(seed, folder, reviews, tmp_path):
    draw = random.Random(seed)
    # Both ways of spreading: 12 steps of one, or 6 in groups of a sweep and 12 of its best. Saved every 4 steps.
    more = ["--steps", "12"] if seed % 2 == 0 else ["--steps", "12", "--adapters", "4"]
    who, step = draw.randrange(2), draw.randrange(12 if seed % 2 == 0 else 18)
    restarts = seed // 2 % 2 if FAULTS else 1
    line = [*CASE, "kill", f"{step},{who}", *training(folder, reviews, tmp_path / "out", *more)]
    done, seconds = launch(2, *line, options=("--standalone", "--max-restarts", restarts))
    # A process that has no group left to train asks for no batch: not every step of a sweep kills.
    killed = re.search(r"exitcode *: -9|vera-func: rank", done.stderr)
    assert killed or seed % 2
    if killed:
        # Rank 0 is told which rank is missing; where rank 0 is the one, torchrun's report says so.
        assert re.search(
            rf"vera-func: rank 0: .*Ranks {who} failed|exitcode *: -9.* local_rank: {who}|vera-func: rank 1: ",
            done.stderr,
        )
    said = done.stderr
    if killed and not restarts:
        assert (done.returncode, seconds < 60) == (1, True)
        assert not (tmp_path / "out").exists()
        done, _ = launch(2, *CASE, "kill", "-1,-1", *line[3:])
        said += done.stderr
    assert done.returncode == 0, done.stderr
    if seed % 2 == 0:
        asked = [int(i) for i in re.findall(r"asked for step (\d+)\.", said)]
        saved = step // 4 * 4
        before, after = asked[: saved - 12], asked[saved - 12 :]
        assert after == [*range(saved, 12)]
        assert before in ([*range(step)], [*range(step + 1)])  # whether the first process still asked
    assert cli.main(training(folder, reviews, tmp_path / "alone", *more)) == 0
    assert same_files(tmp_path / "out" / "adapter_model.safetensors", tmp_path / "alone" / "adapter_model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]  # no checkpoint is left


@pytest.mark.parametrize("what", ["hang", "fail"])
def test_a_process_that_does_not_arrive_is_named(what):
    done, seconds = launch(3, *CASE, what, "1", timeout=100)
    assert done.returncode == 1
    named = re.search(r"rank 0: other ranks are missing: .*Ranks 1 failed to pass monitoredBarrier", done.stderr)
    if what == "fail":
        # torchrun may stop rank 0 before it has spoken; then its report names the rank that failed.
        assert "ValueError: this rank fails" in done.stderr
        assert named or re.search(r"rank +: 1 \(local_rank: 1\)", done.stderr)
    else:
        assert named
    assert seconds < 60


# Hosts as network namespaces


def ip(words):
    subprocess.run(["ip", *words.split()], check=True)


@pytest.fixture
def hosts():
    """Three namespaces `vera1` ... with addresses 10.77.0.1 ... on one bridge; a list of what to end with them."""
    if os.geteuid() or subprocess.run(["ip", "netns", "list"], capture_output=True, check=False).returncode:
        pytest.skip("needs root and `ip netns`")
    ip("link add verabr type bridge")
    try:
        ip("link set verabr up")
        for i in (1, 2, 3):
            ip(f"netns add vera{i}")
            ip(f"link add vera{i}e type veth peer name eth0 netns vera{i}")
            ip(f"link set vera{i}e master verabr up")
            ip(f"-n vera{i} addr add 10.77.0.{i}/24 dev eth0")
            ip(f"-n vera{i} link set eth0 up")
            ip(f"-n vera{i} link set lo up")
            # Retransmissions until Linux gives up a connection: 8 take about 100 s, the default 15 about 16 minutes.
            ip(f"netns exec vera{i} sysctl -qw net.ipv4.tcp_retries2=8")
        running = []
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()
        for i in (1, 2, 3):
            ip(f"link del vera{i}e")  # at once: with its namespace it would go later
            ip(f"netns del vera{i}")
        ip("link del verabr")


@everything
@pytest.mark.parametrize("cut", [1, 3])
def test_a_host_that_is_cut_off(cut, hosts, folder, reviews, tmp_path):
    # No host sees another's folder.
    def start(i, attempt):
        (tmp_path / f"{i}").mkdir(exist_ok=True)
        options = "--nnodes 3 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29500"
        options += f" --local-addr 10.77.0.{i} --rdzv-conf is_host={int(i == 1)} --rdzv-id {attempt} -m vera_func"
        line = [*options.split(), *training(folder, reviews, tmp_path / f"{i}" / "out", "--steps", "200")]
        command = ["ip", "netns", "exec", f"vera{i}", sys.executable, "-m", "torch.distributed.run", *line]
        with open(tmp_path / f"{attempt}-{i}.log", "w") as log:
            return subprocess.Popen(
                command, env=environment(GLOO_SOCKET_IFNAME="eth0", VERA_FUNC_TIMEOUT="20"), stdout=log, stderr=log
            )

    first = {i: start(i, "first") for i in (1, 2, 3)}
    hosts.extend(first.values())
    while not list(tmp_path.glob("*/out.training-*")):
        assert all(process.poll() is None for process in first.values())
        time.sleep(0.1)
    time.sleep(2)
    ip(f"link set vera{cut}e down")
    begin = time.monotonic()
    said = {}
    while len(said) < 3 and time.monotonic() - begin < 120:
        for i in {1, 2, 3} - said.keys():
            if found := re.search("vera-func: (.*)", (tmp_path / f"first-{i}.log").read_text()):
                said[i] = found[1]
        time.sleep(0.1)
    assert said.keys() == {1, 2, 3}
    assert all(re.match(r"rank \d: .*\(a process has died, hangs, or is unreachable\)", line) for line in said.values())
    for process in first.values():
        assert process.wait(LIMIT - (time.monotonic() - begin)) != 0
    ip(f"link set vera{cut}e up")
    again = [start(i, "again") for i in (1, 2, 3)]
    hosts.extend(again)
    assert [process.wait(120) for process in again] == [0, 0, 0]
    (out,) = tmp_path.glob("*/out/adapter_model.safetensors")
    assert cli.main(training(folder, reviews, tmp_path / "alone", "--steps", "200")) == 0
    assert same_files(out, tmp_path / "alone" / "adapter_model.safetensors")


# What is refused

bad = Refused()

bad(
    "mean_over_micro_batches",
    "no parts",
    lambda _: mean_over_micro_batches(lambda part: ({}, X), [], weight=len),
    "has a positive weight",
)
bad("map_sharded", "no function", lambda _: map_sharded(None, [1]), "function must be callable, got NoneType")
bad("map_sharded", "a number of items", lambda _: map_sharded(abs, 3), "items must be iterable, got int")
bad(
    "mean_over_micro_batches",
    "padding alone",
    lambda _: mean_over_micro_batches(lambda part: ({}, ones(())), [1, 2], weight=lambda part: 0),
    "the mean of 2 micro-batches is undefined",
)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
