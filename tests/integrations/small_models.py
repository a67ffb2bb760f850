"""Every text-generation class of transformers, made small from its config, and what comes of it here.

``python -m tests.integrations.small_models`` writes the table of docs/models.md.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import trajkern as tk
from trajkern.integrations._model_head import measured_form
from trajkern.integrations._own_forward import Parts
from trajkern.integrations.transformers import log_probs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
MARK = "<!-- by tests/integrations/small_models.py from here on -->"
V = 53
LARGEST = 8_000_000  # parameters
SIZES = {
    V: "vocab_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "n_routed_experts num_local_experts mamba_n_heads linear_num_value_heads rotary_dim index_topk sliding_window "
    "attention_window_size",
    2: "num_hidden_layers num_key_value_heads n_layer n_layers num_layers decoder_layers encoder_layers index_n_heads "
    "num_experts_per_tok num_experts_per_token linear_num_key_heads",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_d_state mamba_chunk_size chunk_size state_size "
    "linear_key_head_dim linear_value_head_dim query_pre_attn_scalar index_head_dim dim_head block_size",
    16: "moe_intermediate_size kv_lora_rank q_lora_rank qk_head_dim shared_expert_intermediate_size "
    "shared_intermediate_size mamba_d_head",
    32: "hidden_size d_model n_embd attention_hidden_size emb_dim embedding_size lru_width embedding_dim "
    "word_embed_proj_dim",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff dff ffn_hidden_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len",
}
_LISTS = ("IMAGE_TEXT_TO_TEXT", "MASKED_LM", "MULTIMODAL_LM", "PRETRAINING", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
OTHERS = {  # class -> its model type
    name: kind
    for listed in _LISTS
    for kind, names in getattr(modeling_auto, f"MODEL_FOR_{listed}_MAPPING_NAMES", {}).items()
    for name in ([names] if isinstance(names, str) else names)
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
WINDOWED = ["sliding_attention", "full_attention"]
# what else a config needs to be small, or to be what its model can take
MORE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": WINDOWED,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in WINDOWED},
    },
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_d_head": 8, "lm_head_multiplier": 0.3},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": WINDOWED,
        "vocab_size_per_layer_input": V,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
        "laurel_rank": 4,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "layer_types": WINDOWED,
        "vocab_size_per_layer_input": V,
        "hidden_size_per_layer_input": 8,
    },
    "granite": {"logits_scaling": 3.0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hyperclovax": {"logits_scaling": 3.0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "feed_forward_size": 32,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 11,
        "shape_vocab_size": 11,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_head_dim": 16, "attention_hidden_size": 64, "mamba_dt_rank": 4},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 2, "attention_hidden_size": 64},
}


class Outcome(NamedTuple):
    """Of one class: the head that was found, or why there is none; "wrong" is what may not be."""

    head: str
    packed: str
    tree: str


def build(kind: str) -> Any:
    """The class of a model type, small; raises where its config does not allow it."""
    cls, config = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]), CONFIG_MAPPING[kind]
    wanted = cls.config_class or config
    if wanted is not config and any(isinstance(x, wanted) for x in vars(config()).values()):
        config = wanted
    made = _small(config, MORE.get(kind, {}))
    if hasattr(made, "is_decoder"):
        made.is_decoder = True
    return _built(cls, made)


def build_other(name: str) -> Any:
    """A class with a head that is in another list than text generation's: images and sounds, or not causal."""
    kind = OTHERS[name]
    return _built(getattr(transformers, name), _small(CONFIG_MAPPING[kind], MORE.get(kind, {})))


