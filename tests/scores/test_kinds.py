"""The official score of each kind on rows worked out by hand, and what a row adds to it."""

import pytest

from finetune.scores import aggregate, score_row

STS, DAC = ("是的", "不是"), ("给出诊断", "关于病因的询问")
NER = "上述句子中的实体包含：\n疾病实体：{}\n药物实体：{}"
SPO = "具有同义词关系的头尾实体对如下：{}"
EVENT = "上述句子中的临床发现事件如下：\n主体词：{}；发生状态：；描述词：{}；解剖部位："
SYMPTOM = "当前对话中的症状及其阴阳性判断为：\n{}"
REPORT = "上述问诊对话的诊疗报告如下：\n主诉：{}\n现病史：{}\n辅助检查：\n既往史：\n诊断：\n建议："
SR = ("没有患有该症状", "患有该症状", "无法根据上下文确定病人是否患有该症状")

# task -> kind, choices, (prediction, reference) pairs, official score
OFFICIAL = {
    "CMeEE-V2": ("ner", ("疾病", "药物"), [(NER.format("肺炎，感冒", ""), NER.format("肺炎", "阿莫西林"))], 50),
    "IMCS-V2-NER": ("ner", ("疾病", "药物"), [(NER.format("肺炎", ""), NER.format("肺炎", "")), ("", NER.format("", "钙片"))], 66.666667),
    "CMeIE": ("spo_generation", ("同义词",), [(SPO.format("头实体为A，尾实体为B。头实体为C，尾实体为D。"), SPO.format("头实体为A，尾实体为B。"))], 66.666667),
    "CHIP-CDEE": ("event_extraction", None, [(EVENT.format("咳嗽", "重"), EVENT.format("咳嗽", "重")), (EVENT.format("咳嗽", ""), EVENT.format("咳嗽", "重"))], 50),
    "CHIP-CDN": ("normalization", ("腺癌", "胃癌"), [("腺癌，肺癌", "腺癌，胃癌")], 66.666667),
    "CHIP-MDCFNPC": ("attr_cls", ("有", "无"), [("判别如下：\n发热：有\n咳嗽：也许", "判别如下：\n发热：有\n咳嗽：无")], 50),
    "IMCS-V2-SR": ("attr_cls", SR, [(SYMPTOM.format("发热：不清楚"), SYMPTOM.format("发热：" + SR[2]))], 100),
    # 是的: 2 right, 3 predicted, 2 expected; 不是: 1, 1, 2; weighted (2 x 80 + 2 x 66.7) / 4
    "CHIP-STS": ("cls", STS, [("相同", "是的"), ("", "是的"), ("不同", "不是"), ("是的", "不是")], 73.333333),
    "KUAKE-IR": ("matching", ("相关", "不相关"), [("相关", "相关"), ("不相关", "相关")], 66.666667),
    "KUAKE-QTR": ("matching", ("完全匹配", "部分匹配"), [("完全匹配", "完全匹配"), ("部分匹配", "部分匹配")], 100),
    "KUAKE-QQR": ("matching", ("完全一致", "语义无直接关联"), [("", "完全一致"), ("完全一致", "语义无直接关联")], 33.333333),
    # macro over 给出诊断 (66.7), 关于病因的询问 (0), 诊断 (0): labels that occur on either side
    "IMCS-V2-DAC": ("cls", DAC, [("给出诊断", "给出诊断"), ("诊断", "给出诊断"), ("给出诊断", "关于病因的询问"), ("给出诊断", "给出诊断")], 22.222222),
    "CHIP-CTC": ("cls", ("年龄", "性别"), [("", "非上述类型"), ("年龄", "年龄")], 100),
    "KUAKE-QIC": ("cls", ("病情诊断",), [("病情诊断", "病情诊断"), ("病情诊断", "非上述类型")], 33.333333),
    "MedDG": ("response_generation", None, [("多喝水", "多喝水。"), ("", "无。")], (85.714286 + 100) / 2),
    # sections 主诉 100, 现病史 66.7, four empty ones 100
    "IMCS-V2-MRG": ("report_generation", None, [(REPORT.format("咳嗽", "咳嗽"), REPORT.format("咳嗽", "咳嗽两天"))], (500 + 66.666667) / 6),
}  # fmt: skip


