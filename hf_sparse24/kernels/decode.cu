// A packed projection for few tokens: out = x W^T with W in format 1, on the sparse tensor cores (sm_80 and newer).
//
// With few tokens a projection takes as long as its weights take to read, so what counts is that enough of them are under
// way at any time. Shared memory is a queue of what was asked for: chunks of the columns, of which the weights and the
// activations are copied as they stand (cp.async), several ahead of the one that is being multiplied. From there the
// tensor cores take them in natural order: ldmatrix hands out rows of 16 bytes as mma.sp wants them, and the index
// nibbles of format 1 are its metadata.
//
// Activations are of 16 bits, and values of 8 bits are then widened to them, or quantized as the values are, and then both
// are multiplied as they stand; their scales belong to the result.
//
// Where there are too few rows to keep a GPU busy, the columns are divided: among teams of warps in a block, and among
// the blocks of a cluster, which read each other's sums in the end (sm_90 and newer). All sums are in a fixed order.
//
// Grouped, it is one launch for a stack of projections (the experts of a mixture), each of which has tokens of its own,
// one behind the other: where those of an expert end stands on the device. Each block finds out which tokens of which
// expert it has, and does what it would do for a single projection; tokens of nobody get zeros.
//
// A kernel may begin while the one before it ends (overlap.h). Meanwhile it has the weights brought to the L2 cache; it
// reads nothing before the other is done, which may have written any of it.
//
// Names after the PTX ISA, "matrix fragments for sparse mma.m16n8k32" (16 bits) and "m16n8k64" (8 bits): lane = 4 g + t.
// With 16 bits a product takes 8 groups of four columns: lane t of a quad holds the pairs of the groups t and 4 + t, of
// rows g and g + 8. With 8 bits it takes 16: lane t holds those of 2 t, 2 t + 1 and, 8 further, of as many.
//
// To be defined (see decode.py): HALF (1: float16, 0: bfloat16 result, bias and activations of 16 bits), BITS (16 or 8)
// and FP8 (0 or 1) of the values, X_BITS of the activations (16, or 8 if the values have 8); ROW_TILES (of 16 rows) of a
// warp and ROW_WARPS (of a team) and TEAMS of a block; TOKEN_TILES (of 8 tokens); UNITS (of 64 columns) of a chunk and
// STAGES of the queue; CLUSTER. The columns are a multiple of 64 UNITS.
// For a stack (see grouped.py): GROUPED (1), and LEAST_BLOCKS that a multiprocessor should run at once.

#include "overlap.h"

#ifndef GROUPED
#define GROUPED 0
#endif
#if GROUPED && LEAST_BLOCKS > 1
#define BLOCKS_AT_ONCE , LEAST_BLOCKS
#else
#define BLOCKS_AT_ONCE  // even a 1 changes how many registers the compiler takes: 128 become 198 for (2, 7, 1, 8, 2, 2, 1)
#endif

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int TEAM = 32 * ROW_WARPS, THREADS = TEAM * TEAMS;
constexpr int ROWS = 16 * ROW_TILES * ROW_WARPS, TOKENS = 8 * TOKEN_TILES;  // of a block

// Bytes of a row, or a token, in a chunk; and in shared memory, where 16 more let the 8 rows that ldmatrix reads at once
// lie in different banks.
constexpr int VALUE_BYTES = UNITS * 4 * BITS, VALUE_PITCH = VALUE_BYTES + 16;
constexpr int X_BYTES = UNITS * 8 * X_BITS, X_PITCH = X_BYTES + 16;
// Of the indices 16 rows are read at once where both operands have 8 bits: with the gap two by two from the same bank.
constexpr int INDEX_BYTES = UNITS * 8, INDEX_PITCH = INDEX_BYTES + (X_BITS == 8 && UNITS >= 4 ? 16 : 0);
constexpr int X_AT = ROWS * VALUE_PITCH, INDICES_AT = X_AT + TOKENS * X_PITCH, STAGE = INDICES_AT + ROWS * INDEX_PITCH;

