"""Medical reports: text -> sections, and ROUGE-L of the sections, as PromptCBLUE scores free text."""

from __future__ import annotations

from finetune.scores.characters import characters
from finetune.scores.rouge import count, rouge_l

SECTIONS = ("主诉", "现病史", "辅助检查", "既往史", "诊断", "建议")
NOTHING = ["无", "。"]  # stands for an empty text on either side


def sections(answer: str) -> dict[str, str]:
    """Text by section, of the lines `NAME：TEXT` after the first (the lead line); the last of equal names counts."""
    found = {}
    for name in SECTIONS:
        for line in answer.split("\n")[1:]:
            if line.startswith(f"{name}："):
                found[name] = line.split(f"{name}：")[-1].strip()
    return found


def section_scores(prediction: str, reference: str) -> dict[str, float]:
    """ROUGE-L in percent by section of the reference; a section that the prediction lacks is an empty text."""
    ours = sections(prediction)
    return {name: official_rouge_l(ours.get(name, ""), text) for name, text in sections(reference).items()}


def official_rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L in percent by character, an empty text being `无 。`."""
    ours, theirs = (characters(text) or NOTHING for text in (prediction, reference))
    return rouge_l(count(ours), count(theirs))
