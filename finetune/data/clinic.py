"""The demo task `clinic`: generated Chinese consultations in PromptCBLUE's row format, the same for the same seed.

Three kinds, as in the experiment that this project generalises: the intent of a dialogue's last utterance
(CLINIC-INTENT, cls), the entities of the asked types in a sentence (CLINIC-NER, ner) and the six-section report of a
dialogue (CLINIC-REPORT, report_generation). The vocabulary is closed and small so that a miniature base can copy it.
"""

import random
from collections.abc import Callable
from typing import Any

VERSION = 1  # raised when rows change: the recipe of the miniature bases contains it


def _words(text: str) -> list[str]:
    return text.split()


SYMPTOMS = _words(
    "发热 咳嗽 头痛 腹痛 腹泻 呕吐 恶心 乏力 胸闷 心悸 皮疹 瘙痒 "
    "便秘 头晕 咽痛 流涕 鼻塞 水肿 气促 盗汗 失眠 耳鸣 腹胀 黄疸"
)
DISEASES = _words(
    "肺炎 感冒 胃炎 肠炎 哮喘 湿疹 鼻炎 咽炎 贫血 糖尿病 高血压 冠心病 痛风 肝炎 肾炎 结核 水痘 麻疹 中耳炎 胆囊炎"
)
DRUGS = _words(
    "阿莫西林 布洛芬 蒙脱石散 益生菌 头孢 奥美拉唑 氯雷他定 二甲双胍 "
    "阿司匹林 硝苯地平 止咳糖浆 炉甘石 维生素 补液盐 感冒灵 红霉素"
)
EXAMS = _words("血常规 胸片 心电图 彩超 尿常规 便常规 胃镜 肝功能 血糖 血压")
BODIES = _words("肺部 胃部 肝脏 肾脏 心脏 皮肤 咽部 鼻腔 耳部 腹部 头部 关节")
DURATIONS = _words("半天 一天 两天 三天 四天 五天 六天 一周 两周 三周 半个月 一个月 两个月 半年 一年")
ADVICE = _words("多喝水 多休息 清淡饮食 注意保暖 少吃辣 按时复查 适当运动 保持通风")
PATIENTS = _words("患者 患儿 病人 老人 孩子 男孩 女孩")
COLLOQUIAL = {"发热": "发烧", "腹泻": "拉肚子", "恶心": "想吐", "乏力": "没力气", "腹痛": "肚子痛", "咽痛": "嗓子痛"}

TYPES = {"疾病": DISEASES, "临床表现": SYMPTOMS, "药物": DRUGS, "检查": EXAMS, "身体部位": BODIES}
SLOTS = {"疾病": "disease", "临床表现": "symptom", "药物": "drug", "检查": "exam", "身体部位": "body"}
SECTIONS = ("主诉", "现病史", "辅助检查", "既往史", "诊断", "建议")
NO_LABEL = "非上述类型"

# Slots: one letter per word list; the same letter twice draws two different words.
_POOLS = {"s": SYMPTOMS, "d": DISEASES, "r": DRUGS, "e": EXAMS, "b": BODIES, "t": DURATIONS, "a": ADVICE, "p": PATIENTS}
_TYPE_OF_SLOT = {"d": "疾病", "s": "临床表现", "r": "药物", "e": "检查", "b": "身体部位"}

CLAUSES = (
    "{p}{s}{t}", "{p}出现{s}和{s}", "{p}{t}前开始{s}", "{b}不适伴{s}", "{b}疼痛{t}", "既往有{d}病史", "考虑为{d}",
    "{d}不能除外", "{d}可引起{s}", "{d}常累及{b}", "给予{r}口服", "服用{r}后{s}减轻", "{r}和{r}可治疗{d}",
    "{e}未见异常", "{e}提示{d}", "建议查{e}和{e}", "{e}显示{b}异常", "{s}时可用{r}",
)  # fmt: skip

