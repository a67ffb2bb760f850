"""Attacks that anyone can run again, and docs/reliability.md, the page of what they tried and what fell short."""
