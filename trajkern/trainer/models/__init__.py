"""Policies: what the trainer asks of a language model, the built-in transformer, HuggingFace's; and judges."""