# Label -> (who speaks, what is said). 症状描述 and 病史描述 share their short answers: only the question before tells.
_SHORT = ("有的", "没有", "有，{t}了", "没有这种情况", "偶尔有", "以前有过")
INTENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "症状询问": ("医生", ("有{s}吗？", "{s}多久了？", "会不会{s}？", "{s}严重吗？", "{b}哪里不舒服？")),
    "病史询问": ("医生", ("以前得过{d}吗？", "有{d}病史吗？", "家里人有{d}吗？", "之前查出过{d}吗？")),
    "诊断说明": ("医生", ("考虑是{d}。", "这是{d}引起的{s}。", "应该是{d}。", "从{e}看是{d}。")),
    "用药建议": ("医生", ("可以吃{r}。", "{r}一天三次。", "先用{r}，再用{r}。", "{s}的话就吃{r}。")),
    "检查建议": ("医生", ("去查个{e}吧。", "最好做{e}。", "先做{e}和{e}看看。", "{t}后再查{e}。")),
    "生活建议": ("医生", ("{a}，{a}。", "平时要{a}。", "{s}期间{a}。", "记得{a}。")),
    "症状描述": ("患者", ("我{s}{t}了。", "有{s}，还有{s}。", "{b}不舒服，{s}。", "{s}{t}，没好。", *_SHORT)),
    "病史描述": ("患者", ("以前得过{d}。", "有{d}{t}了。", "家里人有{d}。", "之前查过{e}，是{d}。", *_SHORT)),
    "病因提问": ("患者", ("为什么会{s}？", "{s}是什么原因？", "是不是{d}引起的？", "怎么会得{d}？")),
    "用药提问": ("患者", ("可以吃{r}吗？", "{r}怎么吃？", "{s}吃什么药？", "{r}和{r}能一起吃吗？")),
}
_QUESTION_BEFORE = {"症状描述": "症状询问", "病史描述": "病史询问"}


def read(*, train_rows: int = 1500, valid_rows: int = 300, seed: int = 0) -> list[dict[str, Any]]:
    """The training rows, then the validation rows, the three kinds in turn.

    No sentence or dialogue occurs twice, so training and validation share none. The validation rows do not depend on
    `train_rows`, and fewer training rows are the first of more.
    """
    seen: set[str] = set()
    valid = _rows(valid_rows, prefix="valid", seed=seed, seen=seen)
    return _rows(train_rows, prefix="train", seed=seed, seen=seen) + valid


def _rows(num_rows: int, *, prefix: str, seed: int, seen: set[str]) -> list[dict[str, Any]]:
    """`num_rows` rows whose sentence or dialogue is not in `seen` (it is added)."""
    rng = random.Random(f"clinic:{VERSION}:{prefix}:{seed}")
    makers: tuple[Callable[[random.Random], tuple[str, dict[str, Any]]], ...] = (_intent, _ner, _report)
    rows: list[dict[str, Any]] = []
    while len(rows) < num_rows:
        body, row = makers[len(rows) % len(makers)](rng)
        if body not in seen:
            seen.add(body)
            rows.append({**row, "sample_id": f"{prefix}-{len(rows)}"})
    return rows


