"""Data files that cannot be used: `hostile(folder)` writes them, each with what its error must say."""

import gzip
import json
import os
from typing import NamedTuple

import pyarrow
import pyarrow.parquet


USER, ASSISTANT = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
GOOD = {
    "text": {"text": "a film"},
    "label": {"text": "a film", "label": "good"},
    "completion": {"prompt": "1 + 1 =", "completion": " 2"},
    "chat": {"messages": [USER, ASSISTANT]},
    "preference": {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"},
}
CHATS = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "3"}]}
MISSING = object()


class Hostile(NamedTuple):
    """A data set, and parts of the error: the place of the bad row, and what is wrong or right."""

    path: str
    place: str
    said: str


def jsonl(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def with_bad(kind, bad, place=3, of=5):
    """Rows of a kind, distinct but for the one at `place`, counted from 1."""
    rows = [numbered(GOOD[kind], i) for i in range(of)]
    return [*rows[: place - 1], bad, *rows[place:]]


def numbered(row, i):
    if "label" in row:
        return row | {"text": f"film {i}", "label": ("good", "bad")[i % 2]}
    return {k: v if isinstance(v, list) else f"{v} {i}" for k, v in row.items()}


def hostile(folder):
    """Write the files, and return a dict `name -> Hostile`."""
    found = {}

    def add(name, content, place, said):
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        assert name not in found
        found[name] = Hostile(str(path), place, said)

    _bad_values(add)
    _bad_messages(add)
    _bad_json(add)
    _bad_csv(add)
    _bad_bytes(add)
    _bad_sets(add, folder, found)
    _bad_parquet(folder, found)
    return found


def _bad_values(add):
    values = {
        "missing": MISSING, "null": None, "empty": "", "blank": " \n", "number": 5, "list": ["a"], "object": {"a": 1},
        "true": True, "nul": "a\0b", "surrogate": "a\ud800",
    }  # fmt: skip
    for kind, good in GOOD.items():
        for column in good:
            if kind == "label" and column == "text":
                continue  # as for the kind text
            for what, value in values.items():
                bad = {k: v for k, v in good.items() if k != column}
                if value is not MISSING:
                    bad[column] = value
                if (kind == "chat" and what in ("blank", "nul", "surrogate")) or (kind == "label" and what == "true"):
                    continue
                if kind == "preference" and column == "rejected" and what not in ("missing", "number"):
                    continue
                # A prompt may be a list of messages, and then the others have to be.
                add(f"{kind}-{column}-{what}.jsonl", jsonl(with_bad(kind, bad)), "line 3", f"'{column}'")
    add("equal.jsonl", jsonl(with_bad("preference", GOOD["preference"] | {"rejected": " 2"})), "line 3", "must differ")
    chats = [CHATS, CHATS, CHATS | {"rejected": CHATS["chosen"]}]
    add("equal-messages.jsonl", jsonl(chats), "line 3", "must differ")
    add("text-among-messages.jsonl", jsonl([CHATS, GOOD["preference"]]), "line 2", "in the first row")
    add("text-prompt.jsonl", jsonl([CHATS, CHATS | {"prompt": "1 + 1 ="}]), "line 2", "'chosen'")
    add("number-among-labels.jsonl", jsonl(with_bad("label", {"text": "a", "label": 3})), "line 3", "'label'")
    add("label-nan.jsonl", '{"text": "a", "label": NaN}\n', "line 1", "'label'")
    for kind, other in (("text", "chat"), ("chat", "completion"), ("completion", "preference"), ("text", "label")):
        add(f"{kind}-then-{other}.jsonl", jsonl(with_bad(kind, GOOD[other])), "line 3", "separate data set")
    add("unpaired.jsonl", jsonl([GOOD["completion"] | {"label": True}]), "line 1", "unpaired")
    add("no-prompt.jsonl", jsonl([{"chosen": "a", "rejected": "b"}]), "line 1", "prompt, chosen, rejected")
    add("no-kind.jsonl", jsonl([{"review": "a", "stars": 3}]), "line 1", "text, label")


def _bad_messages(add):
    bad = {
        "role": ([{"role": "wizard", "content": "a"}, ASSISTANT], "message 1: the role must be"),
        "no-role": ([USER, {"content": "a"}], "message 2: the role must be"),
        "sharegpt": ([{"from": "human", "value": "a"}], "message 1: the role must be"),
        "no-content": ([USER, {"role": "assistant"}], "message 2: 'content'"),
        "parts": ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "message 2: 'content'"),
        "blank": ([USER, {"role": "assistant", "content": " "}], "message 2: 'content'"),
        "nul": ([USER, {"role": "assistant", "content": "a\0"}], "message 2: 'content' contains a NUL"),
        "string": (["hello"], "message 1 must be an object"),
        "none": ([None], "message 1 must be an object"),
        "unanswered": ([USER], "no message of the assistant"),
        "no-messages": ([], "must be a list of messages"),
        "one-object": (USER, "must be a list of messages"),
        "nested": ([[USER, ASSISTANT]], "message 1 must be an object"),
        "tool-calls": ([USER, {"role": "assistant", "content": None, "tool_calls": [{}]}], "message 2: 'content'"),
        "tool-answers": ([USER, {"role": "tool", "content": "4"}], "no message of the assistant"),
        "function": ([USER, {"role": "function", "content": "4"}, ASSISTANT], "message 2: the role must be"),
        "system": ([{"role": "system", "content": "Be kind."}], "no message of the assistant"),
    }
    for name, (messages, said) in bad.items():
        add(f"messages-{name}.jsonl", jsonl(with_bad("chat", {"messages": messages})), "line 3", said)
    add("messages.csv", 'messages\n"[{""role"": ""user""}]"\n', "line 2", "use JSON Lines")


