"""Vectors of texts by the package sentence-transformers, for :class:`trajkern.recipes.skillrl.SkillBank`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trajkern._checks import describe
from trajkern._extras import pip_install


def embeddings(model: Any = "Qwen/Qwen3-Embedding-0.6B", **options: Any) -> Callable[[Sequence[str]], Tensor]:
    """A function that maps n texts to their vectors ``[n, d]``: what ``SkillBank(embed=...)`` asks for.

    Args:
        model: a ``SentenceTransformer``; or what names one, a folder or a model of the hub, by default the one that
            SkillRL's authors take.
        **options: the constructor's, for a name, such as ``device``.

    Raises:
        ImportError: a name was given and the package is missing; it is in trajkern's extra "skills".
        TypeError: it is neither.
    """
    if isinstance(model, str):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            command = pip_install("skills", "sentence-transformers")
            raise ImportError(f"embeddings needs sentence-transformers: {command} ({error})") from error
        model = SentenceTransformer(model, **options)
    elif options or not hasattr(model, "encode"):
        raise TypeError(f"model must be a name, or a SentenceTransformer without options; got {describe(model)}")
    return lambda texts: model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