def _built(cls: Any, made: Any) -> Any:
    for part in (made, *(x for x in vars(made).values() if isinstance(x, transformers.PreTrainedConfig))):
        part._attn_implementation = "eager"
    with torch.device("meta"):
        count = sum(x.numel() for x in cls(copy.deepcopy(made)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} million parameters at the least")
    torch.manual_seed(0)
    model = cls(made).eval()
    for x in model.parameters():
        if x.ndim > 1:
            x.data.mul_(3)  # so that no softmax is nearly flat
    return model


def _small(config: Any, more: dict[str, Any]) -> Any:
    options: dict[str, Any] = {}
    for name, value in vars(config()).items():
        if isinstance(value, transformers.PreTrainedConfig):
            options[name] = _small(type(value), MORE.get(value.model_type, {}))
        elif name in SMALL and type(value) is int and value > SMALL[name]:
            options[name] = SMALL[name]
        elif name.endswith(("token_id", "token_index")) and type(value) is int and value >= V:
            options[name] = 1
    if "qk_rope_head_dim" in options:  # the heads share one key
        options.pop("head_dim", None)
        options["num_key_value_heads"] = SMALL["num_attention_heads"]
    options |= more
    try:
        return config(**options)
    except Exception:  # some check what they are given before all of it is there
        made = config()
        for name, value in options.items():
            setattr(made, name, value)
        layers = getattr(made, "num_hidden_layers", 2)
        for name, value in list(vars(made).items()):
            if isinstance(value, list) and len(value) > layers and name.endswith(("types", "layers")):
                setattr(made, name, value[:layers])
        return made


def outcome(kind: str) -> Outcome:
    try:
        model = build(kind)
        _own(model, torch.arange(5, 12))
    except Exception as error:
        return Outcome(f"not built small: {_short(error)}", "", "")
    g = torch.Generator().manual_seed(1)
    batch = _batch(g)
    rows = torch.cat([_own(model, x) for x in batch.tokens.split([5, 7, 3])])
    tree = tk.Tree(torch.tensor([-1, 0, 0, 1, 1]), torch.tensor([3, 6, 4, 7, 2]))
    tokens = torch.randint(5, V, (tree.num_tokens,), generator=g)
    bounds = tree.flat_cu_seqlens.tolist()
    paths = [tree.flat_index[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    alone = torch.cat([_own(model, tokens[path]) for path in paths])
    packed = _beside(lambda: log_probs(model, batch), rows)
    in_tree = _beside(lambda: log_probs(model, tree, tokens)[torch.cat(paths)], alone)
    return Outcome(_head(model) if packed == "right" else "", packed, in_tree)


def other_outcome(name: str) -> str:
    """What comes of a class of OTHERS: "right", "refused: ..." or "not built small: ..."; never "wrong"."""
    try:
        model = build_other(name)
    except Exception as error:
        return f"not built small: {_short(error)}"
    batch = _batch(torch.Generator().manual_seed(1))
    try:
        rows = torch.cat([_own(model, x, {}) for x in batch.tokens.clone().split([5, 7, 3])])
        head, other = (model(input_ids=torch.tensor([[5, 6, *x]])).logits[0, 1] for x in ((7, 8, 9), (17, 18, 19)))
    except Exception:
        rows = None
    found = _beside(lambda: log_probs(model, batch), batch.tokens.double() if rows is None else rows)
    if found == "right" and (head - other).abs().max() > 1e-4 * head.abs().max():
        return "wrong: it reads what it predicts"
    return "its own forward fails" if rows is None and found.startswith("wrong") else found


def _batch(generator: torch.Generator) -> tk.PackedBatch:
    return tk.PackedBatch(
        torch.randint(5, V, (15,), generator=generator),
        torch.tensor([0, 5, 5, 12, 15]),
        torch.ones(15, dtype=torch.bool).index_fill(0, torch.tensor([0, 5, 12]), False),
        torch.zeros(4, dtype=torch.long),
    )


def _own(model: Any, tokens: Tensor, options: Any = MappingProxyType({"use_cache": False})) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=tokens[None], **options).logits[0, :-1].double()
    return torch.cat((logits.new_zeros(1), logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]))


def _beside(ours: Any, own: Tensor) -> str:
    try:
        with torch.no_grad():
            actual = ours().double()
    except (TypeError, ValueError) as error:
        assert "model must" in str(error) or "tokens must stand for text" in str(error)
        return f"refused: {_short(error)}"
    return "right" if (actual - own).abs().max() < 2e-4 else f"wrong by {float((actual - own).abs().max()):.2g}"


def _head(model: Any) -> str:
    form = measured_form(Parts(model, model, model))
    parts = [] if form.softcap is None else [f"softcap {form.softcap:g}"]
    parts += [] if form.logit_scale == 1 else [f"scale {form.logit_scale:.4g}"]
    parts += [] if form.vocabulary is None else [f"{form.vocabulary} logits"]
    parts += ["transformed before it"] if form.from_head else []
    return ", ".join(parts) or "plain"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    for said, why in {
        "model must be causal": "it reads what it predicts",
        "linear_attention": "recurrent layers",
        "is recurrent": "recurrent layers",
        "'hybrid'": "recurrent layers",
        "'conv'": "convolutions",
        "chunked_attention": "attention in chunks",
        "by sliding_window alone": "attention limited by more than a window",
        "as part of a Tree": "positions or mask not honoured",
        "model must run a Tree": "takes no mask of who sees whom",
        "as part of padded rows": "its own forward wants more than tokens",
        "apply its head to every token": "several streams of hidden states",
        "layers": "attention of a kind of its own",
    }.items():
        if said in text:
            return why
    return text[:60]


def row(kind: str) -> str:
    """The class's line of the table."""
    return f"| {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]} (`{kind}`) | {' | '.join(outcome(kind))} |"


def table() -> str:
    lines = ["| class | its head | packed | tree |", "|---|---|---|---|"]
    return "\n".join([*lines, *map(row, sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))]) + "\n"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    text = PAGE.read_text().split(MARK)[0]
    PAGE.write_text(f"{text}{MARK}\n\ntransformers {transformers.__version__}\n\n{table()}")
