"""A small decoder-only transformer (rotary, RMSNorm, SwiGLU) on packed tokens, with a key-value cache for sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v [.., heads, head_dim] -> like q


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the built-in transformer.

    Args:
        layers: transformer blocks.
        width: size of a hidden state.
        heads: attention heads; must divide ``width`` into even parts.
        ffn: inner size of the SwiGLU.
    """

    layers: int = 2
    width: int = 64
    heads: int = 4
    ffn: int = 160

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width must be a multiple of 2 * model.heads = {2 * self.heads} (rotary turns pairs); "
                f"got {self.width}"
            )


class Cache:
    """Keys and values of the tokens sampled so far, one row a sequence, one column a position of the padded batch."""

    def __init__(self, keys: Tensor, values: Tensor, keep: Tensor, length: int = 0) -> None:
        self.keys, self.values = keys, values  # [layers, N, heads, room, head_dim]
        self.keep = keep  # [N, room] False on padding
        self.length = length  # columns filled

    def repeat(self, copies: int) -> Cache:
        """Every row ``copies`` times, copies adjacent."""
        keys, values = (x.repeat_interleave(copies, 1) for x in (self.keys, self.values))
        return Cache(keys, values, self.keep.repeat_interleave(copies, 0), self.length)


class Transformer(nn.Module):
    """``forward`` runs packed trajectories, ``extend`` continues padded sequences through a :class:`Cache`."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.width // config.heads
        self.embed = nn.Embedding(vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        self.apply(_initialise)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, rows: Tensor) -> Tensor:  # [T], [N+1], [P] -> [P, V]
        """Logits of ``rows`` only; attention stays inside each trajectory."""
        return self.head(self.hidden(tokens, cu_seqlens, rows))

    def hidden(self, tokens: Tensor, cu_seqlens: Tensor, rows: Tensor) -> Tensor:  # [T], [N+1], [P] -> [P, width]
        """What the head reads of ``rows``."""
        attend = PackedAttention(cu_seqlens, self.head_dim)
        x = self._blocks(self.embed(tokens), attend.positions, attend)
        return self.norm(x[rows])

    def start(self, count: int, room: int) -> Cache:
        """An empty cache for ``count`` sequences of at most ``room`` padded positions."""
        weight, c = self.embed.weight, self.config
        keys, values = weight.new_zeros(2, c.layers, count, c.heads, room, self.head_dim)
        return Cache(keys, values, torch.zeros(count, room, dtype=torch.bool, device=weight.device))

    def extend(self, tokens: Tensor, keep: Tensor, cache: Cache) -> Tensor:  # [N, S], [N, S] bool -> [N, V]
        """Append S positions, padded where ``keep`` is False, and return the logits after the last."""
        begin, end = cache.length, cache.length + tokens.shape[1]
        cache.keep[:, begin:end] = keep
        positions = (cache.keep[:, :end].cumsum(1)[:, begin:] - 1).clamp_min(0)
        attend = CachedAttention(cache, begin, end, self.head_dim)
        x = self._blocks(self.embed(tokens), positions, attend)
        cache.length = end
        return self.head(self.norm(x[:, -1]))

    def _blocks(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        rotation = rotary(positions, self.head_dim, x.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, lambda q, k, v, layer=layer: attend(layer, q, k, v))
        return x


class Block(nn.Module):
    """Pre-norm attention and SwiGLU on ``[.., width]``; how tokens see each other is the caller's ``attend``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_up = nn.Linear(width, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k = rotate(qkv[..., :2, :, :], rotation).unbind(-3)
        x = x + self.out(attend(q, k, qkv[..., 2, :, :]).flatten(-2))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class PackedAttention:
    """Causal attention inside each trajectory of a pack: padded to ``[N, longest]`` for two batched products."""

    def __init__(self, cu_seqlens: Tensor, head_dim: int) -> None:
        lengths = cu_seqlens.diff().long()
        self.count = lengths.numel()
        self.longest = int(lengths.max()) if self.count else 0
        trajectory = torch.repeat_interleave(torch.arange(self.count, device=lengths.device), lengths)
        total = torch.arange(trajectory.numel(), device=lengths.device)
        self.positions = total - cu_seqlens.long()[trajectory]  # [T]
        self.slot = trajectory * self.longest + self.positions  # [T] place in the padded [N * longest]
        causal = torch.ones(self.longest, self.longest, dtype=torch.bool, device=lengths.device).tril()
        self.hidden, self.scale = ~causal, 1 / math.sqrt(head_dim)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [T, heads, head_dim] each
        packed = torch.stack((q, k, v), 1)
        padded = packed.new_zeros(self.count * self.longest, *packed.shape[1:]).index_copy(0, self.slot, packed)
        q, k, v = padded.view(self.count, self.longest, *packed.shape[1:]).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(-1, -2)  # padding comes after every real key, so causal hides it
        out = scores.masked_fill(self.hidden, -torch.inf).softmax(-1) @ v
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.slot)


class CachedAttention:
    """Attention of the columns ``begin:end`` over everything cached, which it extends by them."""

    def __init__(self, cache: Cache, begin: int, end: int, head_dim: int) -> None:
        self.cache, self.begin, self.end, self.scale = cache, begin, end, 1 / math.sqrt(head_dim)
        column = torch.arange(end, device=cache.keep.device)
        causal = column <= column[begin:, None]
        # A padded query sees only padding; a finite bias keeps its unused row free of NaN.
        visible = causal & cache.keep[:, None, None, :end]  # [N, 1, S, end]
        bias = torch.zeros(visible.shape, dtype=cache.keys.dtype, device=visible.device)
        self.bias = bias.masked_fill(~visible, torch.finfo(bias.dtype).min)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [N, S, heads, head_dim] each
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[:, :, self.begin : self.end], values[:, :, self.begin : self.end] = k, v
        scores = (q * self.scale) @ keys[:, :, : self.end].transpose(-1, -2) + self.bias
        return (scores.softmax(-1) @ values[:, :, : self.end]).transpose(1, 2)


def rotary(positions: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """The unit complex number that turns each pair of channels at each position, ``[.., 1, 1, head_dim / 2]``."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim)
    angle = positions[..., None, None, None] * frequency
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:  # [.., heads, head_dim]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=1.0)