def fill(template: str, *, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """The template with its slots drawn, and its entities as (type, mention) in order of occurrence."""
    parts, entities, used = [], [], set()
    for piece in template.replace("}", "{").split("{"):
        pool = _POOLS.get(piece)
        if pool is None:
            parts.append(piece)
            continue
        word = rng.choice([word for word in pool if word not in used])
        used.add(word)
        parts.append(word)
        if piece in _TYPE_OF_SLOT:
            entities.append((_TYPE_OF_SLOT[piece], word))
    return "".join(parts), entities


def utterance(label: str, *, rng: random.Random) -> str:
    """A line `speaker：words` with that intent."""
    speaker, templates = INTENTS[label]
    return f"{speaker}：{fill(rng.choice(templates), rng=rng)[0]}"


def _intent(rng: random.Random) -> tuple[str, dict[str, Any]]:
    label = rng.choice(list(INTENTS))
    before = _QUESTION_BEFORE.get(label) or rng.choice(list(INTENTS))
    body = f"{utterance(before, rng=rng)}\n{utterance(label, rng=rng)}"
    others = [other for other in INTENTS if other != label]
    choices = [*rng.sample(others, 4), label] if rng.random() < 0.9 else rng.sample(others, 5)
    rng.shuffle(choices)
    listed = "，".join(choices)
    prompts = (
        f"判断下面问诊句子的意图：\n{body}\n选项：{listed}\n答：",
        f"下面是一段问诊：\n{body}\n最后一句的意图是哪一个？可选：{listed}\n答：",
    )
    target = label if label in choices else NO_LABEL
    return body, _row(prompts, target=target, task="CLINIC-INTENT", kind="cls", choices=choices)


def _ner(rng: random.Random) -> tuple[str, dict[str, Any]]:
    clauses = [fill(clause, rng=rng) for clause in rng.sample(CLAUSES, rng.choice((2, 3)))]
    body = "，".join(text for text, _ in clauses) + "。"
    entities = [entity for _, found in clauses for entity in found]
    asked = rng.sample(list(TYPES), 3)
    lines = [f"{kind}实体：{'，'.join(_mentions(entities, kind=kind))}" for kind in asked]
    listed = "，".join(asked)
    prompts = (
        f"实体识别：\n{body}\n实体类型：{listed}\n答：",
        f"找出下面句子中的实体：\n{body}\n只找这些类型：{listed}\n答：",
    )
    target = "\n".join(["上述句子中的实体包含：", *lines])
    return body, _row(prompts, target=target, task="CLINIC-NER", kind="ner", choices=asked)


def _mentions(entities: list[tuple[str, str]], *, kind: str) -> list[str]:
    return list(dict.fromkeys(mention for found, mention in entities if found == kind))


def _report(rng: random.Random) -> tuple[str, dict[str, Any]]:
    symptoms, (past, disease) = rng.sample(SYMPTOMS, 3), rng.sample(DISEASES, 2)
    said = [COLLOQUIAL.get(word, word) if rng.random() < 0.5 else word for word in symptoms]
    duration, exam = rng.choice(DURATIONS), rng.choice(EXAMS)
    drug, advice = rng.choice(DRUGS), rng.choice(ADVICE)
    third, tested, ill = rng.random() < 0.5, rng.random() < 0.6, rng.random() < 0.4
    body = "\n".join(
        [
            f"患者：{said[0]}{duration}了，{rng.choice(('还', '也', '有点'))}{said[1]}。",
            f"医生：{rng.choice(('有', '还有', '也'))}{said[2]}吗？",
            f"患者：{rng.choice(('有的', '有一点')) if third else rng.choice(('没有', '不会'))}。",
            f"患者：{f'查了{exam}，正常' if tested else '没做检查'}，{f'以前有{past}' if ill else '以前没病'}。",
            f"医生：{rng.choice(('考虑', '应该是'))}{disease}，{rng.choice(('吃', '用'))}{drug}，{advice}。",
        ]
    )
    sections = (
        f"{symptoms[0]}{duration}",
        f"{symptoms[0]}{duration}，伴{symptoms[1]}{'和' if third else '，无'}{symptoms[2]}",
        f"{exam}正常" if tested else "暂无",
        past if ill else "体健",
        disease,
        f"{drug}口服，{advice}",
    )
    lines = [f"{name}：{text}。" for name, text in zip(SECTIONS, sections, strict=True)]
    listed = "，".join(SECTIONS)
    prompts = (
        f"总结问诊的诊疗报告：\n{body}\n说明：报告分为{listed}这六个章节。\n答：",
        f"根据下面的对话写一份诊疗报告：\n{body}\n报告要有{listed}这六个章节。\n答：",
    )
    target = "\n".join(["上述问诊对话的诊疗报告如下：", *lines])
    return body, _row(prompts, target=target, task="CLINIC-REPORT", kind="report_generation", choices=None)


def _row(prompts: tuple[str, str], *, target: str, task: str, kind: str, choices: list[str] | None) -> dict[str, Any]:
    """An item; `reworded` asks the same in other words."""
    prompt, reworded = prompts
    return {
        "input": prompt,
        "reworded": reworded,
        "target": target,
        "answer_choices": choices,
        "task_type": kind,
        "task_dataset": task,
    }
