"""A bank on disk: what is written is read, only what is asked for is read, and a crash leaves the old or the new."""

import json
import os

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import vera_func as vf
from vera_func.io.bank import append_to_bank, export_adapters, import_adapters
from vera_func.model.batch import num_adapters

from helpers import TARGETS, llama, quantized, randomized, row, snapshot


R, N = 4, 5
NAMES = ["ant", "bee", "cat", "dog", "eel"]
FOX_GNU = ["fox", "gnu"]


def tokens(rows=2, length=6):
    return torch.randint(3, 67, (rows, length), generator=torch.Generator().manual_seed(0))


def small(**fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    return vf.adapt(model, vf.VeraConfig(**({"r": R, "target_modules": ["0", "2"]} | fields)))


def several(adapted, n=N, first=0):
    return vf.stack_adapters([randomized(adapted.params, seed) for seed in range(first, first + n)])


def assert_same(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def test_tensors_that_share_memory_are_stored_one_by_one(tmp_path):
    adapted = small()
    stacked = several(adapted)
    stacked["2.lambda_d"] = stacked["0.lambda_d"]
    bank = vf.open_bank(vf.save_bank(tmp_path / "bank", stacked, *adapted[2:], names=NAMES))
    assert_same(bank.read(), stacked)


@pytest.fixture
def bank(tmp_path):
    """`(path, adapted, stacked)` of a bank that was written."""
    adapted = small()
    stacked = several(adapted)
    path = vf.save_bank(tmp_path / "bank.safetensors", stacked, adapted.frozen, adapted.config, NAMES)
    return path, adapted, stacked


class TestRoundTrip:
    def test_reads_what_was_written(self, bank):
        path, adapted, stacked = bank
        opened = vf.open_bank(path)
        assert opened.names == tuple(NAMES)
        assert len(opened) == N
        assert opened.config == adapted.config
        assert_same(opened.read(), stacked)
        assert_same(opened.frozen(), adapted.frozen)
        assert [p.name for p in path.parent.iterdir()] == ["bank.safetensors"]

    @pytest.mark.parametrize(
        "chosen",
        [["bee"], ["eel", "ant"], ["cat", "cat"], ["ant", "bee", "cat"], [3], [3, "bee", 4, 0], NAMES, []],
        ids=str,
    )
    def test_reads_rows_in_the_order_asked_for(self, bank, chosen):
        path, _, stacked = bank
        rows = [name if isinstance(name, int) else NAMES.index(name) for name in chosen]
        assert_same(vf.open_bank(path).read(chosen), {key: leaf[rows] for key, leaf in stacked.items()})

    @pytest.mark.parametrize(
        "fields",
        [
            {"modules_to_save": ["2"], "target_modules": ["0"]},
            {"bias": "all"},
            {"vera_dropout": 0.5, "d_initial": 0.3, "projection_prng_key": 7, "save_projection": False},
            {"target_modules": "[02]"},
        ],
        ids=str,
    )
    def test_keeps_configurations_and_own_parameters(self, fields, tmp_path):
        adapted = small(**fields)
        stacked, frozen = several(adapted), randomized(adapted.frozen)
        opened = vf.open_bank(vf.save_bank(tmp_path / "bank", stacked, frozen, adapted.config, NAMES))
        assert opened.config == adapted.config
        assert_same(opened.read(), stacked)
        assert_same(opened.frozen(), frozen)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_keeps_dtypes(self, dtype, tmp_path):
        adapted = small()
        stacked = {key: leaf.to(dtype) for key, leaf in several(adapted).items()}
        opened = vf.open_bank(vf.save_bank(tmp_path / "bank", stacked, adapted.frozen, adapted.config, NAMES))
        assert_same(opened.read(), stacked)
        assert_same(opened.read([1, 3]), {key: leaf[[1, 3]] for key, leaf in stacked.items()})

    def test_takes_views_and_what_requires_grad(self, tmp_path):
        adapted = small()
        stacked = {key: leaf.requires_grad_() for key, leaf in several(adapted, 2 * N).items()}
        views = {key: leaf[::2] for key, leaf in stacked.items()}
        opened = vf.open_bank(vf.save_bank(tmp_path / "bank", views, adapted.frozen, adapted.config, NAMES))
        assert_same(opened.read(), {key: leaf.detach() for key, leaf in views.items()})

    def test_other_programs_can_read_it(self, bank):
        path, adapted, stacked = bank
        assert_same(load_file(path), {**stacked, **adapted.frozen})

    def test_names_may_be_anything(self, tmp_path):
        adapted, names = small(), ["ä/ö", " ", "0", "vera_A", "\n"]
        path = vf.save_bank(tmp_path / "bank", several(adapted), adapted.frozen, adapted.config, names)
        assert vf.open_bank(path).names == tuple(names)
        # "0" is a name here, and 0 is a row.
        assert_same(vf.open_bank(path).read(["0"]), vf.open_bank(path).read([2]))


class TestLaziness:
    def test_opening_reads_no_tensor(self, bank):
        path, *_ = bank
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        # The same header over zeros: if a value had been read, it would be another.
        path.write_bytes(path.read_bytes()[:header] + bytes(path.stat().st_size - header))
        opened = vf.open_bank(path)
        assert opened.names == tuple(NAMES)
        assert not opened.read(["ant"])["0.lambda_d"].any()

    @pytest.mark.parametrize(
        ("chosen", "runs"), [([1], 1), ([1, 2, 3], 1), ([3, 1], 2), ([0, 1, 4, 2, 3], 3), ([2, 2], 2)]
    )
    def test_reads_only_the_rows_asked_for(self, bank, chosen, runs, monkeypatch):
        path, _, stacked = bank
        reads = []

        class File:
            """The open file, with its reads noted."""

            def __init__(self, *args, **kwargs):
                self.file = safe_open(*args, **kwargs)

            def __enter__(self):
                self.file.__enter__()
                return self

            def __exit__(self, *args):
                return self.file.__exit__(*args)

            def __getattr__(self, name):
                assert name not in ("get_tensor", "get_tensors")
                return getattr(self.file, name)

            def get_slice(self, key):
                part = self.file.get_slice(key)

                class Slice:
                    def __getitem__(self, index):
                        reads.append((key, index.start, index.stop))
                        return part[index]

                return Slice()

        opened = vf.open_bank(path)
        monkeypatch.setattr("vera_func.io.bank.safe_open", File)
        assert_same(opened.read(chosen), {key: leaf[chosen] for key, leaf in stacked.items()})
        assert {key for key, _, _ in reads} == stacked.keys()
        for key in stacked:
            spans = [(start, stop) for name, start, stop in reads if name == key]
            assert [i for start, stop in spans for i in range(start, stop)] == chosen
            assert len(spans) == runs

    def test_what_was_read_is_the_readers(self, bank):
        # It may be mapped from the file, which is never overwritten, only replaced.
        path, adapted, stacked = bank
        opened = vf.open_bank(path)
        read, run, frozen = opened.read(), opened.read(["bee", "cat"]), opened.frozen()
        vf.save_bank(path, several(adapted, 2, first=20), adapted.frozen, adapted.config, ["fox", "gnu"])
        path.unlink()
        assert_same(read, stacked)
        assert_same(run, {key: leaf[1:3] for key, leaf in stacked.items()})
        assert_same(frozen, adapted.frozen)

    def test_writing_to_what_was_read_does_not_change_the_bank(self, bank):
        path, adapted, stacked = bank
        before = path.read_bytes()
        opened = vf.open_bank(path)
        for chosen in (None, ["bee"], ["bee", "ant"]):
            for leaf in opened.read(chosen).values():
                leaf.zero_()
        for leaf in opened.frozen().values():
            leaf.zero_()
        assert path.read_bytes() == before
        assert_same(opened.read(), stacked)
        assert_same(opened.frozen(), adapted.frozen)


class TestAppending:
    def test_adds_rows(self, bank):
        path, adapted, stacked = bank
        more = several(adapted, 2, first=20)
        opened = append_to_bank(path, more, FOX_GNU)
        assert opened.names == (*NAMES, "fox", "gnu") == vf.open_bank(path).names
        assert_same(opened.read(), {key: torch.cat([stacked[key], more[key]]) for key in stacked})
        assert_same(opened.frozen(), adapted.frozen)
        assert opened.config == adapted.config

    def test_replaces_rows(self, bank):
        path, adapted, stacked = bank
        more = several(adapted, 3, first=20)
        opened = append_to_bank(path, more, ["fox", "cat", "ant"], replace=True)
        assert opened.names == (*NAMES, "fox")
        for name, i in (("fox", 0), ("cat", 1), ("ant", 2)):
            assert_same(row(opened.read([name]), 0), row(more, i))
        for name in ("bee", "dog", "eel"):
            assert_same(row(opened.read([name]), 0), row(stacked, NAMES.index(name)))

    def test_a_bank_that_is_open_sees_the_old_names(self, bank):
        path, adapted, stacked = bank
        opened = vf.open_bank(path)
        append_to_bank(path, several(adapted, 1), ["fox"])
        assert len(opened) == N
        assert_same(opened.read(), stacked)

    def test_leaves_its_inputs_alone(self, bank):
        path, adapted, _ = bank
        more = several(adapted, 2, first=20)
        before = snapshot(more)
        append_to_bank(path, more, ["ant", "fox"], replace=True)
        assert_same(snapshot(more), before)

    @pytest.mark.parametrize(
        ("change", "names", "replace", "message"),
        [
            (lambda s: s, ["fox", "cat"], False, "already has an adapter 'cat'; pass replace=True"),
            (lambda s: s, ["fox"], True, "2 distinct names, .*got 1, of which 1 are distinct"),
            (lambda s: s, ["fox", "fox"], True, "2 distinct names, .*got 2, of which 1 are distinct"),
            (lambda s: {k: v for k, v in s.items() if k != "0.lambda_d"}, FOX_GNU, False, r"1 keys .* '0\.lam"),
            (lambda s: s | {"1.lambda_d": s["0.lambda_d"]}, FOX_GNU, False, r"such as '1\.lambda_d'"),
            (lambda s: s | {"0.lambda_b": torch.ones(2, 6)}, FOX_GNU, False, r"shape \(2, 5\) .*got \(2, 6\)"),
            (lambda s: s, ["fox", ""], False, "distinct names"),
            (lambda s: s, "fg", False, "got the string 'fg': pass"),
        ],
    )  # fmt: skip
    def test_refuses(self, bank, change, names, replace, message):
        path, adapted, _ = bank
        before = path.read_bytes()
        with pytest.raises(ValueError, match=message):
            append_to_bank(path, change(several(adapted, 2)), names, replace=replace)
        assert path.read_bytes() == before


class TestErrors:
    def test_unknown_names_and_rows(self, bank):
        opened = vf.open_bank(bank[0])
        for name in ("fox", "", N, -1, 2**70):
            with pytest.raises(ValueError, match=r"has no adapter .*\. Its 5 adapters are: ant, bee, cat") as error:
                opened.read(["ant", name])
            assert repr(name) in str(error.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"names": NAMES[:4]}, "5 distinct names, .*got 4, of which 4 are distinct"),
            ({"names": ["a"] * 5}, "got 5, of which 1 are distinct"),
            ({"names": ["a", "b", "c", "d", ""]}, "distinct names"),
            ({"names": [1, 2, 3, 4, 5]}, "got 5, of which 0 are distinct, non-empty strings"),
            ({"frozen": {"vera_A": torch.ones(R, 7)}}, "keys 'vera_A' and 'vera_B'"),
            ({"stacked": {"0.lambda_b": torch.ones(5, 5), "0.lambda_d": torch.ones(5, 9)}}, r"have shape \(5, 4\)"),
            ({"stacked": {"0.lambda_b": torch.ones(5, 5), "0.lambda_d": torch.ones(4, 4)}}, "common leading axis"),
            ({"stacked": {"0.lambda_b": torch.ones(5, 5), "0.mixture": torch.ones(5, 2)}}, "mixture"),
            ({"stacked": {"0.lambda_b": torch.ones(5, 5), "vera_A": torch.ones(5, 2)}}, "vera_A"),
            ({"stacked": {}}, "empty"),
        ],
    )  # fmt: skip
    def test_what_is_not_written(self, change, message, tmp_path):
        adapted = small()
        arguments = {"stacked": several(adapted), "frozen": adapted.frozen, "config": adapted.config, "names": NAMES}
        with pytest.raises(ValueError, match=message):
            vf.save_bank(tmp_path / "bank", **(arguments | change))
        assert not list(tmp_path.iterdir())

    def test_there_is_no_such_file(self, tmp_path):
        for path in (tmp_path / "bank", tmp_path):
            with pytest.raises(FileNotFoundError, match="there is no bank"):
                vf.open_bank(path)
        with pytest.raises(FileNotFoundError):
            append_to_bank(tmp_path / "bank", several(small()), NAMES)

    @pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1, -100])
    def test_truncated_files(self, bank, length):
        path, *_ = bank
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match="is not a complete safetensors file") as error:
            vf.open_bank(path)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        "garbage", [b"PK\x03\x04" + bytes(100), b"\x80\x02" + bytes(100), b"\xff" * 100, bytes(100)]
    )
    def test_garbage(self, bank, garbage):
        path, *_ = bank
        path.write_bytes(garbage)
        with pytest.raises(ValueError, match=r"bank\.safetensors"):
            vf.open_bank(path)

    def test_a_file_that_is_damaged_after_opening(self, bank):
        path, *_ = bank
        opened = vf.open_bank(path)
        path.write_bytes(path.read_bytes()[:-10])
        for read in (opened.read, opened.frozen, lambda: opened.read(["ant", "cat"])):
            with pytest.raises(ValueError, match="is not a complete safetensors file"):
                read()

    # What is changed in the tensors, and in the metadata.
    @pytest.mark.parametrize(
        ("tensors", "metadata", "message"),
        [
            ({}, {"format": "pt"}, "not an adapter bank"),
            ({}, {"format": None}, "not an adapter bank"),
            ({}, {"names": json.dumps(NAMES[:4])}, r"has shape \(5, \d\), but .* size 4, the number of adapter names"),
            ({}, {"names": json.dumps([*NAMES, "fox"])}, "size 6, the number of adapter names"),
            ({}, {"names": json.dumps(["a"] * 5)}, "list of distinct names"),
            ({}, {"names": json.dumps({"a": 1})}, "list of distinct names"),
            ({}, {"names": json.dumps([1, 2, 3, 4, 5])}, "list of distinct names"),
            ({}, {"names": None}, "list of distinct names"),
            ({}, {"names": "[1,"}, "is not JSON"),
            ({}, {"config": "{"}, "is not JSON"),
            ({}, {"config": None}, "must contain a JSON object"),
            ({}, {"config": json.dumps({"peft_type": "LORA"})}, "'LORA'"),
            ({}, {"config": json.dumps({"peft_type": "VERA", "r": 0})}, "r must be positive"),
            ({"0.lambda_d": torch.ones(4, R)}, {}, r"'0\.lambda_d' has shape \(4, 4\), but .* size 5, "),
            ({"0.lambda_d": torch.ones(())}, {}, r"'0\.lambda_d' has shape \(\)"),
            ({"vera_A": None}, {}, "must contain vera_A, vera_B and"),
            ({"0.lambda_b": None, "2.lambda_b": None}, {}, "the lambda_b of at least one layer"),
        ],
    )  # fmt: skip
    def test_an_index_that_disagrees_with_the_data(self, bank, tensors, metadata, message):
        path, *_ = bank
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() | metadata
        tensors = load_file(path) | tensors
        present = lambda values: {key: value for key, value in values.items() if value is not None}
        save_file(present(tensors), path, present(metadata))
        with pytest.raises(ValueError, match=message) as error:
            vf.open_bank(path)
        assert str(path) in str(error.value)


