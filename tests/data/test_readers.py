"""Every way to read rows, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qvera.config.sections import DataSection
from qvera.data.readers import RawRow, read_rows
from qvera.data.source import raw_rows
from qvera.utils.errors import InputError
from tests.data.conftest import Write

ROW = {"prompt": "a", "completion": "b"}


def rows(path: str, **kwargs: str) -> list[RawRow]:
    return list(read_rows(path, **kwargs))


@pytest.mark.skipif(shutil.which("iconv") is None, reason="no iconv here")
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_converted_by_the_command_that_is_advised(
    write: Write, tmp_path: Path, encoding: str
) -> None:
    letter = "é" if encoding == "latin-1" else "5 € for a “café”"
    path = write(f"prompt,completion\n{letter},b\n".encode(encoding), "old.csv")
    with pytest.raises(InputError) as error:
        rows(path)
    command = re.search(r"iconv -f \S+ -t UTF-8 OLD > NEW", str(error.value))
    assert command is not None
    line = command[0].replace("OLD", str(path)).replace("NEW", str(tmp_path / "new.csv"))
    subprocess.run(line, shell=True, check=True)
    assert rows(str(tmp_path / "new.csv"))[0].fields == {"prompt": letter, "completion": "b"}


def test_rows_of_every_kind_of_file_say_where_they_stand(write: Write, tmp_path: Path) -> None:
    path = write('\ufeff{"prompt": "é"}\n\n{"prompt": "\\n"}\n')  # blank lines are counted and skipped
    assert rows(path) == [RawRow({"prompt": "é"}, f"{path}:1"), RawRow({"prompt": "\n"}, f"{path}:3")]
    plain, wrapped = write([ROW, ROW], "plain.json"), write({"version": 1, "data": [ROW]}, "wrapped.json")
    assert rows(plain)[1] == RawRow(ROW, f"{plain} row 2")
    assert [row.fields for row in rows(wrapped)] == [ROW]
    path = write('prompt,completion\n"two\nlines","a, b"\nlast,"say ""x"""\n', "rows.csv")
    assert rows(path) == [  # the line where a record starts
        RawRow({"prompt": "two\nlines", "completion": "a, b"}, f"{path}:2"),
        RawRow({"prompt": "last", "completion": 'say "x"'}, f"{path}:4"),
    ]
    assert rows(write("prompt\tcompletion\na,b\tc\n", "rows.tsv"))[0].fields == {"prompt": "a,b", "completion": "c"}
    assert rows(write("sep=;\nprompt;completion\na;b\n", "excel.csv")) == [RawRow(ROW, f"{tmp_path / 'excel.csv'}:3")]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    pq.write_table(pa.table({"messages": [turns, turns]}), tmp_path / "rows.parquet")
    found = rows(str(tmp_path / "rows.parquet"))
    assert found == [RawRow({"messages": turns}, f"{tmp_path / 'rows.parquet'} row {n}") for n in (1, 2)]
    lines = write(f"{json.dumps(turns)}\n" * 2, "alone.jsonl")  # the list of messages alone
    assert rows(lines) == [RawRow({"messages": turns}, f"{lines}:{n}") for n in (1, 2)]
    assert rows(write([turns], "alone.json"))[0].fields == {"messages": turns}
    said = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    assert rows(write([said], "said.json"))[0].fields == {"conversations": said}


