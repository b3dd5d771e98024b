"""Run folders -> tables, figures and pages. Nothing here imports torch."""