def rows_of(task):
    kind, choices, pairs, _ = OFFICIAL[task]
    return [
        {
            "task": task,
            "kind": kind,
            "choices": choices,
            "prediction": ours,
            "reference": theirs,
            "finish_reason": "stop",
        }
        for ours, theirs in pairs
    ]


@pytest.mark.parametrize("task", OFFICIAL)
def test_official_score(task):
    assert aggregate(rows_of(task))["tasks"][task]["official"] == pytest.approx(OFFICIAL[task][-1])


def test_the_overall_score_is_the_mean_of_the_tasks():
    rows = [row for task in OFFICIAL for row in rows_of(task)]
    assert len(OFFICIAL) == 16
    expected = sum(score for *_, score in OFFICIAL.values()) / 16
    assert aggregate(rows)["mean"]["official"] == pytest.approx(expected)


@pytest.mark.parametrize("task", OFFICIAL)
def test_the_reference_scores_all(task):
    rows = [row | {"prediction": row["reference"]} for row in rows_of(task)]
    scores = aggregate(rows)["tasks"][task]
    assert scores["official"] == pytest.approx(100)
    assert scores.get("unparsable", 0) == scores.get("format_failures", 0) == 0


def flags(prediction, *, kind, choices=None, reference="相关", task="T"):
    row = {"task": task, "kind": kind, "choices": choices, "prediction": prediction, "reference": reference}
    scores = score_row(row | {"finish_reason": "stop"})
    return scores["format_failures"], scores["unparsable"]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("相关", (0, 0)), ("不相关", (0, 0)), ("答：相关", (100, 0)), ("不知道", (0, 100)), ("相关或不相关", (0, 100)), ("非上述类型", (0, 0))],
)  # fmt: skip
def test_a_wrong_choice_is_no_failure_of_format(prediction, expected):
    assert flags(prediction, kind="matching", choices=("相关", "不相关")) == expected


@pytest.mark.parametrize(
    ("kind", "prediction", "reference", "expected"),
    [
        pytest.param("ner", "疾病实体:肺炎", "疾病实体：肺炎", (100, 100), id="half-width colon"),
        pytest.param("ner", "疾病实体：肺炎,感冒", "疾病实体：肺炎，感冒", (100, 0), id="half-width comma"),
        pytest.param("ner", "疾病实体:胃癌", "疾病实体：肺炎", (0, 100), id="wrong either way"),
        pytest.param("ner", "我不知道", "疾病实体：肺炎", (0, 100), id="no answer"),
        pytest.param(
            "report_generation", "主诉：咳嗽\n诊断：感冒", "报告：\n主诉：咳嗽\n诊断：感冒", (100, 0), id="no lead line"
        ),
        pytest.param(
            "report_generation", "报告：\n主诉:咳嗽", "报告：\n主诉：咳嗽", (100, 100), id="half-width section"
        ),
    ],
)
def test_failures_of_format(kind, prediction, reference, expected):
    assert flags(prediction, kind=kind, choices=("疾病",), reference=reference) == expected


def test_free_text_has_no_official_score():
    row = {"task": "T", "kind": "dialogue", "prediction": "多喝水", "reference": "多休息", "finish_reason": "stop"}
    assert "official" not in aggregate([row])["mean"]


def test_a_task_f1_is_micro_over_rows_not_the_mean_of_row_scores():
    rows = rows_of("CMeEE-V2") + [row | {"task": "CMeEE-V2"} for row in rows_of("IMCS-V2-NER")]
    assert aggregate(rows)["tasks"]["CMeEE-V2"]["f1"] == pytest.approx(200 * 2 / (3 + 4))
    assert "counts" not in aggregate(rows)["mean"]
