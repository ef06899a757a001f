"""Codes the sorted positions of a ticket near the entropy bound, log2 C(n, k) bits for k of n units.

The gaps between positions are split as in Rice coding (Rice and Plaunt, 1971): the low bits are stored as they are,
the high parts in unary. Rice coding alone is up to 4 % above the bound. Here the unary bits are divided into blocks
of 63. Each block is stored as its number of ones and its rank among all blocks with that number (Raman, Raman and Rao,
"Succinct indexable dictionaries", 2002). This adapts to the local density, and stays within 1.3 % of the bound at
every density. docs/checkpoint-format.md has the layout.

Coding and decoding use array operations, on many parameters together, since a ticket has positions in hundreds of
small parameters. Positions are coded in chunks, and the number of chunks in work at one time is limited, so the memory
beyond the result is bounded. A code cannot express positions that are unsorted or repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1 << 18  # positions
BLOCK = 63  # bits, so that the rank of a block fits in 64 bits
# The fields of a chunk's header, from the lowest bit of a 32-bit word: low_bits, typical, rice, blocks.
HEADER_BITS = (6, 6, 3, 17)
HEADER_AT = (0, 6, 12, 15)
MAX_LOW_BITS = 40
# With the encoder's choice of `low_bits` there are fewer unary bits per position.
MAX_UNARY = 6

BINOMIALS = np.array([[comb(n, k) for k in range(BLOCK + 1)] for n in range(BLOCK)])
RANK_BITS = np.array([(comb(BLOCK, k) - 1).bit_length() for k in range(BLOCK + 1)])

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


class CodeError(ValueError):
    """Bytes that are not a valid code of positions.

    Attributes:
        index: The index of the invalid code, if several codes are decoded together.
    """

    index = 0


@dataclass(frozen=True)
class Code:
    """Coded positions, a ``uint8`` tensor, which should decode to `count` positions in [0, units)."""

    code: Tensor
    count: int
    units: int


def encode_positions(positions: Tensor) -> Tensor:
    """Encode sorted, unique, non-negative positions of shape ``(k,)`` as a ``uint8`` tensor of shape ``(m,)``."""
    return encode_all([positions])[0]


def decode_positions(code: Tensor, count: int, units: int) -> Tensor:
    """Decode `count` positions, sorted, unique and in [0, units), as an ``int64`` tensor of shape ``(count,)``.

    Raises:
        CodeError: If `code` is not exactly the code of `count` positions in that range.
    """
    return decode_all([Code(code, count, units)])[0]


def encode_all(positions: Sequence[Tensor]) -> list[Tensor]:
    """Encode several tensors of positions together, which is faster than `encode_positions` for each."""
    parts: list[list[Bytes]] = [[] for _ in positions]
    for batch in _batches(_gap_chunks(positions)):
        for (i, _), chunk in zip(batch, _encode_gaps([gaps for _, gaps in batch]), strict=True):
            parts[i] += chunk
    return [torch.from_numpy(np.concatenate(code)) if code else torch.empty(0, dtype=torch.uint8) for code in parts]


def _gap_chunks(positions: Sequence[Tensor]) -> Iterator[tuple[int, Ints]]:
    for i, tensor in enumerate(positions):
        array = tensor.detach().cpu().numpy()
        last = -1
        for start in range(0, len(array), CHUNK):
            chunk = array[start : start + CHUNK].astype(np.int64)
            yield i, np.diff(chunk, prepend=last) - 1
            last = int(chunk[-1])


def _batches(chunks: Iterable[tuple[int, Ints]]) -> Iterator[list[tuple[int, Ints]]]:
    """Group chunks into lists of about `CHUNK` positions."""
    batch: list[tuple[int, Ints]] = []
    for chunk in chunks:
        batch.append(chunk)
        if sum(len(gaps) for _, gaps in batch) >= CHUNK:
            yield batch
            batch = []
    if batch:
        yield batch


def decode_all(codes: Sequence[Code]) -> list[Tensor]:
    """Decode several codes together, which is faster than `decode_positions` for each.

    Raises:
        CodeError: If a code is not valid. The error's `index` says which one.
    """
    gaps: list[Ints] = []
    waiting: list[_Chunk] = []
    size = 0
    for i, code in enumerate(codes):
        try:
            _check_count(code)
            gaps.append(np.empty(code.count, dtype=np.int64))
            for chunk in _chunks_of(code, gaps[i], i):
                waiting.append(chunk)
                size += len(chunk.gaps)
                if size >= CHUNK:
                    _decode_gaps(waiting)
                    waiting, size = [], 0
        except CodeError as error:
            if error.args[0] != _RANK:
                error.index = i
            raise
    _decode_gaps(waiting)
    positions = []
    for i, (code, array) in enumerate(zip(codes, gaps, strict=True)):
        array += 1
        last = array.sum(dtype=np.float64) - 1  # in floating point, since the sum of damaged gaps could overflow
        if last >= code.units:
            too_high = CodeError(f"there are positions up to {last:.0f}, but only {code.units} units")
            too_high.index = i
            raise too_high
        np.cumsum(array, out=array)
        array -= 1
        positions.append(torch.from_numpy(array))
    return positions


class _Chunk(NamedTuple):
    """A chunk of a code whose blocks are not decoded yet."""

    gaps: Ints  # filled in when the blocks are decoded
    low_bits: int
    low: Ints
    ones: Ints
    ranks: Bytes  # their bits, without the leading zeros of a rank
    source: int  # the index of its code


def most_positions(size: int) -> int:
    """The most positions that are decoded from `size` bytes of codes without values beside them.

    A code of neighbouring positions has 500 of them in a byte, so without a limit a small file could fill the memory.
    The limit allows 8 million positions in any file, and a ticket of half of all parameters at any size.
    """
    return max(1 << 23, 8 * size)


def _check_count(code: Code) -> None:
    if not 0 <= code.count <= code.units:
        raise CodeError(f"{code.count} positions cannot be among {code.units} units")
    if len(code.code) * CHUNK < code.count:  # a chunk has at least one byte
        raise CodeError(f"{len(code.code)} bytes cannot hold {code.count} positions")


def _chunks_of(code: Code, gaps: Ints, index: int) -> Iterator[_Chunk]:
    reader = _Reader(code.code.detach().cpu().numpy())
    for start in range(0, code.count, CHUNK):
        yield _read_chunk(reader, gaps[start : start + CHUNK], index)
    if reader.left:
        raise CodeError(f"{reader.left} bytes are left over")


class _Reader:
    """Reads a code from front to back, in bytes and bits."""

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
        """Read `count` bits, and skip the padding up to the next whole byte."""
        data = self.take(-(-count // 8))
        _check_padding(data, count)
        return np.unpackbits(data, count=count, bitorder="little")

    def planes(self, count: int, planes: int) -> Ints:
        """Read `count` numbers of `planes` bits each."""
        numbers = np.zeros(count, dtype=np.int64)
        bits = self.bits(count * planes).reshape(planes, count)
        for first in range(0, planes, 8):  # eight planes make one byte of every number
            byte = bits[first]
            for i in range(first + 1, min(first + 8, planes)):
                byte |= bits[i] << i - first
            numbers |= byte.astype(np.int64) << first
        return numbers

    def unary(self, count: int, most: int) -> Ints:
        """Read `count` numbers in unary, each at most `most`."""
        bits = 4 * count  # usually enough
        ones = self._ones(bits)
        while len(ones) < count and bits < count * (most + 1):
            bits *= 4
            ones = self._ones(min(bits, count * (most + 1)))
        ones = ones[:count]
        if len(ones) < count:
            raise CodeError("it ends too early")
        end = int(ones[-1]) + 1
        _check_padding(self.take(-(-end // 8)), end)
        return _gaps_between(ones)

    def _ones(self, count: int) -> Ints:
        """Where the next `count` bits are 1."""
        return _where(np.unpackbits(self.data[self.at : self.at + -(-count // 8)], bitorder="little"))


def _check_padding(data: Bytes, count: int) -> None:
    """Check that no bit after the first `count` bits of `data` is set."""
    if count % 8 and int(data[-1]) >> count % 8:
        raise CodeError("its padding is not zero")


def _where(bits: Bytes) -> Ints:
    return bits.view(bool).nonzero()[0]  # much faster than of bytes


def _gaps_between(sorted_numbers: Ints) -> Ints:
    """As ``np.diff(sorted_numbers, prepend=-1) - 1``, which takes most of the time of small arrays."""
    gaps = sorted_numbers.copy()
    gaps[1:] -= sorted_numbers[:-1]
    gaps[1:] -= 1
    return gaps


def _bits(bits: NDArray[np.bool_] | Bytes) -> Bytes:
    return np.packbits(bits, bitorder="little")


def _planes(numbers: Ints, planes: int) -> Bytes:
    """Pack the lowest bits of all numbers, then their second bits, and so on, without padding between them."""
    bits = np.empty((planes, len(numbers)), dtype=np.uint8)
    for i in range(planes):
        bits[i] = numbers >> i & 1
    return _bits(bits.reshape(-1))


def _unary(numbers: Ints, multiple: int = 1) -> Bytes:
    """The unary code of numbers, with a byte for each bit, padded with zeros to a multiple of `multiple` bits."""
    ends = np.cumsum(numbers + 1)
    bits = np.zeros(-(-int(ends[-1]) // multiple) * multiple, dtype=np.uint8)
    bits[ends - 1] = 1
    return bits


def _encode_gaps(chunks: Sequence[Ints]) -> Iterator[list[Bytes]]:
    """The code of each chunk of gaps."""
    low_bits = []
    unary = []
    for gaps in chunks:
        mean = (int(gaps.sum()) + len(gaps)) / len(gaps)
        low_bits.append(max(int(np.floor(np.log2(0.45 * mean))), 0))  # then 20 to 40 % of the unary bits are ones
        unary.append(_unary(gaps >> low_bits[-1], BLOCK).reshape(-1, BLOCK))
    all_ones, all_ranks = _rank(np.ascontiguousarray(np.concatenate(unary).T))
    ends = np.cumsum([len(blocks) for blocks in unary])[:-1]
    for gaps, low, ones, ranks in zip(
        chunks, low_bits, np.split(all_ones, ends), np.split(all_ranks, ends), strict=True
    ):
        typical = int(np.median(ones))
        codes = np.where(ones >= typical, 2 * (ones - typical), 2 * (typical - ones) - 1)
        rice = min(range(1 << HEADER_BITS[2]), key=lambda r: int((codes >> r).sum()) + (r + 1) * len(codes))
        header = sum(value << at for value, at in zip((low, typical, rice, len(ones)), HEADER_AT, strict=True))
        rank_bits = np.unpackbits(ranks.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        yield [
            np.frombuffer(header.to_bytes(4, "little"), dtype=np.uint8),
            _planes(gaps, low),
            _planes(codes, rice),
            _bits(_unary(codes >> rice)),
            _bits(rank_bits[_in_rank(ones)]),
        ]


def _read_chunk(reader: _Reader, gaps: Ints, source: int) -> _Chunk:
    count = len(gaps)
    header = int.from_bytes(reader.take(4).tobytes(), "little")
    low_bits, typical, rice, blocks = (
        header >> at & (1 << bits) - 1 for at, bits in zip(HEADER_AT, HEADER_BITS, strict=True)
    )
    if low_bits > MAX_LOW_BITS or not 0 < blocks <= MAX_UNARY * count // BLOCK + 1:
        raise CodeError("the header of a chunk is not possible")
    low = reader.planes(count, low_bits)
    codes = reader.planes(blocks, rice)
    codes |= reader.unary(blocks, 2 * BLOCK >> rice) << rice
    ones = typical + (codes >> 1 ^ -(codes & 1))  # 0, -1, 1, -2, ... from `typical`
    if ones.min() < 0 or ones.max() > BLOCK or ones.sum() != count:
        raise CodeError("the counts of ones are not possible")
    return _Chunk(gaps, low_bits, low, ones, reader.bits(int(RANK_BITS[ones].sum())), source)


def _decode_gaps(chunks: Sequence[_Chunk]) -> None:
    """Decode the blocks of all chunks together, and fill in the chunks' gaps."""
    if not chunks:
        return
    counts = [len(chunk.ones) for chunk in chunks]
    ones = np.concatenate([chunk.ones for chunk in chunks])
    rank_bits = np.zeros((len(ones), 64), dtype=np.uint8)
    rank_bits[_in_rank(ones)] = np.concatenate([chunk.ranks for chunk in chunks])
    ranks = np.packbits(rank_bits, axis=1, bitorder="little").view("<u8")[:, 0].astype(np.int64)
    blocks, possible = _unrank(ones, ranks)
    if not possible.all():
        wrong = int(np.flatnonzero(~possible)[0])
        error = CodeError(_RANK)
        error.index = chunks[int(np.searchsorted(np.cumsum(counts), wrong, side="right"))].source
        raise error
    unary = _where(blocks.T.reshape(-1))
    high = _gaps_between(unary)
    first, taken = 0, 0
    for chunk, count in zip(chunks, counts, strict=True):
        high[taken] = unary[taken] - first * BLOCK
        np.left_shift(high[taken : taken + len(chunk.gaps)], chunk.low_bits, out=chunk.gaps)
        np.bitwise_or(chunk.gaps, chunk.low, out=chunk.gaps)
        first, taken = first + count, taken + len(chunk.gaps)


