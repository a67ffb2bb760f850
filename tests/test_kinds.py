"""The table of loss kinds: what it says is legal, and everything that knows a kind knows all of them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import trajkern as tk
from trajkern import losses
from trajkern.losses.kinds import AGGREGATES, FORMS, KINDS, OPTIONS, PARAMETERS, RATIO_LEVELS
from trajkern.losses.published import PUBLISHED

OPTIONS_OF_A_LOSS = {field.name for field in fields(tk.PolicyLoss)}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_made_of_known_parts(name: str) -> None:
    kind = KINDS[name]
    assert kind.ratio_level in RATIO_LEVELS and kind.aggregate in AGGREGATES and kind.form in FORMS
    assert set(kind.in_tree) <= set(RATIO_LEVELS)
    assert set(kind.reads) <= OPTIONS_OF_A_LOSS
    assert not (kind.in_tree and (kind.selects or kind.by_trajectory)), "such a term is no sum over leaves"


def test_a_form_reads_parameters_that_kernels_have() -> None:
    assert set(PARAMETERS) <= OPTIONS_OF_A_LOSS
    assert {name for names in FORMS.values() for name in names} <= set(PARAMETERS)
    assert {kind.form for kind in KINDS.values()} == set(FORMS)


def test_the_reference_has_every_form() -> None:
    reference = importlib.import_module("trajkern.reference.policy_loss")  # the function hides it
    assert reference._TERMS.keys() == FORMS.keys()


def test_the_docstring_defines_every_kind() -> None:
    first_column = re.findall(r"^([a-z_]+(?:, [a-z_]+)*)  ", inspect.getdoc(tk.policy_loss) or "", re.M)
    assert set(KINDS) <= {name for names in first_column for name in names.split(", ")}


def test_encoding_follows_the_names() -> None:
    config = tk.PolicyLoss("vespo", clip_low=0.1, vespo_k_neg=7.0, aggregate="token_sum", kl_coef=0.5, kl="k1")
    numbers = dict(zip(PARAMETERS, config.kernel_params, strict=True))
    choices = dict(zip(OPTIONS, config.kernel_options, strict=False))
    assert numbers["clip_low"] == 0.1 and numbers["vespo_k_neg"] == 7 and numbers["clip_dual"] == float("inf")
    assert choices["form"] == list(FORMS).index("vespo") and choices["kl"] == 1
    assert choices["aggregate"] == AGGREGATES.index("token_sum")


def test_the_table_knows_no_torch() -> None:
    source = Path(inspect.getfile(losses)).with_name("kinds.py").read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {getattr(node, "module", None) for node in imports} == {"__future__", "typing"}


PACKAGE = Path(inspect.getfile(tk)).parent
SOURCES = [  # an adapter has its host's list, under the host's names
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "kinds.py" and path.relative_to(PACKAGE).parts[0] != "integrations"
]
SAMPLE = ("gmpo", "vespo", "kl_cov", "clip_cov", "luspo", "gspo", "bnpo", "dppo_tv", "dppo_kl")  # no other meaning


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_no_second_list_of_kinds(path: Path) -> None:
    """Three kinds in one literal would be a list that a new kind has to be added to; tests ask two tables for it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
            items = node.keys if isinstance(node, ast.Dict) else node.elts
            names = {item.value for item in items if isinstance(item, ast.Constant) and item.value in SAMPLE}
            whole = any(names <= table.keys() and len(items) == len(table) for table in (FORMS, PUBLISHED))
            assert len(names) < 3 or whole, f"line {node.lineno}: {sorted(names)}"