def _bad_json(add):
    for name, line in {
        "cut": '{"text": "a", "te', "trailing-comma": '{"text": "a",}', "single-quotes": "{'text': 'a'}",
        "unquoted": "{text: 1}", "array": '["a", "b"]', "string": '"a"', "number": "5", "deep": "[" * 100_000,
        "two": '{"text": "a"} {"text": "b"}', "key-twice": '{"text": "a", "text": "b"}', "escape": '{"text": "\\x"}',
        "control": '{"text": "a\tb"}', "digits": '{"text": ' + "9" * 5000 + "}",
    }.items():  # fmt: skip
        add(f"json-{name}.jsonl", jsonl(with_bad("text", line)), "line 3", "")
    add("row-900.jsonl", jsonl(with_bad("text", '{"text": "a"', 900, 1000)), "line 900", "is not JSON")
    add("row-900-role.jsonl", jsonl(with_bad("chat", {"messages": [USER]}, 900, 1000)), "line 900", "assistant")
    add("array.json", json.dumps([GOOD["text"]] * 3), "line 1", "an object")
    add("pretty.json", json.dumps([GOOD["text"]], indent=2), "line 1", "not an array")
    add("pretty-object.json", json.dumps(GOOD["text"], indent=2), "line 1", "an object in one line")
    add("joined.jsonl", jsonl([GOOD["text"]] * 2) + "\ufeff" + jsonl([GOOD["text"]]), "line 3", "BOM")
    add("line-ends.jsonl", '{"text": "a"}\r\n{"text": "b"}\r{"text": }\n', "line 3", "at column 10")


def _bad_csv(add):
    header, rows = "text,label\n", "".join(f"film {i},{'ab'[i % 2]}\n" for i in range(3))
    for name, line, said in (
        ("few-fields", "film\n", "'label' is missing"),
        ("many-fields", "a, film,good\n", "more fields"),
        ("trailing-comma", "film,good,\n", "more fields"),
        ("no-label", "film,\n", "'label'"),
        ("no-text", ",good\n", "'text'"),
        ("quote-inside", '"a"b,good\n', ""),
        ("nested-quotes", '"he said "no" twice",good\n', ""),
        ("nul", "fi\0lm,good\n", "NUL"),
    ):
        add(f"csv-{name}.csv", header + rows + line + rows, "line 5", said)
    add("open-quote.csv", header + rows + '"film,good\n' + rows, "line ", "")
    add("columns.csv", "review,stars\nfilm,3\n", "line 1", "['review', 'stars']")
    add("semicolons.csv", "text;label\nfilm;good\n", "line 1", "['text;label']")
    add("no-header.csv", "A fine film.,good\nA dull film.,bad\n", "line 1", "the columns must include")
    add("column-twice.csv", "text,label,text\na,b,c\n", "line 1", "'text' twice")
    add("capitals.csv", "Text,Label\na,b\n", "line 1", "['Text', 'Label']")
    for name, column in (("capital", "Label"), ("space", " label"), ("plural", "labels"), ("chats", "MESSAGES")):
        add(f"column-{name}.csv", f"text,{column}\na,b\n", "line 1", f"the column {column!r} would be ignored")
        add(f"column-{name}.jsonl", jsonl([{"text": "a", column: "b"}]), "line 1", f"{column!r} would be ignored")
    add("line-ends.csv", "text,label\rfilm,good\rfilm\r", "line 3", "'label' is missing")
    add("nan.csv", "text,label\nNaN,NaN\nfilm,\n", "line 3", "'label'")
    for name, content in (("header-only", header), ("empty", ""), ("spaces", "\n\n")):
        add(f"{name}.csv", content, "line ", "")
    for name, content in (("empty", ""), ("spaces", "\n \n")):
        add(f"{name}.jsonl", content, "line 1", "no rows")
    add("pairs.csv", "prompt,chosen,rejected\na,b,b\n", "line 2", "must differ")
    add("completions.csv", "prompt,completion\na,b\na,\n", "line 3", "'completion'")
    add("rows-900.csv", "text\n" + "film\n" * 898 + '""\n' + "film\n" * 50, "line 900", "'text'")


