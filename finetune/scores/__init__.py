"""Texts -> scores: pure functions, no torch."""

from finetune.scores.predictions import aggregate, score_row, score_rows

__all__ = ["aggregate", "score_row", "score_rows"]
