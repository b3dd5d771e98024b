import pytest

from finetune.data import sources

CHINESE = "患者，男，45岁，反复咳嗽三天。"
READERS = {"json_lines": sources.json_lines, "json_list": sources.json_list, "csv": sources.csv}


def write(folder, content, *, name="data.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return str(path)


@pytest.mark.parametrize(
    ("written", "named", "message"),
    [
        pytest.param("gb18030", "utf-8", r":2: not utf-8 .*looks like GB18030: task\.source\.encoding=gb18030", id="gb18030-as-utf8"),
        pytest.param("utf-16", "utf-8", "looks like UTF-16: task.source.encoding=utf-16", id="utf16-as-utf8"),
        pytest.param("utf-8", "ascii", "looks like UTF-8: task.source.encoding=utf-8", id="utf8-as-ascii"),
        pytest.param("utf-8", "latin-1", "is UTF-8, not latin-1: task.source.encoding=utf-8", id="utf8-as-latin1"),
        pytest.param("utf-8", "gb18030", "task.source.encoding=utf-8", id="utf8-as-gb18030"),
        pytest.param("utf-8", "gb1803", "gb1803 is unknown; did you mean 'gb18030'", id="typing-error"),
        pytest.param("utf-8", "rot13", "rot13 is unknown", id="not-a-text-encoding"),
    ],
)  # fmt: skip
def test_a_wrong_encoding_names_the_likely_one(tmp_path, written, named, message):
    path = write(tmp_path, "ask\n" + f"{CHINESE}\n" * 4, encoding=written, name="data.csv")
    with pytest.raises(ValueError, match=message):
        sources.csv(path=path, encoding=named)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-2], lambda raw: raw[:-9] + b"\xff" + raw[-9:]], ids=["cut", "byte"]
)
def test_a_damaged_utf8_file_is_not_taken_for_another_encoding(tmp_path, damage):
    path = write(tmp_path, damage(f"ask\n{CHINESE}\n{CHINESE}".encode()))
    with pytest.raises(ValueError, match=r":3: not utf-8 .*damaged byte, or the file is cut off"):
        sources.csv(path=path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("dta.csv", r"no file .*dta\.csv.*task\.source\.path=FILE.*FINETUNE_DATA.*'data\.csv'", id="near-miss"),
        pytest.param("no/data.csv", "there is no folder", id="no-folder"),
        pytest.param(".", "is a folder, not a file", id="folder"),
        pytest.param("data.csv/x", "cannot be read|no file", id="below-a-file"),
        pytest.param("x" * 300, "cannot be read", id="name-too-long"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_there_says_how_to_name_it(tmp_path, reader, name, message):
    write(tmp_path, "a\n1\n", name="data.csv")
    with pytest.raises(ValueError, match=message):
        READERS[reader](path=str(tmp_path / name))


@pytest.mark.parametrize("path", [None, "", "???"], ids=["null", "empty", "missing"])
def test_no_path_says_how_to_name_one(path):
    with pytest.raises(ValueError, match=r"no data file is named: task\.source\.path=FILE"):
        sources.json_lines(path=path)