def test_a_csv_without_commas_is_read_by_what_divides_its_header_and_that_is_said_once(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    for mark, word in ((";", "semicolon"), ("\t", "tab"), ("|", "bar")):
        path = write(f'prompt{mark}completion\n"a{mark}b"{mark}1,5\n', f"{word}.csv")
        assert [row.fields for row in (*rows(path), *rows(path))] == [{"prompt": f"a{mark}b", "completion": "1,5"}] * 2
        assert caplog.messages == [f"{path}: columns are separated by a {word}."]
        caplog.clear()
    path = write('prompt,completion\n"a, b",c\n', "commas.tsv")
    assert rows(path)[0].fields == {"prompt": "a, b", "completion": "c"}
    assert caplog.messages == [f"{path}: columns are separated by a comma."]
    caplog.clear()
    assert rows(write("text\na; b\n", "one.csv"))[0].fields == {"text": "a; b"}
    assert len(rows(write('"a; b, c",d=1; e=2; f=3\ng,h\n', "quoted.csv"))[0].fields) == 2  # no ; ends those quotes
    assert rows(write("prompt,completion\na;b;c,d\n", "commas.csv"))[0].fields == {"prompt": "a;b;c", "completion": "d"}
    assert not caplog.messages


def test_a_row_beyond_the_limit_is_named_and_takes_no_memory(write: Write, tmp_path: Path) -> None:
    good, long = '{"text": "x"}\n', tmp_path / "long.jsonl"
    with long.open("w") as stream:  # a line of 1 GB, of which the disk holds nothing
        stream.write(good + '{"text": "')
        stream.truncate(10**9)
    quote = write('prompt,completion\na,b\n"' + f"{'not closed ' * 100}\n" * 5_000, "quote.csv")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b"\n" + b"x" * 3_000_000 + b"\xe9" + b"x" * 50_000_000)
    tracemalloc.start()
    try:
        for path, line in ((str(long), 2), (quote, r"\d+")):
            with pytest.raises(InputError, match=f"{path}:{line}: the row has more than 4,194,304 characters"):
                rows(path)
        with pytest.raises(InputError, match=r"latin\.jsonl:2: not UTF-8 text \(byte 0xe9\)"):
            rows(str(latin))
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()
    section = DataSection(path=write(good * 3 + "x" * 50 + "\n", "short.jsonl"), max_row_characters=len(good))
    with pytest.raises(
        InputError, match=r"short\.jsonl:4: the row has more than 14 characters.*data\.max_row_characters"
    ):
        list(raw_rows(section))