// Shared memory: the scales and biases of the rows and, of quantized ones, the scales of the tokens; then the queues of
// the teams and, in their place, the sums.
constexpr int BIASES_AT = ROWS * 4, TOKEN_SCALES_AT = BIASES_AT + ROWS * 2;
constexpr int QUEUES_AT = TOKEN_SCALES_AT + (X_BITS == 8 ? TOKENS * 4 : 0);
constexpr int SUM_PITCH = (ROWS + 4) * 4;  // of a token: lanes that write tokens 2 t of rows g hit different banks

#if X_BITS == 8 && !FP8
typedef int Sum;
#else
typedef float Sum;
#endif

#ifndef EMULATED
__device__ u32 shared_memory() {
    extern __shared__ __align__(16) u8 memory[];
    return (u32)__cvta_generic_to_shared(memory);
}

// Copies BYTES, or as many as there are and then zeros.
template <int BYTES>
__device__ void copy(u32 to, const void *from, int available = BYTES) {
    if (BYTES == 16)  // not by way of L1
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(available));
    else
        asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES),
                     "r"(available));
}

__device__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

template <int GROUPS>
__device__ void wait_for_all_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

__device__ void wait_for_team(int team) {
    if (TEAM == 32)
        __syncwarp();
    else
        asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(TEAM) : "memory");
}

__device__ void ldmatrix(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
}

__device__ u32 read_u16(u32 from) {
    u16 value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(from));
    return value;
}

__device__ u32 read_u32(u32 from) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from));
    return value;
}

__device__ void write(u32 to, float value) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value)); }

__device__ void read_four(float (&to)[4], u32 from, int rank) {
#if CLUSTER > 1
    asm volatile("{ .reg .u32 there; mapa.shared::cluster.u32 there, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there]; }"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "r"(from), "r"(rank));
#else
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "r"(from));
#endif
}

__device__ void wait_for_cluster() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
#endif
}

// a * b + c of two halves.
__device__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
#if HALF
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

