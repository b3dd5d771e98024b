import csv
import io
import json
import re
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data import sources

NO_FIXTURE_CHECK = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=20)
json_items = st.lists(
    st.dictionaries(texts, texts | st.integers() | st.none() | st.lists(texts)), min_size=1, max_size=6
)


def write(folder, content, *, name="data.jsonl", encoding="utf-8"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return str(path)


def values(items):
    return [item.values for item in items]


# Law: what was written is what is read, in order, with the line where it starts.


@NO_FIXTURE_CHECK
@given(json_items, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_json_lines_give_back_what_was_written(tmp_path, items, line_end, escape):
    path = write(tmp_path, line_end.join(json.dumps(item, ensure_ascii=escape) for item in items))
    read = sources.json_lines(path=path)
    assert values(read) == items
    assert [item.line for item in read] == list(range(1, len(items) + 1))


@NO_FIXTURE_CHECK
@given(json_items, st.sampled_from([None, 1, 4]), st.booleans())
def test_json_list_gives_back_what_was_written_and_where(tmp_path, items, indent, escape):
    text = json.dumps(items, ensure_ascii=escape, indent=indent)
    read = sources.json_list(path=write(tmp_path, text))
    assert values(read) == items
    lines = text.split("\n")
    assert all("{" in lines[item.line - 1] for item in read)
    assert [item.line for item in read] == sorted(item.line for item in read)


@NO_FIXTURE_CHECK
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_csv_gives_back_what_was_written(tmp_path, rows, line_end):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator=line_end)
    writer.writerows([("ask", "answer"), *rows])
    read = sources.csv(path=write(tmp_path, buffer.getvalue()))
    assert values(read) == [{"ask": ask, "answer": answer} for ask, answer in rows]
    starts = [1 + buffer.getvalue()[:m].count("\n") for m in _row_starts(rows, line_end)]
    assert [item.line for item in read] == starts


def _row_starts(rows, line_end):
    quoted = [[value.replace('"', '""') for value in row] for row in [("ask", "answer"), *rows]]
    position, starts = 0, []
    for row in quoted:
        starts.append(position)
        position += len(f'"{row[0]}","{row[1]}"') + len(line_end)
    return starts[1:]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"], ids=["U+2028", "U+2029", "U+0085"])
def test_unicode_line_separators_inside_a_json_string_do_not_end_the_line(tmp_path, separator):
    path = write(tmp_path, json.dumps({"a": f"x{separator}y"}, ensure_ascii=False) + "\n" + '{"a": "z"}\n')
    assert [(item.line, item.values["a"]) for item in sources.json_lines(path=path)] == [
        (1, f"x{separator}y"),
        (2, "z"),
    ]


def test_blank_lines_are_passed_over_and_counted_as_lines(tmp_path):
    path = write(tmp_path, '\n{"a": "1"}\n\n  \n{"a": "2"}\n\n')
    assert [item.line for item in sources.json_lines(path=path)] == [2, 5]
    path = write(tmp_path, 'a,b\n\n1,2\n"x\ny",3\n\n4,5\n', name="data.csv")
    assert [item.line for item in sources.csv(path=path)] == [3, 4, 7]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "big5"])
def test_every_encoding_is_read_when_named_and_a_byte_order_mark_is_dropped(tmp_path, encoding):
    path = write(tmp_path, json.dumps({"a": "病人咳嗽"}, ensure_ascii=False), encoding=encoding)
    named = "utf-8" if encoding == "utf-8-sig" else encoding
    assert values(sources.json_lines(path=path, encoding=named)) == [{"a": "病人咳嗽"}]


def test_a_short_gbk_word_that_is_valid_utf8_is_not_mistaken(tmp_path):
    path = write(tmp_path, "a\n联通\n", encoding="gbk", name="data.csv")
    assert values(sources.csv(path=path, encoding="gb18030")) == [{"a": "联通"}]


# What is wrong is named by file and line.

GOOD = '{"a": "1"}\n'
READERS = {"json_lines": sources.json_lines, "json_list": sources.json_list, "csv": sources.csv}


