"""Models and the notes beside adapters."""

import pytest

from vera_func.data.models import Note, note_file, read_note, write_note


def test_notes(tmp_path):
    folder, bank = tmp_path, tmp_path / "all.safetensors"
    assert note_file(folder) == folder / "vera_func.json"
    assert read_note(folder) == read_note(bank) == Note()
    for path in (folder, bank):
        write_note(path, Note("int8", ["a", "b"], "{text}: "))
        assert read_note(path) == Note("int8", ["a", "b"], "{text}: ")
    for damaged in ("{", "[]", '{"labels": "ab"}', '{"quant": 4}'):
        note_file(bank).write_text(damaged)
        with pytest.raises(ValueError, match=r"all\.json"):
            read_note(bank)