#if X_BITS == 8 && FP8
#define FORM "m16n8k64.row.col.f32.e4m3.e4m3.f32"
#define SUM "+f"
#elif X_BITS == 8
#define FORM "m16n8k64.row.col.s32.s8.s8.s32"
#define SUM "+r"
#elif HALF
#define FORM "m16n8k32.row.col.f32.f16.f16.f32"
#define SUM "+f"
#else
#define FORM "m16n8k32.row.col.f32.bf16.bf16.f32"
#define SUM "+f"
#endif
template <int SELECTOR>
__device__ void mma_sp(Sum (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {
    asm("mma.sp::ordered_metadata.sync.aligned." FORM
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : SUM(d[0]), SUM(d[1]), SUM(d[2]), SUM(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(SELECTOR));
}

__device__ float to_float(u16 half) {
#if HALF
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
#else
    return __uint_as_float((u32)half << 16);
#endif
}

__device__ u16 to_half(float value) {
    u16 half;
#if HALF
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
#endif
    return half;
}
#endif

// Two values of 8 bits, in the lower half of a word, in the dtype of the activations. The bits are placed so that they
// spell a number that is off by an offset (integers) or a power of two (FP8), which one fma takes away.
__device__ u32 widened(u32 pair) {
    u32 bytes = __byte_perm(pair, 0, 0x4140);
#if FP8 && HALF
    return fma2((bytes & 0x007f007f) << 7 | (bytes & 0x00800080) << 8, 0x5c005c00, 0x80008000);  // * 2^8
#elif FP8
    return fma2((bytes & 0x007f007f) << 4 | (bytes & 0x00800080) << 8, 0x7b807b80, 0x80008000);  // * 2^120
#elif HALF
    return fma2((bytes ^ 0x00800080) | 0x64006400, 0x3c003c00, 0xe480e480);  // 1024 + 128 + n, less 1152
#else
    // 128 + the lower seven bits, less 128 or, where n is negative, 256.
    return fma2((bytes & 0x007f007f) | 0x43004300, 0x3f803f80, (bytes & 0x00800080) | 0xc300c300);
#endif
}

// What a thread of a team copies: from its own first piece on, every so many rows.
struct Operands {
    const u8 *values, *indices, *x;
    u32 columns;
    int last_row, last_token;  // of those that the block has
};

// One piece of each of ROWS rows that are AT_ONCE rows apart; of a row beyond the last nothing, or the last one again.
template <int COUNT, int AT_ONCE, int PIECE, int PITCH, bool REPEAT>
__device__ void copy_rows(u32 to, const u8 *from, u32 pitch, int row, int last) {
#pragma unroll
    for (int i = 0; i < (COUNT + AT_ONCE - 1) / AT_ONCE; ++i, row += AT_ONCE)
        if ((COUNT % AT_ONCE == 0 || row < COUNT) && (REPEAT || row <= last))
            copy<PIECE>(to + row * PITCH, from + (u64)(u32)(row < last ? row : last) * pitch);
}

__device__ void fetch(u32 stage, const Operands &from, u32 chunk, int thread) {
    constexpr int VALUE_PIECES = VALUE_BYTES / 16;
    u32 row = thread / VALUE_PIECES, piece = thread % VALUE_PIECES * 16;
    copy_rows<ROWS, TEAM / VALUE_PIECES, 16, VALUE_PITCH, true>(
        stage + piece, from.values + chunk * VALUE_BYTES + piece, from.columns / 16 * BITS, row, from.last_row);

    constexpr int INDEX_PIECE = INDEX_BYTES < 16 ? INDEX_BYTES : 16, INDEX_PIECES = INDEX_BYTES / INDEX_PIECE;
    row = thread / INDEX_PIECES, piece = thread % INDEX_PIECES * INDEX_PIECE;
    copy_rows<ROWS, TEAM / INDEX_PIECES, INDEX_PIECE, INDEX_PITCH, true>(stage + INDICES_AT + piece,
                                                                         from.indices + chunk * INDEX_BYTES + piece,
                                                                         from.columns / 8, row, from.last_row);

    // Of values of 8 bits ldmatrix gives a lane two neighbouring groups. Widened, these are for two products: the even
    // groups of a unit for the first, the odd ones for the second. So the activations, whose groups have 8 bytes, are put
    // in that order.
    constexpr int X_PIECE = BITS == X_BITS ? 16 : 8, X_PIECES = X_BYTES / X_PIECE;
    static_assert(TEAM % X_PIECES == 0, "a thread copies the same piece of every row");
    row = thread / X_PIECES, piece = thread % X_PIECES;
    u32 place = BITS == X_BITS ? piece * 16 : piece / 16 * 128 + piece % 2 * 64 + piece % 16 / 2 * 8;
    copy_rows<TOKENS, TEAM / X_PIECES, X_PIECE, X_PITCH, false>(stage + X_AT + place,
                                                                from.x + chunk * X_BYTES + piece * X_PIECE,
                                                                from.columns / 8 * X_BITS, row, from.last_token);
}

// Has the L2 cache read the weights of a chunk.
__device__ void ask_for(const Operands &from, u32 chunk, int thread) {
    for (int row = thread; row < ROWS && row <= from.last_row; row += TEAM) {
        const u8 *values = from.values + (u64)row * (from.columns / 16 * BITS) + chunk * VALUE_BYTES;
        for (int i = 0; i < VALUE_BYTES; i += 128) prefetch(values + i);
        prefetch(from.indices + (u64)row * (from.columns / 8) + chunk * INDEX_BYTES);
    }
}

// The metadata of a unit, from the nibbles of 16 groups of rows g and g + 8. Of the two products of 16 bits, product p
// takes them from lanes 2 p (groups 0 to 3 of a product) and 2 p + 1 (4 to 7) of a quad, row g in the lower half. The one
// product of 8 bits takes groups 0 to 7 of rows g and g + 8 from lanes 0 and 1, and 8 to 15 from lanes 2 and 3.
__device__ u32 metadata_of(u32 nibbles, int t) {
#if X_BITS == 8
    return read_u32(nibbles + t % 2 * 8 * INDEX_PITCH + t / 2 * 4);
#elif BITS == 16
    return __byte_perm(read_u16(nibbles + 2 * t), read_u16(nibbles + 8 * INDEX_PITCH + 2 * t), 0x5410);
#else
    u32 rows[2];
    for (int half = 0; half < 2; ++half) {
        u32 four = read_u32(nibbles + half * 8 * INDEX_PITCH + t % 2 * 4) >> t / 2 * 4 & 0x0f0f0f0f;
        rows[half] = four | four >> 4;  // in bytes 0 and 2
    }
    return __byte_perm(rows[0], rows[1], 0x6420);
#endif
}

__device__ void multiply(Sum (&sums)[ROW_TILES][TOKEN_TILES][4], u32 stage, int first_row, int lane) {
    // Lane l gives ldmatrix the address of row l % 8 of matrix l / 8: of weights rows 0 to 7 and 8 to 15 of one piece of
    // 16 bytes, then of the next; of activations 8 tokens of four pieces.
    u32 a_at = stage + (first_row + lane % 16) * VALUE_PITCH + lane / 16 * 16;
    u32 b_at = stage + X_AT + lane % 8 * X_PITCH + lane / 8 * 16;
    u32 nibbles_at = stage + INDICES_AT + (first_row + lane / 4) * INDEX_PITCH;
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
        u32 metadata[ROW_TILES], values[ROW_TILES][4], a[ROW_TILES][4];
        for (int tile = 0; tile < ROW_TILES; ++tile)
            metadata[tile] = metadata_of(nibbles_at + 16 * tile * INDEX_PITCH + 8 * unit, lane % 4);
#pragma unroll
        for (int product = 0; product < X_BITS / 8; ++product) {
            for (int tile = 0; tile < ROW_TILES; ++tile) {
                u32 tile_at = a_at + 16 * tile * VALUE_PITCH;
#if BITS == X_BITS
                ldmatrix(a[tile], tile_at + 4 * BITS * unit + 32 * product);
#else
                if (product == 0) ldmatrix(values[tile], tile_at + 32 * unit);
                for (int i = 0; i < 4; ++i) a[tile][i] = widened(values[tile][i] >> 16 * product);
#endif
            }
#pragma unroll
            for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
                u32 b[4];
                ldmatrix(b, b_at + 8 * tokens * X_PITCH + 8 * X_BITS * unit + 64 * product);
                for (int tile = 0; tile < ROW_TILES; ++tile)
                    if (product == 0)
                        mma_sp<0>(sums[tile][tokens], a[tile], b, metadata[tile]);
                    else
                        mma_sp<X_BITS / 16>(sums[tile][tokens], a[tile], b, metadata[tile]);
            }
        }
    }
}

struct alignas(8) Four {
    u16 halves[4];
};

#if GROUPED
// The tokens of a block: of which expert, from which row on, and before which row the last ones of this expert end. The
// number of experts stands for nobody, a greater one for a block without tokens.
struct Share {
    int expert, first, end;
};

__device__ int end_of(int expert, const int *offsets, int experts, int rows) {
    if (expert < 0) return 0;
    int end = expert < experts ? offsets[expert] : rows;
    return end < 0 ? 0 : end < rows ? end : rows;
}

__device__ int tiles_of(int expert, const int *offsets, int experts, int rows) {
    int count = end_of(expert, offsets, experts, rows) - end_of(expert - 1, offsets, experts, rows);
    return count > 0 ? (count + TOKENS - 1) / TOKENS : 0;
}

// Blocks take the tiles of tokens of one expert after the other. Every warp looks for its own: a lane counts the tiles of
// some experts, and the one that has the tile among them tells the others.
__device__ Share share_of(int tile, const int *offsets, int experts, int rows) {
    int lane = threadIdx.x % 32, each = experts / 32 + 1, expert = lane * each, tiles = 0;
    for (int i = 0; i < each && expert + i <= experts; ++i) tiles += tiles_of(expert + i, offsets, experts, rows);
    int before = tiles;
    for (int distance = 1; distance < 32; distance *= 2) {
        int more = __shfl_up_sync(0xffffffff, before, distance);
        if (lane >= distance) before += more;
    }
    before -= tiles;
    u32 found = 0, nth = 0;
    if (before <= tile && tile < before + tiles) {
        for (int here; tile >= before + (here = tiles_of(expert, offsets, experts, rows)); ++expert) before += here;
        found = expert + 1, nth = tile - before;
    }
    found = __reduce_max_sync(0xffffffff, found), nth = __reduce_max_sync(0xffffffff, nth);
    if (!found) return {experts + 1, 0, 0};
    expert = found - 1;
    return {expert, end_of(expert - 1, offsets, experts, rows) + (int)nth * TOKENS,
            end_of(expert, offsets, experts, rows)};
}
// Where the tokens of each expert end; bytes from the values of an expert to those of the next.
#define OF_A_STACK const int *offsets, int experts, u64 pitch,
#else
#define OF_A_STACK
#endif

#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(1, CLUSTER, 1)
#else
#define IN_CLUSTERS
#endif

extern "C" __global__ void __launch_bounds__(THREADS BLOCKS_AT_ONCE) IN_CLUSTERS
    few_tokens_linear(const u8 *x, const float *token_scale, const u8 *values, const u8 *indices, const float *scale,
                      const u16 *bias, u16 *out, OF_A_STACK int tokens, int outputs, int columns) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int team = warp / ROW_WARPS, thread = threadIdx.x % TEAM, first_row = 16 * ROW_TILES * (warp % ROW_WARPS);
    int rank = blockIdx.y % CLUSTER;
#if GROUPED
    // The blocks for the rows of an expert follow each other: what they read is then in the L2 cache.
    int row_blocks = (outputs + ROWS - 1) / ROWS, block = blockIdx.y / CLUSTER * gridDim.x + blockIdx.x;
    let_the_next_kernel_begin();
    wait_for_the_kernel_before();
    Share share = share_of(block / row_blocks, offsets, experts, tokens);
    long long row = (long long)(block % row_blocks) * ROWS, token = share.first, expert = share.expert;
    if (expert >= experts) {
        int rows = outputs - row < ROWS ? outputs - row : ROWS, zeros = share.end - share.first;
        if (zeros > TOKENS) zeros = TOKENS;
        for (int i = rank * THREADS + threadIdx.x; i < zeros * rows; i += THREADS * CLUSTER)
            out[(token + i / rows) * outputs + row + i % rows] = 0;
        return;
    }
    tokens = share.end;
    values += expert * pitch, indices += expert * outputs * (columns / 8);
    long long of_rows = expert * ((outputs + 3) / 4 * 4) + row;  // scales and biases
#else
    long long row = (long long)(blockIdx.y / CLUSTER) * ROWS, token = (long long)blockIdx.x * TOKENS, of_rows = row;
#endif
    Operands from = {values + row * (columns / 16 * BITS),
                     indices + row * (columns / 8),
                     x + token * (columns / 8 * X_BITS),
                     (u32)columns,
                     (int)(outputs - row - 1),
                     (int)(tokens - token - 1)};
    u32 memory = shared_memory(), queue = memory + QUEUES_AT + team * (STAGES * STAGE);

    int rows_here = outputs - row < ROWS ? outputs - row : ROWS;
    int tokens_here = tokens - token < TOKENS ? tokens - token : TOKENS;

    // The chunks take turns among the teams of all blocks of the cluster.
    int first = rank * TEAMS + team, step = TEAMS * CLUSTER, chunks = (columns / (64 * UNITS) - first + step - 1) / step;
    let_the_next_kernel_begin();
    if (OVERLAPS && !GROUPED)
        for (int i = 0; i < STAGES - 1 && i < chunks; ++i) ask_for(from, first + i * step, thread);
    wait_for_the_kernel_before();

    // The end wants them, and should not wait for them.
    for (int i = 4 * threadIdx.x; i < rows_here; i += 4 * THREADS) {
        int there = rows_here - i < 4 ? rows_here - i : 4;
        if (scale) copy<16>(memory + 4 * i, scale + of_rows + i, 4 * there);
        if (bias) copy<8>(memory + BIASES_AT + 2 * i, bias + of_rows + i, 2 * there);
    }
    constexpr int TOGETHER = GROUPED ? 1 : 4;  // an expert's tokens begin anywhere
    for (int i = TOGETHER * threadIdx.x; X_BITS == 8 && token_scale && i < tokens_here; i += TOGETHER * THREADS) {
        int there = tokens_here - i < TOGETHER ? tokens_here - i : TOGETHER;
        copy<4 * TOGETHER>(memory + TOKEN_SCALES_AT + 4 * i, token_scale + token + i, 4 * there);
    }
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < chunks) fetch(queue + i * STAGE, from, first + i * step, thread);
        commit_copies();
    }
    Sum sums[ROW_TILES][TOKEN_TILES][4] = {};
