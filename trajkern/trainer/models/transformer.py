"""A small decoder-only transformer (rotary, RMSNorm, SwiGLU) on packed tokens, with a key-value cache for sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trajkern.trainer.models.attention import Attend, Cache, CachedAttention, packed_attention
from trajkern.trainer.models.blocks import Layout
from trajkern.trainer.schema import Size, check_fields


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the built-in transformer.

    Args:
        layers: transformer blocks.
        width: size of a hidden state.
        heads: attention heads; must divide ``width`` into even parts.
        ffn: inner size of the SwiGLU.
    """

    layers: Size = 2
    width: Size = 64
    heads: Size = 4
    ffn: Size = 160

    def __post_init__(self) -> None:
        check_fields(self, "tiny.")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"tiny.width must be a multiple of 2 * tiny.heads = {2 * self.heads} (rotary turns pairs); "
                f"got {self.width}"
            )


class Transformer(nn.Module):
    """``forward`` runs packed trajectories or trees, ``extend`` continues padded sequences through a :class:`Cache`."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.width // config.heads
        self.embed = nn.Embedding(vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        self.apply(_initialise)

    def forward(self, tokens: Tensor, layout: Layout, rows: Tensor) -> Tensor:  # [T], _, [P] -> [P, V]
        """Logits of ``rows`` only; a token sees those before it in its trajectory, or on its path of the tree."""
        return self.head(self.hidden(tokens, layout, rows))

    def hidden(self, tokens: Tensor, layout: Layout, rows: Tensor) -> Tensor:  # [T], _, [P] -> [P, width]
        """What the head reads of ``rows``."""
        attend = packed_attention(layout, self.head_dim)
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