class TestAtomicity:
    @pytest.mark.parametrize("call", ["replace", "fsync"])
    def test_a_crash_leaves_the_old_bank(self, bank, call, monkeypatch):
        path, adapted, stacked = bank
        before = path.read_bytes()

        def dying(*args):
            raise OSError("no space left on device")

        monkeypatch.setattr(os, call, dying)
        with pytest.raises(OSError, match="no space left"):
            append_to_bank(path, several(adapted, 1), ["fox"])
        with pytest.raises(OSError, match="no space left"):
            vf.save_bank(path, several(adapted, 1), adapted.frozen, adapted.config, ["fox"])
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        monkeypatch.undo()
        assert_same(vf.open_bank(path).read(), stacked)

    def test_a_crash_while_writing_leaves_the_old_bank(self, bank, monkeypatch):
        path, adapted, _ = bank
        before = path.read_bytes()

        def dying(tensors, file, metadata):
            file.write_bytes(before[:50])
            raise KeyboardInterrupt

        monkeypatch.setattr("vera_func.io.bank.save_file", dying)
        with pytest.raises(KeyboardInterrupt):
            vf.save_bank(path, several(adapted, 1), adapted.frozen, adapted.config, ["fox"])
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_an_old_bank_is_replaced_as_a_whole(self, bank):
        path, adapted, _ = bank
        vf.save_bank(path, several(adapted, 1), adapted.frozen, adapted.config, ["fox"])
        assert vf.open_bank(path).names == ("fox",)