_RANK = "a rank is not possible"


def _in_rank(ones: Ints) -> NDArray[np.bool_]:
    """A mask of shape ``(blocks, 64)``: the bits that the rank of each block takes."""
    return np.arange(64) < RANK_BITS[ones][:, None]


def _rank(blocks: Bytes) -> tuple[Ints, Ints]:
    """The number of ones in each block, and its rank in the combinatorial number system.

    `blocks` has shape ``(63, blocks)``, with a byte for each bit.
    """
    ones = np.zeros(blocks.shape[1], dtype=np.int64)
    ranks = np.zeros_like(ones)
    for i, bits in enumerate(blocks):
        ones += bits
        ranks += bits * BINOMIALS[i][ones]
    return ones, ranks


def _unrank(ones: Ints, ranks: Ints) -> tuple[Bytes, NDArray[np.bool_]]:
    """The blocks with these numbers of ones and these ranks, of shape ``(63, blocks)``; and which are valid."""
    left, ranks = ones.copy(), ranks.copy()
    blocks = np.empty((BLOCK, len(ones)), dtype=np.uint8)
    value = np.empty_like(ranks)
    for i in reversed(range(BLOCK)):
        np.take(BINOMIALS[i], left, out=value, mode="clip")  # below 0 the block is not valid whatever comes
        bits = ranks >= value
        value *= bits
        ranks -= value
        left -= bits
        blocks[i] = bits
    return blocks, (ranks == 0) & (left == 0)
