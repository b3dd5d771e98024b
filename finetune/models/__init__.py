"""Base models and tokenizers: where they come from, precision, quantisation, packed attention, miniatures."""
