"""The shape of the thread blocks of `decode.cu` for a projection."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

UNIT = 64  # columns
_SHARED_MEMORY = {(8, 0): 164 * 1024, (8, 7): 164 * 1024, (9, 0): 228 * 1024, (10, 0): 228 * 1024, (10, 3): 228 * 1024}
_LEAST_SHARED_MEMORY = 100 * 1024  # of a multiprocessor
_RESERVED = 1024  # bytes of it for every block
_BLOCKS_AT_ONCE = 4
_MOST_STAGES = 8
_SCHEDULERS = 4  # of a multiprocessor, each with tensor cores of its own
_REGISTERS = 65536  # of a multiprocessor
_MOST_REGISTERS = 255  # of a thread
# Of a multiprocessor, in nanoseconds. Fitted to the 126 times of `benchmarks/results/decode_blocks.json`, of 16-bit
# activations on one H100, which their sum gives with a root mean square error of 10 % if 32 clusters of 4 and 15 of 8
# blocks are taken to fit at once (15 % with 16 of 8): what a multiprocessor reads and what it computes add up.
_START, _START_OF_A_CLUSTER = 3000, 750
_BYTE_OF_A_WEIGHT, _BYTE_OF_X = 0.036, 0.005  # one comes from memory, the other was read by another block
_LDMATRIX = 2.4
# What a multiprocessor could read while a block starts and ends, and while it waits for another of its cluster: about
# 20 bytes a nanosecond.
_BYTES_OF_A_START = 20_000
_BYTES_OF_A_CLUSTER = 5_000
_PRODUCT = 2.3  # of mma.sp


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

    @property
    def registers(self) -> int:
        """Of a thread, about: the sums, and as many again for operands on their way; NVRTC allots 64 to 255."""
        return min(64 + 10 * self.row_tiles * self.token_tiles, _MOST_REGISTERS)

    def shared_memory(self, value_dtype: torch.dtype, input_dtype: torch.dtype) -> int:
        """Return the bytes it needs: rows with their gaps, in a queue, or the sums in its place; scales and biases."""
        gap = 16 if input_dtype.itemsize == 1 and self.units >= 4 else 0  # between the indices of rows
        row = self.units * (4 * 8 * value_dtype.itemsize + 8) + 16 + gap
        stage = self.rows * row + self.tokens * (UNIT * self.units * input_dtype.itemsize + 16)
        scales = 6 * self.rows + (4 * self.tokens if input_dtype.itemsize == 1 else 0)
        return scales + max(self.teams * self.stages * stage, 4 * self.tokens * (self.rows + 4))

    def copies_whole_rows(self, value_dtype: torch.dtype, input_dtype: torch.dtype) -> bool:
        """Tell whether a team's threads divide into whole rows of what they copy, in pieces as `fetch` has them."""
        piece_of_x = 16 if value_dtype.itemsize == input_dtype.itemsize else 8
        pieces = (
            2 * self.units * value_dtype.itemsize,
            max(1, self.units // 2),
            UNIT * self.units * input_dtype.itemsize // piece_of_x,
        )
        return all(32 * self.row_warps % count == 0 for count in pieces)


class Kind(NamedTuple):
    """A block but for its chunks: row tiles and row warps, teams, blocks of a cluster."""

    row_tiles: int
    row_warps: int
    teams: int
    cluster: int


class Problem(NamedTuple):
    """A projection on a GPU.

    Args:
        outputs, features (`int`): N and K.
        value_dtype, input_dtype (`torch.dtype`): of the packed values and of the activations.
        capability (`tuple[int, int]`): of the GPU.
        clusters_at_once (`Callable`): takes a number of blocks and says how many clusters of so many run at once if
            every block has a multiprocessor; for one block the number of multiprocessors.
        experts (`int`): how many such projections run at once, each with tokens of its own.
    """

    outputs: int
    features: int
    value_dtype: torch.dtype
    input_dtype: torch.dtype
    capability: tuple[int, int]
    clusters_at_once: Callable[[int], int]
    experts: int = 1

    @property
    def room(self) -> int:
        """Bytes of shared memory of a multiprocessor."""
        return _SHARED_MEMORY.get(self.capability, _LEAST_SHARED_MEMORY)

    def memory(self, block: Block) -> int:
        """Return the bytes of shared memory that a block takes there."""
        return block.shared_memory(self.value_dtype, self.input_dtype) + _RESERVED

    def blocks_each(self, block: Block) -> int:
        """Return how many blocks the busiest multiprocessor has: a cluster that does not fit at once doubles up."""
        clusters = self.experts * math.ceil(self.outputs / block.rows)
        return math.ceil(clusters / self.clusters_at_once(block.cluster))

    def blocks_on_each(self, block: Block) -> int:
        """Return how many blocks a multiprocessor has if they spread evenly."""
        blocks = self.experts * math.ceil(self.outputs / block.rows) * block.cluster
        return math.ceil(blocks / self.clusters_at_once(1))

    def blocks_at_once(self, block: Block) -> int:
        """Return how many blocks a multiprocessor runs at once by shared memory and, beside its sums, 64 registers."""
        registers = 64 + 4 * block.row_tiles * block.token_tiles
        return max(1, min(self.room // self.memory(block), _REGISTERS // (registers * block.threads)))

    def takes(self, block: Block) -> bool:
        """Tell whether a block fits, and divides what it copies."""
        whole = block.copies_whole_rows(self.value_dtype, self.input_dtype)
        return whole and self.features % (UNIT * block.units) == 0 and self.memory(block) <= self.room


def tiles(token_tiles: int, problem: Problem) -> Block:
    """Return the block for a projection, of a few kinds.

    On 16-bit activations it is that with which the busiest multiprocessor reads the least; on quantized ones that for
    which the fitted time is the shortest. The fit is not for the former: on an H100 it chose blocks that took 1.3 to
    1.4 times as long for bf16 on 4096x14336 (`performance_gemm.csv` beside that of the commit 1c88a05).

    Every block reads the activations, for its share of the columns: the more rows it has, the fewer bytes are read in
    all, and the fewer multiprocessors have a block, unless a cluster of them shares the columns. The kinds for
    activations of 16 bits were, up to 32 tokens, the fastest or nearly for four shapes on one H100
    (`benchmarks/results/decode_blocks.json`), picked by hand from those timings. Other shapes and GPUs were not timed;
    `benchmarks/decode_blocks.py` times them.

    Args:
        token_tiles (`int`): tiles of 8 tokens.
        problem (`Problem`): the projection.
    """
    found = (_completed(kind, token_tiles, problem) for kind in kinds(token_tiles, problem))
    cost = nanoseconds if problem.input_dtype.itemsize == 1 else _bytes_read
    return min((block for block in found if block is not None), key=lambda block: cost(block, problem))


def _completed(kind: Kind, token_tiles: int, problem: Problem) -> Block | None:
    """Return a block with long chunks, where there are rows enough to copy, and the stages that there is room for."""
    block = Block(*kind[:3], token_tiles, 1, 2, kind.cluster)
    by_registers = _REGISTERS // (block.registers * block.threads)
    if problem.input_dtype.itemsize == 1:
        side_by_side = max(1, min(problem.blocks_each(block), _BLOCKS_AT_ONCE, by_registers))
    else:  # clusters of more than two were slow with room for one block each
        side_by_side = min(max(problem.blocks_on_each(block), 2 if block.cluster > 2 else 1), _BLOCKS_AT_ONCE)
    longest = 4 if _has_long_chunks(block, problem) else 2
    for budget in (problem.room // side_by_side, problem.room):
        for units in (longest, 2, 1):
            chunks = math.ceil(problem.features / (UNIT * units * block.teams * block.cluster))
            for stages in range(min(_MOST_STAGES, 1 + max(chunks, 1)), 1, -1):
                staged = block._replace(units=units, stages=stages)
                if problem.takes(staged) and problem.memory(staged) <= budget:
                    return staged
    return None


def nanoseconds(block: Block, problem: Problem) -> float:
    """Return how long the busiest multiprocessor takes by the fit."""
    side_by_side = min(problem.room // problem.memory(block), _REGISTERS // (block.registers * block.threads))
    starts = math.ceil(problem.blocks_each(block) / max(1, side_by_side))
    start = _START + (_START_OF_A_CLUSTER if block.cluster > 1 else 0)
    return starts * start + problem.blocks_each(block) * _work(block, problem)


def _bytes_read(block: Block, problem: Problem) -> float:
    """Return what the busiest multiprocessor reads, with what it could have read at each start and in each cluster."""
    weights = block.rows * (problem.value_dtype.itemsize / 2 + 1 / 8)
    read = problem.features / block.cluster * (weights + problem.input_dtype.itemsize * block.tokens)
    return problem.blocks_on_each(block) * (read + _BYTES_OF_A_START) + _BYTES_OF_A_CLUSTER * (block.cluster - 1)


def _work(block: Block, problem: Problem) -> float:
    """Return the nanoseconds that a block adds to a multiprocessor's time by the fit."""
    of_a_value, of_x = problem.value_dtype.itemsize, problem.input_dtype.itemsize
    columns = problem.features / block.cluster
    weights, x = block.rows * columns * (of_a_value / 2 + 1 / 8), block.tokens * columns * of_x
    units, warps = columns / UNIT, block.row_warps * block.teams
    # Of a warp, for each unit of its team; the warps that share a scheduler take turns.
    matrices = units * block.row_warps * (block.row_tiles * of_a_value + block.token_tiles * of_x)
    turns = units / block.teams * math.ceil(warps / _SCHEDULERS)
    products = turns * block.row_tiles * block.token_tiles * of_x
    return weights * _BYTE_OF_A_WEIGHT + x * _BYTE_OF_X + matrices * _LDMATRIX + products * _PRODUCT


def _has_long_chunks(block: Block, problem: Problem) -> bool:
    if problem.input_dtype.itemsize == 1:
        return True
    return block.token_tiles <= 2 and block.rows >= 64 * problem.value_dtype.itemsize


def kinds(token_tiles: int, problem: Problem) -> list[Kind]:
    """Return what to choose from; 8-bit weights that are widened take more work a byte, hence more warps a row."""
    bits_16 = problem.value_dtype.itemsize == 2
    if problem.input_dtype.itemsize == 1:
        found = _QUANTIZED[token_tiles]
    elif token_tiles <= 2:
        found = [(1, 1, 4, 2), (1, 4, 1, 1), (1, 4, 1, 2), (2, 4, 1, 1), (2, 4, 1, 2), (2, 8, 1, 1)]
        found += [(2, 2, 1, 8), (2, 7, 1, 1)] if bits_16 else []  # 7 warps cannot copy long chunks of 8 bits
    elif token_tiles == 4:
        found = [(2, 2, 1, 8), (2, 7, 1, 2)] + ([(4, 2, 1, 4)] if bits_16 else [])
    else:
        found = [(2, 7, 1, 1), (2, 7, 1, 2)] + ([(2, 4, 1, 4), (2, 2, 1, 8)] if bits_16 else [(1, 4, 1, 8)])
    if problem.experts > 1 and problem.input_dtype.itemsize == 2:  # blocks enough without dividing the columns
        found += [(2, 4, 1, 1), (2, 8, 1, 1)]
    alone = list({Kind(*kind[:3], 1): None for kind in found})
    if problem.capability < (9, 0):
        return alone
    return [Kind(*kind) for kind in found if problem.clusters_at_once(kind[3])] or alone


# By tiles of tokens, for activations in 8 bits: not timed yet. With 4 row tiles a warp reads the tokens half as often,
# as its registers allow for up to 8 tiles of tokens.
_QUANTIZED = {
    token_tiles: [(row_tiles, warps, 1, cluster) for row_tiles, warps in shapes for cluster in (1, 2, 4, 8)]
    + [(row_tiles, 2, 2, cluster) for row_tiles in {shape[0] for shape in shapes} for cluster in (1, 2, 4)]
    for token_tiles, shapes in {
        1: [(1, 4), (2, 4), (2, 7), (2, 8)],
        2: [(1, 4), (2, 4), (2, 7), (2, 8)],
        4: [(1, 4), (2, 4), (2, 7), (4, 2), (4, 4)],
        8: [(1, 4), (1, 7), (2, 4), (2, 7), (4, 2), (4, 4)],
        16: [(1, 4), (1, 7), (1, 8), (2, 4), (2, 7)],
    }.items()
}
