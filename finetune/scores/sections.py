"""Medical reports: text -> sections, and ROUGE-L of the sections, as PromptCBLUE scores free text."""

from __future__ import annotations

from functools import lru_cache

from finetune.scores.characters import characters
from finetune.scores.rouge import rouge_l_of

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
    return rouge_l_of(characters(prediction) or NOTHING, _reference_characters(reference) or NOTHING)


_reference_characters = lru_cache(maxsize=1 << 12)(characters)  # every method of a study has the same references
