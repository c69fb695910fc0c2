"""The shape of the thread blocks of `decode.cu` for a projection."""

from typing import NamedTuple

import torch

UNIT = 64  # columns
_SHARED_MEMORY = {(8, 0): 164 * 1024, (8, 7): 164 * 1024, (9, 0): 228 * 1024, (10, 0): 228 * 1024, (10, 3): 228 * 1024}
_LEAST_SHARED_MEMORY = 100 * 1024  # of a multiprocessor
_RESERVED = 1024  # bytes of it for every block
_BLOCKS_AT_ONCE = 4
_MOST_STAGES = 8
# What a multiprocessor could read while a block starts and ends, and while it waits for another of its cluster: about
# 20 bytes a nanosecond.
_BYTES_OF_A_START = 20_000
_BYTES_OF_A_CLUSTER = 5_000


class Block(NamedTuple):
    """What a block of threads computes, and how; see `decode.cu`.

    Args:
        row_tiles (`int`): tiles of 16 rows of a warp.
        row_warps (`int`): warps of a team, each with rows of its own.
        teams (`int`): teams of warps, each with columns of its own.
        token_tiles (`int`): tiles of 8 tokens.
        units (`int`): 64 columns each, of a chunk that is copied and multiplied at once.
        stages (`int`): chunks of a team in shared memory.
        cluster (`int`): blocks that share the columns.
    """

    row_tiles: int
    row_warps: int
    teams: int
    token_tiles: int
    units: int
    stages: int
    cluster: int

    @property
    def rows(self) -> int:
        """Of the weight."""
        return 16 * self.row_tiles * self.row_warps

    @property
    def tokens(self) -> int:
        """Of the activations."""
        return 8 * self.token_tiles

    @property
    def threads(self) -> int:
        """Of all its warps."""
        return 32 * self.row_warps * self.teams

    def shared_memory(self, value_dtype: torch.dtype) -> int:
        """Return the bytes it needs: rows with their gaps, in a queue, or the sums in its place; scales and biases."""
        row = self.units * (4 * 8 * value_dtype.itemsize + 8) + 16
        stage = self.rows * row + self.tokens * (128 * self.units + 16)
        return 6 * self.rows + max(self.teams * self.stages * stage, 4 * self.tokens * (self.rows + 4))


def tiles(
    token_tiles: int,
    outputs: int,
    features: int,
    value_dtype: torch.dtype,
    capability: tuple[int, int],
    multiprocessors: int,
) -> Block:
    """Return the block for a projection: of a few kinds, that with which the busiest multiprocessor reads the least.

    Every block reads the activations, for its share of the columns: the more rows it has, the fewer bytes are read in
    all, and the fewer multiprocessors have a block, unless a cluster of them shares the columns. The kinds are those
    that were the fastest, or nearly, for four shapes on one H100 (`benchmarks/results/decode_blocks.json`), picked by
    hand from those timings; the constants are guesses, and other shapes and GPUs were not timed.
    """
    bits_16, few = value_dtype.itemsize == 2, token_tiles <= 2
    shared_memory = _SHARED_MEMORY.get(capability, _LEAST_SHARED_MEMORY)

    def blocks_each(block: Block) -> int:
        return -(-(-(-outputs // block.rows) * block.cluster) // multiprocessors)

    def complete(row_tiles: int, row_warps: int, teams: int, cluster: int) -> Block:
        """With long chunks, where there are rows enough to copy, and the stages that there is room for."""
        block = Block(row_tiles, row_warps, teams, token_tiles, 1, 2, cluster if capability >= (9, 0) else 1)
        longest = 4 if few and block.rows >= 64 * value_dtype.itemsize else 2
        units = next(n for n in (longest, 2, 1) if features % (n * UNIT) == 0)
        # Blocks of a multiprocessor run side by side. Clusters of more than two were slow with room for one each:
        # probably they do not fill all multiprocessors, and the last of them waits for the first.
        side_by_side = min(max(blocks_each(block), 2 if block.cluster > 2 else 1), _BLOCKS_AT_ONCE)
        chunks = -(-features // (UNIT * units * teams * block.cluster))
        for room in (shared_memory // side_by_side, shared_memory):
            for stages in range(min(_MOST_STAGES, 1 + chunks), 1, -1):
                staged = block._replace(units=units, stages=stages)
                if staged.shared_memory(value_dtype) <= room - _RESERVED:
                    return staged
        return block._replace(stages=0)  # does not fit

    def cost(block: Block) -> float:
        weights = block.rows * (value_dtype.itemsize / 2 + 1 / 8)
        read = features / block.cluster * (weights + 2 * block.tokens)
        return blocks_each(block) * (read + _BYTES_OF_A_START) + _BYTES_OF_A_CLUSTER * (block.cluster - 1)

    kinds = (complete(*kind) for kind in _kinds(token_tiles, bits_16))
    return min((block for block in kinds if block.stages), key=cost)


def _kinds(token_tiles: int, bits_16: bool) -> list[tuple[int, int, int, int]]:
    """Return row tiles, row warps, teams and clusters; 8-bit weights take more work a byte, hence more warps a row."""
    if token_tiles <= 2:
        kinds = [(1, 1, 4, 2), (1, 4, 1, 1), (1, 4, 1, 2), (2, 4, 1, 1), (2, 4, 1, 2), (2, 8, 1, 1)]
        return kinds + ([(2, 2, 1, 8), (2, 7, 1, 1)] if bits_16 else [])  # 7 warps cannot copy long chunks of 8 bits
    if token_tiles == 4:
        return [(2, 2, 1, 8), (2, 7, 1, 2)] + ([(4, 2, 1, 4)] if bits_16 else [])
    return [(2, 7, 1, 1), (2, 7, 1, 2)] + ([(2, 4, 1, 4), (2, 2, 1, 8)] if bits_16 else [(1, 4, 1, 8)])
