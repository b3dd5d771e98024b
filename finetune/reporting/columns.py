"""The numbers that a report can show: their titles, where they stand in a run, which way is better."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

# how ROUGE may be counted: what a report leads with, and the ending of the scores' names
CONVENTIONS = {
    "words": "",
    "words-multiset": "-multiset",
    "characters": "-char",
    "characters-multiset": "-char-multiset",
}
CONVENTION_TEXTS = {
    "words": "by jieba words, n-grams counted as sets (as `rouge_chinese` does)",
    "words-multiset": "by jieba words, n-grams counted as multisets (Lin 2004)",
    "characters": "by character, n-grams counted as sets (as PromptCBLUE's scorer does)",
    "characters-multiset": "by character, n-grams counted as multisets (Lin 2004)",
}


@dataclass(frozen=True)
class Column:
    """One number of a run. `better` is 1 when more is better, -1 when less is, 0 when neither is.

    A column with an `alarm` marks what is above it, instead of the best.
    """

    title: str
    source: str  # scores | cost | loss | forgetting | rewording
    key: str
    better: int
    write: Callable[[float], str]
    alarm: float | None = None


def two_places(value: float) -> str:
    """A score."""
    return f"{value:.2f}"


def count(value: float) -> str:
    """1234567 -> 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def three_digits(value: float) -> str:
    """A cost: 0.0123, 1.23, 1234."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _score(title: str, key: str, better: int = 1) -> Column:
    return Column(title, "scores", key, better, two_places)


def _health(title: str, key: str) -> Column:
    return Column(title, "scores", key, -1, two_places, alarm=5.0)  # one answer in twenty is no accident


def rewording(names: Iterable[str]) -> tuple[Column, ...]:
    """What asking in other words costs: ROUGE-1 then, of the same rows as they stand, and the difference."""
    return tuple(
        Column(name, "rewording", name, -1 if name.endswith(" drop") else 0, two_places)
        for name in names
        if name != "num_rows"
    )


def rouge(convention: str) -> tuple[Column, ...]:
    """ROUGE-1/2/L in one of the `CONVENTIONS`."""
    return tuple(_score(f"ROUGE-{kind}", f"rouge-{kind.lower()}{CONVENTIONS[convention]}") for kind in "12L")


OTHER = (
    _score("official", "official"),
    _score("BLEU-4", "bleu-4"),
    _score("chrF", "chrf"),
    _score("exact %", "exact"),
    _score("accuracy %", "accuracy"),
    _score("F1 micro", "f1-micro"),
    _score("F1 macro", "f1-macro"),
    _score("F1 weighted", "f1-weighted"),
    _score("precision", "precision"),
    _score("recall", "recall"),
    _score("F1", "f1"),
    _score("sections", "rouge-l-sections"),
)
HEALTH = (
    _health("empty %", "empty"),
    _health("never stopped %", "never_stopped"),
    _health("looping %", "looping"),
    _health("unparsable %", "unparsable"),
    _health("wrong format %", "format_failures"),
    _health("outside choices %", "outside_choices"),
    _score("length %", "length", 0),
    _health("not Chinese %", "not_chinese"),
)
COST = (
    Column("trainable", "cost", "trainable_parameters", -1, count),
    Column("share %", "cost", "trainable_percent", -1, three_digits),
    Column("peak GiB", "cost", "peak_memory_gib", -1, three_digits),
    Column("train s", "cost", "train_seconds", -1, three_digits),
    Column("tokens/s", "cost", "tokens_per_second", 1, three_digits),
    Column("adapter MB", "cost", "adapter_mb", -1, three_digits),
)
LOSS = (
    Column("train loss", "loss", "train", -1, three_digits),
    Column("valid loss", "loss", "valid", -1, three_digits),
    Column("train loss at best", "loss", "best_train", -1, three_digits),
    Column("best valid loss", "loss", "best_valid", -1, three_digits),
    Column("rise since best", "loss", "rise", -1, three_digits),
    Column("best step", "loss", "best_step", 0, count),
)
ROBUST = (
    _score("rewording drop", "rewording_drop", -1),
    Column("general loss before", "forgetting", "base", 0, three_digits),
    Column("general loss after", "forgetting", "tuned", -1, three_digits),
    Column("forgetting", "forgetting", "rise", -1, three_digits),
)
