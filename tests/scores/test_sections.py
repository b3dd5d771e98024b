import pytest

from finetune.scores.sections import official_rouge_l, section_scores, sections

REPORT = "上述问诊对话的诊疗报告如下：\n主诉：便秘。\n现病史：便秘三天。\n辅助检查：暂无。\n既往史：\n诊断：小儿便秘。\n建议：多喝水。"


def test_sections_by_name():
    assert sections(REPORT) == {
        "主诉": "便秘。", "现病史": "便秘三天。", "辅助检查": "暂无。", "既往史": "", "诊断": "小儿便秘。", "建议": "多喝水。",
    }  # fmt: skip


def test_the_first_line_is_the_lead_line_and_the_last_of_equal_names_counts():
    assert sections("主诉：咳嗽\n诊断：感冒\n诊断：肺炎\n诊断:流感") == {"诊断": "肺炎"}


def test_scores_by_hand():
    prediction = REPORT.replace("小儿便秘", "便秘").replace("主诉：便秘。\n", "")
    scores = section_scores(prediction, REPORT)
    assert scores["诊断"] == pytest.approx(200 * 3 / (3 + 5))
    assert scores["主诉"] == pytest.approx(200 * 1 / (2 + 3))  # the missing section is 无 。, of which 。 is right
    assert scores["既往史"] == 100  # both are empty
    assert scores["建议"] == 100


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [("", "", 100), ("", "无。", 100), ("无", "", 66.666667), ("CT Scan", "ct", 66.666667), ("好", "坏", 0)],
)
def test_an_empty_text_is_nothing_to_report(prediction, reference, expected):
    assert official_rouge_l(prediction, reference) == pytest.approx(expected)
