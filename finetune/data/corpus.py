"""The generated text that miniature bases are pretrained on, the same for the same seed.

A tenth of plain text, 60 % of instruction-like pairs in other templates than the demo task's but with its words, a
quarter of lists to repeat or look up. Plain text alone left a prototype's LoRA at 20 ROUGE-1 on the demo task; pairs
without its words gave broken characters, because frozen embeddings had never seen them.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterator

from finetune.data import clinic

VERSION = 1  # raised when the text changes: the recipe of the miniature bases contains it

QUESTION, ANSWER = "用户：", "助手："  # the frame of a base without a chat template

_OTHER_WORDS = (
    "上述 句子 中的 包含 识别 判断 下面 意图 选项 总结 诊疗 报告 对话 如下 说明 章节 实体 "
    "类型 问诊 六个 这 分为 的 答 体健 暂无 正常 口服 伴 无 和 没有 有的 有点 有一点 不会 "
    "没做 以前 没病 考虑 应该是 查了 还有 患者 医生 会不会 严重 多久 哪里 不舒服 得过 家里人 "
    "查出 可以 一天三次 最好 看看 平时 期间 记得 为什么 什么 原因 是不是 引起 怎么 一起 偶尔 "
    "这种 情况 出现 开始 不适 疼痛 既往 病史 不能 除外 常累及 给予 服用 减轻 治疗 未见 异常 "
    "提示 建议 显示 询问 描述 提问 生活 诊断 用药 检查 病因 症状 找出 写出 重复 一种 就是"
)
WORDS = tuple(
    dict.fromkeys(
        itertools.chain(
            *clinic.TYPES.values(), clinic.DURATIONS, clinic.ADVICE, clinic.PATIENTS, clinic.SECTIONS, clinic.TYPES,
            clinic.COLLOQUIAL.values(), (clinic.NO_LABEL,), _OTHER_WORDS.split(),
        )
    )
)  # fmt: skip
_WORD = re.compile("|".join(sorted((*WORDS, QUESTION[:-1], ANSWER[:-1]), key=len, reverse=True)) + "|.", re.DOTALL)
_LETTERS = sorted(set("".join(WORDS)))


def words(text: str) -> list[str]:
    """The text cut into the known words, longest first, and single characters."""
    return _WORD.findall(text)


def documents(*, seed: int = 0) -> Iterator[str]:
    """An endless stream of documents."""
    rng = random.Random(f"corpus:{VERSION}:{seed}")
    makers, weights = zip(*_MIXTURE, strict=True)
    while True:
        yield rng.choices(makers, weights)[0](rng)


def pair(question: str, answer: str) -> str:
    """A question and its answer in the frame of a base without a chat template."""
    return f"{QUESTION}{question}\n{ANSWER}{answer}"


def _sentence(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    clauses = [clinic.fill(clause, rng=rng) for clause in rng.sample(clinic.CLAUSES, rng.choice((1, 2, 3)))]
    return "，".join(text for text, _ in clauses) + "。", [entity for _, found in clauses for entity in found]


def _mentions(entities: list[tuple[str, str]], *, kind: str) -> str:
    return "，".join(dict.fromkeys(mention for found, mention in entities if found == kind))


def _plain(rng: random.Random) -> str:
    kind = rng.choice(list(clinic.TYPES))
    word = rng.choice(clinic.TYPES[kind])
    formal, said = rng.choice(list(clinic.COLLOQUIAL.items()))
    return rng.choice(
        (
            _sentence(rng)[0],
            "\n".join(clinic.utterance(rng.choice(list(clinic.INTENTS)), rng=rng) for _ in range(rng.randint(2, 4))),
            f"{word}是一种{kind}。{said}就是{formal}。",
        )
    )


# What is asked, the first line of the answer, what follows a type's name.
_STYLES = (
    ("找出文中的{kinds}", "", "："),
    ("写出下文的{kinds}实体", "", "实体："),
    ("句中有哪些{kinds}？", "句中有：\n", "："),
    ("列出句子中的{kinds}实体", "句子中的实体如下：\n", "实体："),
    ("下面说到哪些{kinds}？", "上述句子说到：\n", "有："),
)


def _find(rng: random.Random) -> str:
    text, entities = _sentence(rng)
    kinds = rng.sample(list(clinic.TYPES), rng.randint(1, 4))
    ask, lead, after = rng.choice(_STYLES)
    lines = [f"{kind}{after}{_mentions(entities, kind=kind)}" for kind in kinds]
    asked = ask.format(kinds=rng.choice(("、", "，", "和")).join(kinds))
    return pair(rng.choice((f"{asked}\n{text}", f"{text}\n{asked}")), lead + "\n".join(lines))


def _topic(rng: random.Random) -> str:
    """What a line of a dialogue is about, or which kind of speech it is."""
    label = rng.choice(list(clinic.INTENTS))
    line = clinic.utterance(label, rng=rng)
    halves = {"在说什么": label[:2], "是哪种话": label[2:]}
    ask = rng.choice(list(halves))
    options = sorted({other[:2] if ask == "在说什么" else other[2:] for other in clinic.INTENTS})
    rng.shuffle(options)
    chosen = f"\n可以是：{'，'.join(options)}" if rng.random() < 0.5 else ""
    return pair(f"{line}\n这句{ask}？{chosen}", halves[ask])


def _choose(rng: random.Random) -> str:
    kind = rng.choice(list(clinic.TYPES))
    word = rng.choice(clinic.TYPES[kind])
    others = rng.sample([other for name, words in clinic.TYPES.items() if name != kind for other in words], 3)
    options = rng.sample([word, *others], 4)
    return pair(f"哪一个是{kind}？选项：{'，'.join(options)}", word)


def _what(rng: random.Random) -> str:
    kind = rng.choice(list(clinic.TYPES))
    options = rng.sample(list(clinic.TYPES), 5)
    return pair(f"{rng.choice(clinic.TYPES[kind])}是什么？选项：{'，'.join(options)}", kind)


def _say(rng: random.Random) -> str:
    formal, said = rng.choice(list(clinic.COLLOQUIAL.items()))
    return pair(f"{said}怎么写？", formal)


def _record(rng: random.Random) -> str:
    """A short dialogue and some facts of it, asked for by name in any order."""
    symptoms, (past, disease) = rng.sample(clinic.SYMPTOMS, 2), rng.sample(clinic.DISEASES, 2)
    said = [clinic.COLLOQUIAL.get(word, word) if rng.random() < 0.5 else word for word in symptoms]
    drug, exam = rng.choice(clinic.DRUGS), rng.choice(clinic.EXAMS)
    duration, advice = rng.choice(clinic.DURATIONS), rng.choice(clinic.ADVICE)
    lines = {
        ("不适", "主要症状"): (f"患者：{said[0]}{duration}了。", f"{symptoms[0]}{duration}"),
        ("还有", "伴"): (f"患者：{rng.choice(('也', '还', '有点'))}{said[1]}。", symptoms[1]),
        ("查过", "检查"): (f"患者：查了{exam}，正常。", f"{exam}正常"),
        ("以前", "既往"): (f"患者：以前有{past}。", past),
        ("考虑", "诊断"): (f"医生：{rng.choice(('考虑', '应该是'))}{disease}。", disease),
        ("吃药", "建议"): (f"医生：{rng.choice(('吃', '用'))}{drug}，{advice}。", f"{drug}，{advice}"),
    }
    told = rng.sample(list(lines), rng.randint(2, 6))
    asked = [(rng.choice(names), names) for names in rng.sample(told, rng.randint(1, len(told)))]
    text = "\n".join(lines[names][0] for names in lines if names in told)
    end = rng.choice(("", "。"))
    lead = rng.choice(("", "", "记录如下：\n", "对话的总结：\n"))
    wanted = f"写出{'，'.join(name for name, _ in asked)}{end}{'，先写' + lead[:-2] if lead else ''}"
    return pair(f"{text}\n{wanted}", lead + "\n".join(f"{name}：{lines[names][1]}{end}" for name, names in asked))


def _repeat(rng: random.Random) -> str:
    words = rng.sample(WORDS, rng.randint(2, 8))
    mark = rng.choice(("，", "、", "\n", ""))
    listed = mark.join(words)
    return pair(f"{rng.choice(('重复', '再说一遍', '照写'))}：{listed}", listed)


def _look_up(rng: random.Random) -> str:
    keys, values = rng.sample(WORDS, 4), rng.sample(WORDS, 4)
    lines = "\n".join(f"{key}：{value}" for key, value in zip(keys, values, strict=True))
    asked = rng.sample(range(4), rng.randint(1, 3))
    return pair(
        f"{lines}\n问：{'，'.join(keys[i] for i in asked)}", "\n".join(f"{keys[i]}：{values[i]}" for i in asked)
    )


def _again(rng: random.Random) -> str:
    return "".join(rng.choices((*WORDS, *_LETTERS), k=rng.randint(6, 20))) * 2


_MIXTURE: tuple[tuple[Callable[[random.Random], str], float], ...] = (
    (_plain, 12), (_find, 22), (_topic, 14), (_choose, 8), (_what, 5), (_say, 3), (_record, 20),
    (_repeat, 10), (_look_up, 10), (_again, 10),
)  # fmt: skip
