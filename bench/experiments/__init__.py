"""Experiments with the reference trainer: recipes beside their authors' baselines, controls, the two heads."""
