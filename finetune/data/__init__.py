"""Files -> rows -> token examples -> batches."""
