import pytest

from finetune.scores import extraction
from finetune.scores.extraction import entities, events, forgive, precision_recall_f1, relations, terms, verdicts

TYPES = ("疾病", "药物")
LEAD = "上述句子中的实体包含：\n"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(LEAD + "疾病实体：肺炎，感冒\n药物实体：", {("肺炎", "疾病"), ("感冒", "疾病")}, id="as asked"),
        pytest.param(
            "药物实体：\n疾病实体：感冒，肺炎，感冒", {("肺炎", "疾病"), ("感冒", "疾病")}, id="order and repeats"
        ),
        pytest.param("疾病实体： 肺炎 ， ", {("肺炎", "疾病")}, id="white space"),
        pytest.param("检查实体：CT", set(), id="a type that was not asked"),
        pytest.param("疾病实体:肺炎", {("疾病实体:肺炎", "疾病")}, id="half-width colon"),
        pytest.param("", set(), id="empty"),
    ],
)
def test_entities(answer, expected):
    assert entities(answer, TYPES).found == expected


def test_entities_tell_form_and_foreign_types():
    assert entities(LEAD + "疾病实体：", TYPES)[1:] == (True, False)
    assert entities("疾病实体：肺炎\n检查实体：CT", TYPES)[1:] == (True, True)
    assert entities("肺炎", TYPES)[1:] == (False, False)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(
            "具有同义词关系的头尾实体对如下：头实体为GBS，尾实体为格林巴利。头实体为A，尾实体为B。\n具有筛查关系的头尾实体对如下：",
            {("GBS", "同义词", "格林巴利"), ("A", "同义词", "B")},
            id="two pairs",
        ),
        pytest.param(
            "具有筛查关系的头尾实体对如下：头实体为A，尾实体为B", {("A", "筛查", "B")}, id="without a full stop"
        ),
        pytest.param("具有筛查关系的头尾实体对如下：头实体为A", set(), id="half a pair"),
        pytest.param("头实体为A，尾实体为B。", {("A", "体为A，尾实体为B。", "B")}, id="no relation named"),
    ],
)
def test_relations(answer, expected):
    assert relations(answer, ("同义词", "筛查")).found == expected


def test_events_are_whole():
    answer = (
        "上述句子中的临床发现事件如下：\n主体词：心脏病；发生状态：；描述词：高血压，重；解剖部位：心脏\n主体词：咳嗽"
    )
    expected = {("心脏病", "", "高血压，重", "心脏"), ("咳嗽", "", "", "")}
    assert events(answer).found == expected
    assert events(answer.replace("重", "轻")).found != expected
    assert events(answer.replace("解剖部位：心脏", "解剖部位： 心脏 ，")).found == expected
    assert events("主体词：咳嗽").found == frozenset()  # the first line is the lead line


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("肺恶性肿瘤，腺癌", {("肺恶性肿瘤",), ("腺癌",)}),
        ("标准词如下\n腺癌，腺癌，胃癌", {("腺癌",)}),
        ("胃癌", set()),
        ("肺恶性肿瘤,腺癌", set()),
    ],
)
def test_terms(answer, expected):
    assert terms(answer, ("肺恶性肿瘤", "腺癌")).found == expected


def test_verdicts():
    answer = "判断如下：\n 发热 ：患有\n咳嗽：也许\n头痛：患有：真的"
    assert verdicts(answer, ("患有", "没有")).found == {("发热", "患有"), ("咳嗽", "不标注")}
    assert verdicts(answer, ("患有", "没有"), unknown="无法确定").found >= {("咳嗽", "无法确定")}


def test_forgiving_finds_what_is_hidden():
    widened, with_lead = forgive("主体词:咳嗽;发生状态:否定")
    assert events(widened).found == frozenset()
    assert events(with_lead).found == {("咳嗽", "否定", "", "")}


def test_precision_recall_f1_by_hand():
    found = precision_recall_f1([(2, 4, 3), (0, 0, 2), (1, 1, 1)])
    assert found == pytest.approx({"precision": 60, "recall": 50, "f1": 54.545455})
    assert precision_recall_f1([]) == precision_recall_f1([(0, 3, 2)]) == {"precision": 0, "recall": 0, "f1": 0}


@pytest.mark.parametrize("parse", [entities, relations, events, terms, verdicts])
@pytest.mark.parametrize(
    "answer", ["", "\n", "：", "，尾实体为", "关系的头尾实体对", "；；：：\n；", "实体：", "\x00|<b>"]
)
def test_anything_parses(parse, answer):
    assert isinstance(parse(answer, TYPES), extraction.Facts)
