"""Thin `evaluate.Metric` shells over `finetune.scores`."""