def _bad_bytes(add):
    text = jsonl([{"text": "schön"}] * 3).replace("\\u00f6", "ö")
    for encoding, place in (("utf-16", 1), ("utf-16-le", 1), ("utf-16-be", 1), ("latin-1", 1), ("utf-32", 1)):
        add(f"{encoding}.jsonl", text.encode(encoding), f"line {place}", "UTF-8")
        add(f"{encoding}.csv", f"text,label\n{'schön,good' * 1}\n".encode(encoding), "line ", "UTF-8")
    add("cp1252.csv", b"text,label\nfilm,good\n\x93film\x94,bad\n", "line 3", "UTF-8")
    add("late.jsonl", jsonl([GOOD["text"]] * 900).encode() + b'{"text": "\xff"}\n', "line 901", "UTF-8")
    add("zeros.jsonl", bytes(100), "line 1", "NUL")
    add("gzip.csv", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\xff", "line 1", "UTF-8")
    add("gzip.jsonl", gzip.compress(jsonl([GOOD["text"]] * 9).encode()), "line 1", "gzip: unpack")
    add("sheet.csv", b"PK\x03\x04" + bytes(range(256)), "line 1", "save the table as CSV")
    add("parquet.csv", b"PAR1" + bytes(range(128, 256)), "line 1", "end the name of the file in .parquet")
    long = "a film " * 1_500_000  # 10 MB
    add("long.jsonl", jsonl(with_bad("text", {"text": long})), "line 3", "split the line into rows")
    add("long.csv", f"text\nfilm\n{long}\n", "line 3", "split the line into rows")
    quoted = '"' + "a film\n" * 1_500_000 + '"'
    add("long-quoted.csv", f"text\nfilm\n{quoted}\n", "line ", "field larger than field limit")


def _bad_sets(add, folder, found):
    def place(name, path, where, said):
        found[name] = Hostile(str(path), where, said)

    (folder / "nothing").mkdir()
    (folder / "nothing" / "README.md").write_text("no data")
    place("folder without data", folder / "nothing", "nothing", "no file ends in .csv")
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.jsonl").write_text(jsonl([GOOD["text"]]))
    (folder / "mixed" / "b.csv").write_text("prompt,completion\na,b\n")
    place("folder of two kinds", folder / "mixed", "b.csv, line 1", "separate data set")
    place("glob of two kinds", folder / "mixed" / "*", "b.csv, line 1", "separate data set")
    (folder / "folder.jsonl").mkdir()
    place("folder with a suffix", folder / "folder.jsonl", "folder.jsonl", "no file ends in .csv")
    place("glob of folders", folder / "fold*", "fold*", "there is no file")
    os.mkfifo(folder / "pipe.jsonl")  # would block whoever opens it
    place("pipe", folder / "pipe.jsonl", "pipe.jsonl", "write the rows to a file")
    place("link to itself", folder / "loop.jsonl", "loop.jsonl", "there is no file")
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    found["empty name"] = Hostile("", "", "the name of the data is empty")
    place("no such file", folder / "gone.jsonl", "gone.jsonl", "there is no file")
    place("no match", folder / "gone*.jsonl", "gone*.jsonl", "there is no file")
    add("notes.txt", "film\n", "notes.txt", ".csv or .jsonl")
    add("table.tsv", "text\tlabel\nfilm\tgood\n", "table.tsv", ".csv or .jsonl")
    add("data.pkl", b"\x80\x04K\x01.", "data.pkl", ".csv or .jsonl")


def _bad_parquet(folder, found):
    def add(name, table, place, said):
        path = folder / f"{name}.parquet"
        if isinstance(table, bytes):
            path.write_bytes(table)
        else:
            pyarrow.parquet.write_table(pyarrow.table(table), path)
        found[f"{name}.parquet"] = Hostile(str(path), place, said)

    add("numbers", {"text": [1, 2]}, "row 1", "'text'")
    add("null", {"text": ["a", None, "b"]}, "row 2", "'text'")
    add("bytes", {"text": [b"a"]}, "row 1", "'text'")
    add("no-kind", {"review": ["a"]}, "row 1", "['review']")
    add("no-rows", {"text": pyarrow.array([], pyarrow.string())}, "no-rows.parquet", "no rows")
    add("dates", {"text": ["a"], "label": pyarrow.array([1], pyarrow.date32())}, "row 1", "'label'")
    add("nan", {"text": ["a", "b"], "label": [1.0, float("nan")]}, "row 2", "'label'")
    add("written-out", {"messages": [json.dumps([USER, ASSISTANT])]}, "row 1", "write a list")
    add("zip", b"PK\x03\x04" + bytes(40), "row 1", "not a complete Parquet file")
    add("damaged", b"PAR1" + bytes(20), "row 1", "not a complete Parquet file")
    add("role", {"messages": [[USER, ASSISTANT], [{"role": "wizard", "content": "a"}]]}, "row 2", "the role must be")
