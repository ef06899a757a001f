"""Codes the sorted positions of a ticket near the entropy bound, log2 C(n, k) bits for k of n units.

The gaps between positions are split as in Rice coding (Rice and Plaunt, 1971): their low bits are stored as they are,
their high parts in unary. Rice coding stops there, up to 4 % above the bound. Here the unary bits are cut into blocks
of 63, and each block becomes the number of its ones and its rank among all blocks with as many (Raman, Raman and Rao,
"Succinct indexable dictionaries", 2002), which follows the local density and stays within 1.3 % of the bound at every
density. docs/checkpoint-format.md has the layout.

Everything is decoded by counting and scattering whole arrays. Positions are coded in chunks, so memory beyond the
result is bounded, and a code cannot express positions that are out of order or repeated.
"""

from __future__ import annotations

from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1 << 18  # positions
BLOCK = 63  # bits; the rank of a block then fits 64
# A chunk's header, from the lowest bit of a 32-bit word: low_bits, typical, rice, blocks.
HEADER_BITS = (6, 6, 3, 17)
HEADER_AT = (0, 6, 12, 15)
MAX_LOW_BITS = 40
# The encoder's choice of `low_bits` leaves fewer unary bits than that for each position.
MAX_UNARY = 6

BINOMIALS = np.array([[comb(n, k) for k in range(BLOCK + 1)] for n in range(BLOCK)])
RANK_BITS = np.array([(comb(BLOCK, k) - 1).bit_length() for k in range(BLOCK + 1)])

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


class CodeError(ValueError):
    """Bytes that no positions are coded as."""


def encode_positions(positions: Tensor) -> Tensor:
    """Code sorted, unique, non-negative positions of shape ``(k,)`` as bytes, a ``uint8`` tensor of shape ``(m,)``."""
    own = positions.detach().cpu().numpy()
    chunks: list[Bytes] = []
    last = -1
    for start in range(0, len(own), CHUNK):
        chunk = own[start : start + CHUNK].astype(np.int64)
        chunks += _encode_gaps(np.diff(chunk, prepend=last) - 1)
        last = int(chunk[-1])
    return torch.from_numpy(np.concatenate(chunks)) if chunks else torch.empty(0, dtype=torch.uint8)


def decode_positions(code: Tensor, count: int, units: int) -> Tensor:
    """The `count` positions coded in `code`, sorted, unique and in [0, units): an ``int64`` tensor ``(count,)``.

    Raises:
        CodeError: If `code` is not exactly the code of so many positions in that range.
    """
    if not 0 <= count <= units:
        raise CodeError(f"{count} positions cannot be among {units} units")
    if len(code) * CHUNK < count:  # a chunk takes more than a byte
        raise CodeError(f"{len(code)} bytes cannot hold {count} positions")
    source = _Reader(code.detach().cpu().numpy())
    positions = np.empty(count, dtype=np.int64)
    last = -1
    for start in range(0, count, CHUNK):
        own = positions[start : start + CHUNK]
        np.cumsum(_decode_gaps(source, len(own)) + 1, out=own)
        own += last
        last = int(own[-1])
        if last >= units:
            raise CodeError(f"there are positions up to {last} among {units} units")
    if source.left:
        raise CodeError(f"{source.left} bytes are left over")
    return torch.from_numpy(positions)


