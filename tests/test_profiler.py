"""What a profiler sees of the ops."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

import trajkern as tk
from trajkern.testing import SPECS


def test_every_op_bears_its_public_name() -> None:
    cases = [(spec, spec.inputs(spec.cases[0], torch.float32)) for spec in SPECS]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for spec, inputs in cases:
            getattr(tk, spec.name)(**inputs)
    names = {event.key for event in seen.key_averages()}
    assert {f"trajkern.{spec.name}" for spec in SPECS} <= names


def test_signature_and_help_are_the_functions_own() -> None:
    assert tk.whiten.__name__ == "whiten" and "shift_mean" in tk.whiten.__doc__
