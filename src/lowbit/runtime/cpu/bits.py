"""Signs packed as bits, 32 to a word."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def words_for(count: int) -> int:
    """Number of words that ``count`` signs need."""
    return -(-count // WORD)


def pack_signs(x: Tensor, dim: int = -1) -> Tensor:
    """Pack signs along ``dim`` into int32 words: bit ``i`` of word ``w`` is 1 where element ``32 w + i`` is at least 0 (NaN counts as negative).

    Args:
        x: Any shape and type.
        dim: Dimension to pack; its size becomes ``ceil(size / 32)``. Bits beyond the size are 0.
    """
    bits = (x >= 0).movedim(dim, -1)
    count = bits.shape[-1]
    bits = torch.nn.functional.pad(bits, (0, words_for(count) * WORD - count)).unflatten(-1, (words_for(count), WORD))
    weights = torch.ones((), dtype=torch.int64, device=x.device) << torch.arange(WORD, device=x.device)
    words = (bits.long() * weights).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int().movedim(-1, dim)


def unpack_bits(words: Tensor, count: int, dim: int = -1) -> Tensor:
    """The first ``count`` bits along ``dim`` of int32 ``words``, as booleans; the inverse of ``pack_signs``."""
    moved = words.movedim(dim, -1).unsqueeze(-1)
    bits = (moved >> torch.arange(WORD, device=words.device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., :count].bool().movedim(-1, dim)


def unpack_signs(words: Tensor, count: int, dim: int = -1) -> Tensor:
    """The first ``count`` signs along ``dim`` of int32 ``words``, float32 -1 and +1; the inverse of ``pack_signs``."""
    return unpack_bits(words, count, dim) * 2.0 - 1.0


def unpack_weight(words: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """The first ``count`` signs along the last dimension as float32 -1 and +1, and 0 where ``mask`` has no bit."""
    signs = unpack_signs(words, count)
    return signs if mask is None else signs * unpack_bits(mask, count)
