"""Vectors of texts for the skill bank: what is asked of a model, and what stands in for none."""

from __future__ import annotations

import sys

import pytest
import torch

from trajkern.integrations.sentence_transformers import embeddings
from trajkern.recipes.skillrl import SkillBank


def test_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def encode(self, texts: list[str], convert_to_tensor: bool, show_progress_bar: bool) -> torch.Tensor:
            assert convert_to_tensor and not show_progress_bar
            return torch.tensor([[float(len(text)), 1.0] for text in texts])

    assert embeddings(Model())(("a", "bcd")).tolist() == [[1, 1], [3, 1]]
    with pytest.raises(TypeError, match="model must be a name, or a SentenceTransformer without options"):
        embeddings(3)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="pip install 'sentence-transformers>=3'"):
        embeddings("some/model")


def test_a_real_model(tmp_path) -> None:
    """A tiny random one, from its folder."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="the skills' extra is not installed")
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "count", "the", "pears", "bears", "add", "up"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    embed = embeddings(str(tmp_path), device="cpu")
    assert embed(["count the pears", "add up"]).shape == (2, 16)
    bank = SkillBank(embed=embeddings(sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")))
    bank.add("count the pears", "4", 1.0, "f")
    bank.add("add up", "7", 1.0, "f")
    assert [s.text for s in bank.retrieve("count the bears", "f", delta=-1)] == ["4", "7"]
