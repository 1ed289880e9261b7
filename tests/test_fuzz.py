"""A few seconds of the fuzzer, from cases that depend on nothing; `python -m tests.fuzz` runs for as long as wanted."""

import json

from fuzz import Fuzzer, fuzz, tensors_in


def test_damaged_files_are_refused_or_read_right():
    count, outcomes, failures = fuzz(seconds=3)
    assert not failures
    assert count > 50
    assert {name.partition(": ")[2] for name in outcomes} >= {"read", "ValueError"}


def test_the_second_reader_reads(tmp_path):
    fuzzer = Fuzzer(tmp_path)
    arrays = tensors_in(fuzzer.files["bank"])
    assert arrays["vera_A"].shape == (4, 7)
    assert json.loads(fuzzer.files["plain/adapter_config.json"])["r"] == 4
