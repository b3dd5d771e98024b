import pytest

from finetune.reporting.text import markdown, markdown_path, one_line, spreadsheet


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a | b\nc", r"a \| b c", id="table"),
        pytest.param("<script>alert(1)</script>", r"&lt;script\>alert(1)&lt;/script\>", id="HTML"),
        pytest.param("&lt;", "&amp;lt;", id="entity"),
        pytest.param("[x](http://y) ![z](w)", r"\[x\](http://y) !\[z\](w)", id="link and picture"),
        pytest.param("**b** `c` ~~d~~", r"\*\*b\*\* \`c\` \~\~d\~\~", id="marks"),
        pytest.param("a\\|b", r"a\\\|b", id="escaped already"),
        pytest.param("ptuning_v2+adapter.r=8", "ptuning_v2+adapter.r=8", id="names stay readable"),
        pytest.param("_v2_", r"\_v2\_", id="emphasis"),
        pytest.param("诊断：肺炎", "诊断：肺炎", id="Chinese"),
    ],
)
def test_markdown(text, expected):
    assert markdown(text) == expected


def test_control_and_direction_characters_are_gone():
    assert one_line("a\x1b[31mred\x07\u202egnirts\u200b\r\nb\u2028c\ud800") == "a [31mred gnirts b c"


def test_long_text_is_cut():
    assert one_line("好" * 400, limit=10) == "好" * 9 + "…"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "  =1", "\n=1", "\r=1"])
def test_no_formula_in_a_spreadsheet(text):
    assert spreadsheet(text) == "'" + text.replace("\r", " ")


@pytest.mark.parametrize("value", [-1.5, 3, None, "lora", "诊断", "a=b"])
def test_other_values_stay_in_a_spreadsheet(value):
    assert spreadsheet(value) == value


def test_paths_cannot_end_a_link():
    assert markdown_path("a/b c)(<x>|y") == "a/b%20c%29%28%3Cx%3E%7Cy"
    assert markdown_path("lora+adapter.r=8") == "lora+adapter.r=8"