def test_a_directory_is_read_in_name_order_and_holds_one_split(write: Write, tmp_path: Path) -> None:
    write("not data", "README.md")
    write([{"text": "b"}], "train.jsonl")
    write([{"text": "a"}], "test.json")
    with pytest.raises(InputError, match="different splits .*train.jsonl and test.json"):
        rows(str(tmp_path))
    (tmp_path / "train.jsonl").rename(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="different splits .*rows.jsonl and test.json"):
        rows(str(tmp_path))
    shard = write([{"text": "c"}], "rows-00001-of-00002.jsonl")
    with pytest.raises(InputError, match="Put each split into a directory of its own"):  # no file is all of a split
        rows(str(tmp_path))
    Path(shard).unlink()
    (tmp_path / "test.json").rename(tmp_path / "contest.json")
    (tmp_path / "rows.jsonl").rename(tmp_path / "train.jsonl")
    assert [row.fields["text"] for row in rows(str(tmp_path))] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not valid JSON: Expecting value at column 9"),
        ("a.jsonl", '{"text": "x"}\n["x"]\n', r"a\.jsonl:2: expected one JSON object on the line.*got a list"),
        ("a.jsonl", '[\n{"text": "x"}\n]\n', r"a\.jsonl:1: .*looks like plain JSON. Rename it to \.json"),
        ("a.jsonl", '{\n"text": "x"\n}\n', r"a\.jsonl:1: .*not on one line.* jq -c"),
        ("a.json", '{\n"a": "b"\n}\n{"a": "c"}\n', r"a\.json:4: more than one JSON value.* each object on one line"),
        ("a.jsonl", "\n\n", r"a\.jsonl: holds no rows"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "caf\xe9"}\n',
            r"a\.jsonl:2: not UTF-8 text \(byte 0xe9\).*-f WINDOWS-1252",
        ),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), r"a\.jsonl:1: not UTF-8 .*UTF-16"),
        ("a.csv", "prompt,completion\na,b\na\0,b\n", r"a\.csv:3: holds a NUL byte.*iconv -f UTF-16LE"),
        ("a.jsonl", '{"text": ' + "[" * 100_000 + "\n", r"a\.jsonl:1: not valid JSON"),
        ("a.jsonl", '{"n": ' + "7" * 5000 + "}\n", r"a\.jsonl:1: not valid JSON: a whole number of more than 4,300"),
        ("a.json", '[{"n": ' + "7" * 5000 + "}]", r"a\.json: not valid JSON: a whole number of more than 4,300 digits"),
        ("a.json", "", r"a\.json: the file is empty"),
        ("a.json", "[]", r"a\.json: holds no rows"),
        ("a.json", '[{"a": 1},\n{"a": }]', r"a\.json:2: not valid JSON: Expecting value at column 7"),
        ("a.json", '{"a": "b"}\n{"a": "c"}\n', r"a\.json:2: more than one JSON value.*Rename it to \.jsonl"),
        ("a.json", '{"a": 1, "b": 2}', r"a\.json: expected a JSON list of objects, got one object with the keys a, b"),
        (
            "a.json",
            '{"a": {"0": "x"}, "b": {"0": "y"}}',
            r"with the keys a, b\. .* to_json\(.*orient=\"records\", lines=T",
        ),
        ("a.json", '"text"', r"a\.json: expected a JSON list of objects, got a string"),
        ("a.json", '[{"a": 1}, null]', r"a\.json row 2: expected an object with named fields, got null"),
        ("a.csv", "prompt,completion\n", r"a\.csv: holds no rows"),
        ("a.csv", "prompt,completion\na,b\nc\n", r"a\.csv:3: 1 fields where the header has 2 \(prompt, completion\)"),
        ("a.csv", "prompt,prompt\na,b\n", r"a\.csv:1: the column 'prompt' occurs twice"),
        ("a.csv", "prompt,\na,b\n", r"a\.csv:1: a column of the header has no name.*to_csv\(index=False\)"),
        ("a.csv", "prompt;completion\na;b\nc\n", r"a\.csv:3: 1 fields where the header has 2 .* that hold a semicolon"),
        ("a.csv", 'prompt,completion\na,b\n"c,d\n', r"a\.csv:3: not valid CSV"),
        ("a.csv", "a,b\n1,2\na,b\n3,4\n", r"a\.csv:3: is the header again, as where files were joined\. Remove it\.$"),
        ("a.jsonl", '["a", "b"]\n["c", "d"]\n', r"a\.jsonl:1: expected one JSON object on the line.* got a list\.$"),
        ("a.jsonl", '[{"a": "b"}]\n[{"a": "c"}]\n', r"a\.jsonl:1: .* got a list\.$"),
        ("a.jsonl", '[{"a": "b"}]\n', r"a\.jsonl:1: .* got a list\. The file is one JSON list: rename it to \.json\.$"),
        ("a.jsonl", r'"{\"a\": 1}"', r"a\.jsonl:1: .* got a string .*It is JSON in a JSON text: parse it twice\.$"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\0", r"a\.jsonl\.gz: is compressed\. Unpack it: gunzip\.$"),
        ("a.csv", b"prompt,completion\na,caf\xe9\n", r"a\.csv:2: not UTF-8"),
        ("a.parquet", "PAR1 but not really", r"a\.parquet: can't be read as Parquet"),
        ("a.jsonl", '{"a": 1}\n{"b": {"c": 1, "c": 2}}\n', r"a\.jsonl:2: the key 'c' occurs twice in one object"),
        ("a.json", '[{"a": 1}, {"a": 1, "a": 2}]', r"a\.json row 2: the key 'a' occurs twice in one object"),
        ("a.json", '[{"a": {"b": 1, "b": 2}}]', r"a\.json: the key 'b' occurs twice in one object"),
        ("a.csv", b"PK\x03\x04\x14\0\x06\0\x90", r"a\.csv: is a zip, such as an Excel workbook\. Save it as CSV\.$"),
        ("a.csv", "PKW,km\n1\n", r"a\.csv:2: 1 fields where the header has 2"),
        (
            "a.parquet",
            "version https://git-lfs.github.com/spec/v1\n",
            r"a\.parquet: is a pointer of Git LFS.* git lfs pull",
        ),
        ("a.xlsx", "x", r"a\.xlsx: can't read a file that ends in '\.xlsx'. Expected \.jsonl"),
        ("a", "x", r"a: can't read a file that ends in 'nothing'"),
    ],
)
def test_bad_file(write: Write, name: str, content: str | bytes, message: str) -> None:
    path = write(content, name)
    with pytest.raises(InputError, match=message) as failure:
        rows(path)
    assert "\n" not in str(failure.value)