@pytest.mark.parametrize(
    ("reader", "content", "line", "message"),
    [
        pytest.param("json_lines", GOOD + '{"a": "2', 2, "invalid or truncated JSON", id="lines-truncated"),
        pytest.param("json_lines", GOOD + "[1]\n", 2, "expected a JSON object, found list", id="lines-list-item"),
        pytest.param("json_lines", GOOD + "null\n", 2, "found NoneType", id="lines-null-item"),
        pytest.param("json_lines", '"x"\n', 1, "found str", id="lines-text-item"),
        pytest.param("json_lines", GOOD * 2 + '{"a": 1, "a": 2}', 3, "key 'a' stands twice", id="lines-key-twice"),
        pytest.param("json_lines", GOOD + '{"a":' * 200_000, 2, "nested too deeply", id="lines-deep"),
        pytest.param("json_lines", GOOD + '{"a": ' + "9" * 5000 + "}", 2, "digits", id="lines-endless-number"),
        pytest.param("json_lines", GOOD + '{"a": "x\0"}', 2, "NUL bytes", id="lines-nul"),
        pytest.param("json_list", '[{"a": "1"},\n{"a": "2', 2, "invalid or truncated JSON", id="list-truncated"),
        pytest.param("json_list", '[{"a": "1"},\n{"a": "2"}', 2, "not closed", id="list-not-closed"),
        pytest.param("json_list", '[{"a": "1"}\n{"a": "2"}]', 2, "expected ',' or ']'", id="list-no-comma"),
        pytest.param("json_list", '[{"a": "1"},\n]', 2, "invalid or truncated JSON", id="list-trailing-comma"),
        pytest.param("json_list", '[{"a": "1"}]\n{}', 2, "more text after the end", id="list-more-text"),
        pytest.param("json_list", '[{"a": "1"},\n3]', 2, "expected a JSON object, found int", id="list-number-item"),
        pytest.param("json_list", '[{"a": "1"},\n' + "[" * 200_000, 2, "nested too deeply", id="list-deep"),
        pytest.param("csv", "a,b\n1,2\n3\n", 3, "1 values for 2 columns: a, b", id="csv-truncated"),
        pytest.param("csv", "a,b\n1,2\n3,4,5\n", 3, "3 values for 2 columns", id="csv-too-many"),
        pytest.param("csv", 'a,b\n1,2\n"3,4\n5,6\n', 3, "quotation mark", id="csv-quote-not-closed"),
        pytest.param("csv", "a,a\n1,2\n", 1, "columns named twice: a", id="csv-column-twice"),
        pytest.param("csv", "a,b\n1,2\n3,\0\n", 3, "NUL bytes", id="csv-nul"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, reader, content, line, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=rf"(?s){re.escape(path)}:{line}: .*{re.escape(message)}"):
        READERS[reader](path=path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"], ids=["nothing", "blank", "mark-only"])
def test_an_empty_file_is_refused(tmp_path, reader, content):
    with pytest.raises(ValueError, match="is empty"):
        READERS[reader](path=write(tmp_path, content))


def test_a_file_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty list"):
        sources.json_list(path=write(tmp_path, "[ ]"))
    with pytest.raises(ValueError, match="no rows"):
        sources.csv(path=write(tmp_path, "ask,answer\n"))


def test_the_other_json_format_is_recognised(tmp_path):
    with pytest.raises(ValueError, match=r"_target_=finetune\.data\.sources\.json_list"):
        sources.json_lines(path=write(tmp_path, '[{"a": "1"}]'))
    with pytest.raises(ValueError, match=r"_target_=finetune\.data\.sources\.json_lines"):
        sources.json_list(path=write(tmp_path, GOOD * 2))


def test_twenty_problems_are_listed_with_the_total(tmp_path):
    with pytest.raises(ValueError, match=r"^30 problems:") as caught:
        sources.json_lines(path=write(tmp_path, "{\n" * 30))
    lines = str(caught.value).splitlines()
    assert [f":{number}:" in line for number, line in enumerate(lines[1:21], start=1)] == [True] * 20
    assert lines[21:] == ["and 10 more"]


# A configuration can call the readers and nothing else.


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "pathlib.Path.unlink",
        "finetune.data.sources.Path",
        "finetune.data.sources.json.loads",
        "finetune.data.sources.importlib.import_module",
        "finetune.data.sources._decoder",
        "finetune.data.sources._reader",
        "finetune.data.rows.refuse",
        "finetune.data.nothing.read",
        "finetune.data.sources.",
        "finetune.report.main",
        "",
        None,
    ],
)
def test_only_public_functions_of_the_data_package_are_called(target):
    with pytest.raises(ValueError, match="is not a reader"):
        sources.read({"_target_": target, "path": "x"})


def test_a_wrong_reader_or_keyword_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"did you mean 'finetune\.data\.sources\.json_lines'"):
        sources.read({"_target_": "finetune.data.sources.jsonlines", "path": "x"})
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'pth'|missing a required argument: 'path'"):
        sources.read({"_target_": "finetune.data.sources.csv", "pth": "x"})
    with pytest.raises(ValueError, match=r"task\.source\.encoding is null"):
        sources.read({"_target_": "finetune.data.sources.csv", "path": "x", "encoding": None})


@NO_FIXTURE_CHECK
@given(st.binary(max_size=60) | st.text(string.printable, max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path, raw):
    path = write(tmp_path, raw)
    for reader in READERS.values():
        for encoding in ("utf-8", "gb18030", "utf-16"):
            try:
                assert reader(path=path, encoding=encoding)
            except ValueError as error:
                assert path in str(error)  # noqa: PT017