class _Reader:
    """Takes bytes and bits off the front of a code."""

    def __init__(self, data: Bytes) -> None:
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> Bytes:
        if count > self.left:
            raise CodeError("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def bits(self, count: int) -> Bytes:
        """`count` bits, and on to the next whole byte."""
        own = self.take(-(-count // 8))
        bits = np.unpackbits(own, bitorder="little")
        if bits[count:].any():
            raise CodeError("its padding is not zero")
        return bits[:count]

    def planes(self, count: int, planes: int) -> Ints:
        """`count` numbers of `planes` bits each."""
        numbers = np.zeros(count, dtype=np.int64)
        for i, plane in enumerate(self.bits(count * planes).reshape(planes, count)):
            numbers |= plane.astype(np.int64) << i
        return numbers

    def unary(self, count: int, most: int) -> Ints:
        """`count` numbers in unary, each up to `most`."""
        window = self.data[self.at : self.at + -(-count * (most + 1) // 8)]
        ones = np.flatnonzero(np.unpackbits(window, bitorder="little"))[:count]
        if len(ones) < count:
            raise CodeError("it ends too early")
        self.bits(int(ones[-1]) + 1)
        return np.diff(ones, prepend=-1) - 1


def _bits(bits: NDArray[np.bool_] | Bytes) -> Bytes:
    return np.packbits(bits, bitorder="little")


def _planes(numbers: Ints, planes: int) -> Bytes:
    """The lowest bits of all numbers, then the next ones, and so on, without padding between them."""
    bits = np.empty((planes, len(numbers)), dtype=np.uint8)
    for i in range(planes):
        bits[i] = numbers >> i & 1
    return _bits(bits.reshape(-1))


def _unary(numbers: Ints, multiple: int = 1) -> Bytes:
    """The unary code of numbers, a byte for each bit, padded with zeros to a multiple of so many bits."""
    ends = np.cumsum(numbers + 1)
    bits = np.zeros(-(-int(ends[-1]) // multiple) * multiple, dtype=np.uint8)
    bits[ends - 1] = 1
    return bits


def _encode_gaps(gaps: Ints) -> list[Bytes]:
    mean = (int(gaps.sum()) + len(gaps)) / len(gaps)
    low_bits = max(int(np.floor(np.log2(0.45 * mean))), 0)  # so that 20 to 40 % of the unary bits are ones
    blocks = np.ascontiguousarray(_unary(gaps >> low_bits, BLOCK).reshape(-1, BLOCK).T)
    ones, ranks = _rank(blocks)
    typical = int(np.median(ones))
    codes = np.where(ones >= typical, 2 * (ones - typical), 2 * (typical - ones) - 1)
    rice = min(range(1 << HEADER_BITS[2]), key=lambda r: int((codes >> r).sum()) + (r + 1) * len(codes))
    header = sum(value << at for value, at in zip((low_bits, typical, rice, len(ones)), HEADER_AT, strict=True))
    rank_bits = np.unpackbits(ranks.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    return [
        np.frombuffer(header.to_bytes(4, "little"), dtype=np.uint8),
        _planes(gaps, low_bits),
        _planes(codes, rice),
        _bits(_unary(codes >> rice)),
        _bits(rank_bits[_in_rank(ones)]),
    ]


def _decode_gaps(source: _Reader, count: int) -> Ints:
    header = int.from_bytes(source.take(4).tobytes(), "little")
    low_bits, typical, rice, blocks = (
        header >> at & (1 << bits) - 1 for at, bits in zip(HEADER_AT, HEADER_BITS, strict=True)
    )
    if low_bits > MAX_LOW_BITS or not 0 < blocks <= MAX_UNARY * count // BLOCK + 1:
        raise CodeError("the header of a chunk is not possible")
    low = source.planes(count, low_bits)
    codes = source.planes(blocks, rice)
    codes |= source.unary(blocks, 2 * BLOCK >> rice) << rice
    ones = typical + np.where(codes & 1, -(codes + 1) // 2, codes // 2)
    if ones.min() < 0 or ones.max() > BLOCK or ones.sum() != count:
        raise CodeError("the counts of ones are not possible")
    in_rank = _in_rank(ones)
    rank_bits = np.zeros((blocks, 64), dtype=np.uint8)
    rank_bits[in_rank] = source.bits(int(RANK_BITS[ones].sum()))
    ranks = np.packbits(rank_bits, axis=1, bitorder="little").view("<u8")[:, 0].astype(np.int64)
    unary = np.flatnonzero(_unrank(ones, ranks).T)
    return (np.diff(unary, prepend=-1) - 1 << low_bits) | low


def _in_rank(ones: Ints) -> NDArray[np.bool_]:
    """Which of 64 bits a rank takes: a mask of shape ``(blocks, 64)``."""
    return np.arange(64) < RANK_BITS[ones][:, None]


def _rank(blocks: Bytes) -> tuple[Ints, Ints]:
    """The number of ones in each block of shape ``(63, blocks)``, and its rank in the combinatorial number system."""
    ones = np.zeros(blocks.shape[1], dtype=np.int64)
    ranks = np.zeros_like(ones)
    for i, bits in enumerate(blocks):
        ones += bits
        ranks += bits * BINOMIALS[i][ones]
    return ones, ranks


def _unrank(ones: Ints, ranks: Ints) -> Bytes:
    """The blocks, of shape ``(63, blocks)``, with so many ones and of that rank."""
    left, ranks = ones.copy(), ranks.copy()
    blocks = np.zeros((BLOCK, len(ones)), dtype=np.uint8)
    for i in reversed(range(BLOCK)):
        value = BINOMIALS[i][left]
        bits = ranks >= value
        ranks -= value * bits
        left -= bits
        blocks[i] = bits
    if ranks.any() or left.any():
        raise CodeError("a rank is not possible")
    return blocks