#pragma unroll 1
    for (int i = 0; i < chunks; ++i) {
        wait_for_all_copies_but<STAGES - 2>();
        wait_for_team(team);  // for what it has copied, and until it has multiplied what is now overwritten
        int next = i + STAGES - 1;
        if (next < chunks) fetch(queue + next % STAGES * STAGE, from, first + next * step, thread);
        commit_copies();
        multiply(sums, queue + i % STAGES * STAGE, first_row, lane);
    }
    wait_for_all_copies_but<0>();
    __syncthreads();

    // One team after the other, then one block after the other: the same sum every time.
    u32 totals = memory + QUEUES_AT;
    for (int turn = 0; turn < TEAMS; ++turn) {
        if (turn == team)
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
                for (int tile_of_tokens = 0; tile_of_tokens < TOKEN_TILES; ++tile_of_tokens)
                    for (int i = 0; i < 4; ++i) {
                        u32 to = totals + (8 * tile_of_tokens + 2 * t + i % 2) * SUM_PITCH +
                                 (first_row + 16 * tile + i / 2 * 8 + g) * 4;
                        float sum = sums[tile][tile_of_tokens][i];
                        write(to, turn ? __uint_as_float(read_u32(to)) + sum : sum);
                    }
        __syncthreads();
    }
    wait_for_cluster();
    for (int i = rank * THREADS + threadIdx.x; i < tokens_here * (ROWS / 4); i += THREADS * CLUSTER) {
        int n = i % (ROWS / 4) * 4, m = i / (ROWS / 4);
        float sum[4] = {};
        for (int block = 0; block < CLUSTER; ++block) {
            float part[4];
            read_four(part, totals + m * SUM_PITCH + 4 * n, block);
            for (int j = 0; j < 4; ++j) sum[j] += part[j];
        }
        float factor = X_BITS == 8 && token_scale ? __uint_as_float(read_u32(memory + TOKEN_SCALES_AT + 4 * m)) : 1;
        Four result;
        for (int j = 0; j < 4; ++j) {
            if (scale) sum[j] *= __uint_as_float(read_u32(memory + 4 * (n + j)));
            if (X_BITS == 8) sum[j] *= factor;
            if (bias) sum[j] += to_float(read_u16(memory + BIASES_AT + 2 * (n + j)));
            result.halves[j] = to_half(sum[j]);
        }
        u16 *to = out + (token + m) * outputs + row + n;
        if (outputs % 4 == 0 && n < rows_here)
            *(Four *)to = result;
        else
            for (int j = 0; j < 4 && n + j < rows_here; ++j) to[j] = result.halves[j];
    }
    wait_for_cluster();  // for those who read here
}
