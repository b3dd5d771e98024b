"""Texts -> scores: pure functions, no torch."""
