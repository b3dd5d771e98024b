"""Measurements: never timed tests."""