def write_adapters(folder, model, n=3, **fields):
    """PEFT directories of `n` adapters, and what was written."""
    config = {"r": R, "target_modules": TARGETS["llama"]} | fields
    adapted = vf.adapt(model, vf.VeraConfig(**config))
    frozen = randomized(adapted.frozen, seed=9) if adapted.config.save_projection else adapted.frozen
    written = [randomized(adapted.params, seed, 0.3) for seed in range(n)]
    for i, params in enumerate(written):
        vf.save_adapter(folder / str(i), params, frozen, adapted.config)
    return {NAMES[i]: folder / str(i) for i in range(n)}, written, frozen


class TestDirectories:
    @pytest.mark.parametrize("fields", [{}, {"save_projection": False}, {"modules_to_save": ["lm_head"]}], ids=str)
    def test_import_and_export_are_inverse(self, fields, tmp_path):
        model = llama()
        folders, written, frozen = write_adapters(tmp_path / "in", model, **fields)
        imported = import_adapters(tmp_path / "bank", folders, model)
        assert imported.names == tuple(folders)
        assert_same(imported.read(), vf.stack_adapters(written))
        assert_same(imported.frozen(), frozen)
        exported = export_adapters(imported, tmp_path / "out")
        assert exported == [tmp_path / "out" / name for name in folders]
        for folder, params in zip(exported, written, strict=True):
            loaded = vf.load_adapter(folder, model)
            assert_same(loaded.params, params)
            assert_same(loaded.frozen, frozen)
        again = import_adapters(tmp_path / "again", dict(zip(folders, exported, strict=True)), model)
        assert_same(again.read(), imported.read())
        assert again.config == imported.config

    def test_a_default_adapter_is_at_the_top(self, bank, tmp_path):
        path, adapted, stacked = bank
        append_to_bank(path, several(adapted, 1, first=30), ["default"])
        written = export_adapters(vf.open_bank(path), tmp_path / "out", ["default", "bee", 0])
        assert written == [tmp_path / "out", tmp_path / "out" / "bee", tmp_path / "out" / "ant"]
        assert_same(vf.load_adapter(tmp_path / "out", adapted.apply.model, adapter_name="ant").params, row(stacked, 0))

    @pytest.mark.parametrize("base", ["dense", "nested"])
    def test_an_adapted_bank_is_what_the_directories_hold(self, base, tmp_path):
        model = quantized(llama(), base)
        folders, *_ = write_adapters(tmp_path, model)
        imported = import_adapters(tmp_path / "bank", folders, model)
        apply, stacked, frozen, config = imported.adapted(model)
        assert num_adapters(stacked) == 3
        chosen = imported.adapted(model, ["cat", "ant"])
        for i, (name, folder) in enumerate(folders.items()):
            loaded = vf.load_adapter(folder, model)
            assert loaded.config == config
            expected = loaded.apply(loaded.params, loaded.frozen, input_ids=tokens()).logits
            assert list(stacked) == list(loaded.params)
            assert torch.equal(apply(row(stacked, i), frozen, input_ids=tokens()).logits, expected)
            if name != "bee":
                params = row(chosen.params, ["cat", "ant"].index(name))
                assert torch.equal(chosen.apply(params, chosen.frozen, input_ids=tokens()).logits, expected)
            theirs = peft.PeftModel.from_pretrained(quantized(llama(), base), folder).train()
            assert_close(theirs(input_ids=tokens()).logits.detach(), expected, rtol=1e-5, atol=1e-5)
        mixed = apply(vf.select_adapters(stacked, [2, 0]), frozen, input_ids=tokens()).logits
        assert_close(mixed[0], apply(row(stacked, 2), frozen, input_ids=tokens()).logits[0], rtol=1e-5, atol=1e-5)

    def test_adapted_with_own_parameters_and_dropout(self, tmp_path):
        adapted = small(target_modules=["0"], modules_to_save=["2"], vera_dropout=0.5)
        path = vf.save_bank(tmp_path / "bank", several(adapted), adapted.frozen, adapted.config, NAMES)
        apply, stacked, frozen, _ = vf.open_bank(path).adapted(adapted.apply.model)
        x = torch.randn(N, 7)
        assert list(stacked) == list(adapted.params)
        for i in range(N):
            assert torch.equal(apply(row(stacked, i), frozen, x), adapted.apply(row(stacked, i), adapted.frozen, x))
        assert not torch.equal(apply(stacked, frozen, x)[0], apply(row(stacked, 1), frozen, x)[0])
        dropped = [a.with_dropout(torch.Generator().manual_seed(0))(stacked, frozen, x) for a in (apply, adapted.apply)]
        assert torch.equal(*dropped)

    @pytest.mark.parametrize("options", [{"int8_activations": True}, {"product_dtype": torch.bfloat16}], ids=str)
    def test_multiplies_as_adapt_does(self, options, tmp_path):
        model = quantized(llama(), "int8")
        adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=TARGETS["llama"]), **options)
        stacked = several(adapted, 2)
        opened = vf.open_bank(vf.save_bank(tmp_path / "bank", stacked, adapted.frozen, adapted.config, ["a", "b"]))
        expected = adapted.apply(row(stacked, 1), adapted.frozen, input_ids=tokens()).logits
        for given, same in ((options, True), ({}, False)):
            apply, params, frozen, _ = opened.adapted(model, **given)
            assert torch.equal(apply(row(params, 1), frozen, input_ids=tokens()).logits, expected) is same

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_converts_dtypes_as_load_adapter_does(self, dtype, tmp_path):
        adapted = small(target_modules=["0"], modules_to_save=["2"], use_dora=True)
        model, frozen, config = adapted.apply.model, adapted.frozen, adapted.config
        stacked = several(adapted)
        bank = vf.open_bank(vf.save_bank(tmp_path / "bank", stacked, frozen, config, NAMES)).adapted(model, dtype=dtype)
        vf.save_adapter(tmp_path / "one", row(stacked, 1), frozen, config)
        one = vf.load_adapter(tmp_path / "one", model, dtype=dtype)
        assert_same(row(bank.params, 1), one.params)
        assert_same(bank.frozen, one.frozen)
        assert {value.dtype for value in one.params.values()} == {dtype, torch.promote_types(dtype, torch.float32)} | {
            torch.float32
        }

    @pytest.mark.parametrize(
        ("dtype", "message"),
        [(torch.int8, "dtype must be a floating-point dtype"), (torch.float16, "'0.lambda_b' overflows torch.float16")],
    )
    def test_a_dtype_that_cannot_hold_the_values_raises(self, dtype, message, tmp_path):
        adapted = small()
        stacked = {key: leaf + 1e5 for key, leaf in several(adapted).items()}
        opened = vf.open_bank(vf.save_bank(tmp_path / "bank", stacked, adapted.frozen, adapted.config, NAMES))
        with pytest.raises(ValueError, match=message):
            opened.adapted(adapted.apply.model, dtype=dtype)

    def test_a_bank_of_another_model_raises(self, bank):
        path, *_ = bank
        opened = vf.open_bank(path)
        with pytest.raises(ValueError, match="has params for the layer '2', but the model has no such module"):
            opened.adapted(nn.Sequential(nn.Linear(7, 5)))
        with pytest.raises(ValueError, match=r"bank.safetensors has '2\.lambda_b' of shape \(3,\) .* needs \(4,\)"):
            opened.adapted(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)))
        with pytest.raises(ValueError, match="ReLU"):
            opened.adapted(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.ReLU()))

    def test_what_cannot_be_one_bank_raises(self, tmp_path):
        model = llama()
        folders, *_ = write_adapters(tmp_path, model, 1)
        others = {
            "other projections": ({"projection_prng_key": 1, "save_projection": False}, "other projections"),
            "other targets": ({"target_modules": ["q_proj"]}, "see pool_adapters"),
            "another rank": ({"r": 8}, "other projections|pool_adapters"),
        }
        for name, (fields, message) in others.items():
            more, *_ = write_adapters(tmp_path / name, model, 1, **fields)
            with pytest.raises(ValueError, match=message):
                import_adapters(tmp_path / "bank", {**folders, name: more["ant"]}, model)
        with pytest.raises(ValueError, match="folders is empty"):
            import_adapters(tmp_path / "bank", {}, model)
        with pytest.raises(FileNotFoundError):
            import_adapters(tmp_path / "bank", {**folders, "fox": tmp_path / "fox"}, model)
        assert not (tmp_path / "bank").exists()

    def test_names_that_are_no_folders_raise(self, tmp_path):
        adapted = small()
        names = ["fine", "a/b", "..", "c", "d"]
        path = vf.save_bank(tmp_path / "bank", several(adapted), adapted.frozen, adapted.config, names)
        for name in ("a/b", ".."):
            with pytest.raises(ValueError, match="must be a valid folder name"):
                export_adapters(vf.open_bank(path), tmp_path / "out", [name])
        assert not (tmp_path / "out").exists()


def test_a_bare_layer(tmp_path):
    layer = nn.Linear(7, 5)
    adapted = vf.adapt(layer, vf.VeraConfig(r=R, target_modules=".*"))
    path = vf.save_bank(tmp_path / "bank", several(adapted), adapted.frozen, adapted.config, NAMES)
    apply, stacked, frozen, _ = vf.open_bank(path).adapted(layer)
    assert torch.equal(
        apply(row(stacked, 2), frozen, torch.ones(7)), adapted.apply(row(stacked, 2), frozen, torch.ones(7))
    )
