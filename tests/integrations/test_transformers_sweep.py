"""Every text-generation class of transformers that can be made small: its own numbers, or refused, as the page says."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")
small_models = pytest.importorskip("tests.integrations.small_models", exc_type=ImportError)
KINDS = sorted(small_models.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
PAGE = small_models.PAGE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_has_its_own_log_probs_or_is_refused(kind: str) -> None:
    row = small_models.row(kind)
    assert "wrong" not in row
    if f"transformers {transformers.__version__}\n" in PAGE:
        assert row in PAGE.splitlines()


def test_the_page_has_every_class_and_no_wrong_number() -> None:
    rows = [line for line in PAGE.split(small_models.MARK)[1].splitlines() if "`" in line]
    assert not [x for x in rows if "wrong" in x]
    assert len([x for x in rows if "| right |" in x]) > 170
    if f"transformers {transformers.__version__}\n" in PAGE:
        assert [x.split("`")[1] for x in rows] == KINDS


@pytest.mark.slow
def test_other_classes_with_a_head_are_right_or_refused() -> None:
    """Text through models of images and sounds; what reads the tokens that it predicts has no log-probs of them."""
    found = {name: small_models.other_outcome(name) for name in small_models.OTHERS}
    assert not {name: x for name, x in found.items() if "wrong" in x}
    assert sum(x == "right" for x in found.values()) > 40
    assert sum(x == "refused: it reads what it predicts" for x in found.values()) > 35