def test_what_datasets_saved_is_not_read_as_its_list_of_columns(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list([ROW])
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits"):
        with pytest.raises(
            InputError, match=r"was written by save_to_disk of datasets.* its to_parquet\('rows\.parquet"
        ):
            rows(str(tmp_path / name))
    with pytest.raises(InputError, match=r"\.arrow: is Arrow\. Convert it: datasets\.Dataset\.from_file\(NAME"):
        rows(str(next((tmp_path / "one").glob("*.arrow"))))


def test_missing_file_names_the_nearest(write: Write, tmp_path: Path) -> None:
    write([ROW], "train.jsonl")
    with pytest.raises(InputError, match=re.escape(f"Did you mean {tmp_path / 'train.jsonl'}?")):
        rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(InputError, match="no directory"):
        rows(str(tmp_path / "nowhere" / "train.jsonl"))
    with pytest.raises(InputError, match=r"data.path: 'data\\rows.csv' holds a line end.* use single quotes"):
        rows("data\rows.csv")
    with pytest.raises(InputError, match=r"Variables such as \$HOME are not filled in"):
        rows("$HOME/train.jsonl")
    with pytest.raises(InputError, match="Addresses are not read: download the file"):
        rows("https://example.org/train.jsonl")
    with pytest.raises(InputError, match="Patterns are not filled in: name a directory"):
        rows(str(tmp_path / "tr*.jsonl"))
    with pytest.raises(
        InputError, match=r"~no-such-user/train\.jsonl: no such file, and no directory ~no-such-user either"
    ):
        rows("~no-such-user/train.jsonl")  # no such user
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no data files in this directory .it is empty"):
        rows(str(tmp_path / "empty"))


def test_a_pipe_and_a_link_that_leads_nowhere_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=r"rows\.jsonl: is a pipe or a device, .* Save them to a file"):
        rows(str(tmp_path / "rows.jsonl"))
    for name, target in (("loop.jsonl", "loop.jsonl"), ("link.jsonl", "gone.jsonl")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(InputError, match=rf"{name}: is a link to {target}, and no file can be reached"):
            rows(str(tmp_path / name))


def test_a_hub_dataset_gets_every_key_and_its_failure_is_one_paragraph(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Mock(return_value=datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]))
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("qvera.data.readers.leave_silent_hub", lambda name: None)  # it answers
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = rows("owner/name", split="validation", config_name="en", revision="v1")
    load.assert_called_once_with("owner/name", name="en", split="validation", revision="v1")
    assert found == [RawRow({"text": t}, f"owner/name[validation] row {n}") for n, t in ((1, "one"), (2, "two"))]
    load.side_effect = ConnectionError("Couldn't reach\nthe hub")
    with pytest.raises(InputError, match=r"owner/name: no file or .*Couldn't reach the hub\. .*Look at the network"):
        rows("owner/name")
    with pytest.raises(InputError, match=r"data\.revision: 'main' has a meaning for hub datasets only"):
        rows(write([ROW]), revision="main")
