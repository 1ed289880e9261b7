"""Load: threads that share a base, thousands of lives of an adapter, a bank of 100,000.

Threads run for `VERA_FUNC_SECONDS`, 2 by default: `VERA_FUNC_SECONDS=60 pytest -s tests/test_load.py -k threads`.
"""

import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import grad

import vera_func as vf
from vera_func.io.bank import append_to_bank

from helpers import TARGETS, llama, quantized, randomized


SECONDS = float(os.environ.get("VERA_FUNC_SECONDS", "2"))
IDS = torch.arange(20).reshape(2, 10) + 3
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def resident():
    """Bytes of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_in_threads(work):
    """Let four threads do `work(i, thread)` for eight `i` over and over; it must give what it gives alone."""
    with torch.no_grad():
        alone = [work(i, "alone") for i in range(8)]
        assert not torch.equal(alone[0][0], alone[1][0])
    end, wrong, rounds, samples = time.monotonic() + SECONDS, [], [0] * 4, []

    def loop(thread):
        try:
            with torch.no_grad():
                while time.monotonic() < end or rounds[thread] < 2:
                    i = (2 * thread + rounds[thread]) % 8
                    found = work(i, thread)
                    wrong.extend(
                        (i, k) for k, (a, b) in enumerate(zip(found, alone[i], strict=True)) if not torch.equal(a, b)
                    )
                    rounds[thread] += 1
        except BaseException as error:
            wrong.append(repr(error))
            raise

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(SECONDS / 20)
        samples.append(resident())
    for thread in threads:
        thread.join()
    assert not wrong
    # The first fifth fills caches and the pools of each thread; from then on memory is flat.
    settled = samples[len(samples) // 5 :]
    half = len(settled) // 2
    growth = max(settled[half:]) / max(settled[:half]) - 1 if half else 0.0
    print(f"{sum(rounds)} rounds of 4 threads in {SECONDS:g} s: no difference; memory {growth:+.2%}")
    assert growth < (0.01 if SECONDS >= 30 else 0.05)


def test_threads_give_what_one_gives(tmp_path):
    """Four threads over one quantized base: forwards, gradients, mixed batches, saving and loading."""
    base = quantized(llama(), "nested")
    config = vf.VeraConfig(r=8, target_modules=TARGETS["llama"])
    adapted = vf.adapt(base, config)
    adapters = [randomized(adapted.params, seed, 0.3) for seed in range(8)]
    stacked = vf.stack_adapters(adapters)

    def work(i, thread):
        apply, params, folder = adapted.apply, adapters[i], tmp_path / f"{thread} {i}"
        logits = lambda p: apply(p, adapted.frozen, input_ids=IDS).logits
        gradient = grad(lambda p: logits(p).square().mean())(params)
        rows = vf.select_adapters(stacked, [i, (i + 3) % 8])
        vf.save_adapter(folder, params, *adapted[2:])
        loaded = vf.load_adapter(folder, base)
        again = loaded.apply(loaded.params, loaded.frozen, input_ids=IDS).logits
        return [logits(params), *gradient.values(), logits(rows), again]

    run_in_threads(work)


def test_threads_with_calls_inside_calls():
    """Each call has another inside: with dropout or without, of other rows, params and lengths, over a base that
    remembers the longest text. No call sees another."""
    base = quantized(llama(max_position_embeddings=8, rope_parameters=DYNAMIC), "nf4").train()
    inside = threading.local()

    def hook(module, args, output):
        call, inside.call = getattr(inside, "call", None), None
        if call is not None:
            inside.found = call()

    base.model.layers[0].mlp.register_forward_hook(hook)
    config = vf.VeraConfig(r=8, target_modules=TARGETS["llama"], vera_dropout=0.3)
    apply, params, frozen, _ = vf.adapt(base, config)
    adapters = [randomized(params, seed, 0.3) for seed in range(8)]
    norms = [{"model.norm.weight": torch.full((64,), 1.0 + seed)} for seed in range(8)]
    rows, last = vf.stack_adapters(adapters), "model.layers.1.self_attn.q_proj.lambda_d"

    def work(i, thread):
        generator = lambda: torch.Generator().manual_seed(i)
        ids = lambda length: (torch.arange(2 * length).reshape(2, length) * (i + 2)) % 60 + 3
        logits = lambda p, length, apply=apply: apply(p, frozen, input_ids=ids(length)).logits
        calls = [
            lambda: logits(adapters[i] | norms[i], 5),
            lambda: logits(adapters[i - 1], 20, apply.with_dropout(generator())),
            lambda: logits(vf.select_adapters(rows, [i, (i + 5) % 8]), 12),
            lambda: grad(lambda p: logits(p, 9).square().mean())(adapters[i])[last],
        ]
        found = []
        for k, outer in enumerate(calls):
            inside.call = calls[(k + i) % 4]
            found += [outer(), inside.found]
        return found

    run_in_threads(work)


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_thousands_of_lives_leave_nothing(base, tmp_path):
    """Load, apply and free, over and over; tensors are counted, for memory has slack."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    model = quantized(model, base)
    adapted = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0", "1"]))
    folder = vf.save_adapter(tmp_path, *adapted[1:])

    def live(count):
        for _ in range(count):
            loaded = vf.load_adapter(folder, model)
            loaded.apply(loaded.params, loaded.frozen, torch.ones(3, 64))
        del loaded
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    lives = int(40 * SECONDS)
    with torch.no_grad():
        first, memory = live(10), resident()
        assert live(lives) == first
        growth = resident() / memory - 1
    print(f"{lives} lives over {base}: {growth:+.2%}")
    assert growth < 0.01


def test_a_bank_of_100_000(tmp_path):
    """Names, random rows, an append and a replacement of a large bank; what is read is what was written."""
    n, r, out = 100_000, 4, 8
    config = vf.VeraConfig(r=r, target_modules=["0"])
    model = nn.Sequential(nn.Linear(16, out))
    adapted = vf.adapt(model, config)
    stacked = {"0.lambda_b": torch.arange(n * out).reshape(n, out).float(), "0.lambda_d": torch.rand(n, r)}
    names = [f"user {i}" for i in range(n)]
    path = vf.save_bank(tmp_path / "bank", stacked, *adapted[2:], names)
    bank = vf.open_bank(path)
    assert len(bank) == n
    rows = torch.randint(n, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    read = bank.read([names[i] for i in rows])
    assert all(torch.equal(read[key], stacked[key][rows]) for key in stacked)
    more = {key: -leaf[:2] for key, leaf in stacked.items()}
    bank = append_to_bank(path, more, ["user 7", "new"], replace=True)
    assert (len(bank), bank.names[-1]) == (n + 1, "new")
    read = bank.read(["user 7", "new", "user 8", f"user {n - 1}"])
    for key, leaf in stacked.items():
        assert torch.equal(read[key], torch.stack([-leaf[0], -leaf[1], leaf[8], leaf[n - 1]]))
    apply, params, frozen, _ = bank.adapted(model, ["new", "user 3"])
    assert apply(params, frozen, torch.ones(2, 16)).shape == (2, out)
