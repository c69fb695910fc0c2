// A packed projection for few tokens: out = x W^T with W in format 1, on the sparse tensor cores (sm_80 and newer).
//
// With few tokens a projection takes as long as its weights take to read. So the weights are read once, 16 bytes a lane,
// straight into the registers from which the tensor cores take them: mma.sp wants pairs of values and, for each pair,
// the nibble that places it in its group of four, and both stand in format 1 as they are. Which group of a row goes to
// which place of the product is free, since a sum does not depend on the order of its terms: it is chosen so that a
// lane holds what it has read. No shared memory before the last sum, and no synchronization.
//
// Names after the PTX ISA, "matrix fragments for sparse mma.m16n8k32": lane = 4 g + t. A product has 8 slots of groups;
// lane t of a quad holds slots t and 4 + t of rows g and g + 8.
//
// To be defined (see decode.py): HALF (1: float16, 0: bfloat16 activations), BITS (16 or 8) and FP8 (0 or 1) of the values,
// ROW_TILES (of 16 rows), TOKEN_TILES (of 8 tokens) and WARPS of a block. The columns K are a multiple of COLUMNS.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned short u16;

constexpr int GROUPS = BITS == 16 ? 4 : 8;  // of a row, that a lane reads at once
constexpr int COLUMNS = 4 * 4 * GROUPS;     // of a chunk, which the four lanes of a quad read
constexpr int PRODUCTS = GROUPS / 2;        // mma.sp a chunk
constexpr int ROWS = 16 * ROW_TILES;
constexpr int TOKENS = 8 * TOKEN_TILES;

struct Row {
    u32 values[4];
    u32 nibbles[GROUPS / 2];  // of the 4 GROUPS groups of the chunk
};

struct Chunk {
    Row rows[ROW_TILES][2];
};

// Where a lane reads: the block's first row or token, and offsets in bytes from there.
struct Places {
    const u8 *values, *indices, *x;
    u32 values_of[ROW_TILES][2], indices_of[ROW_TILES][2], x_of[TOKEN_TILES];
    bool is_token[TOKEN_TILES];
};

#ifndef EMULATED
__device__ void load_once(const void *from, u32 (&to)[4]) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
        : "l"(from));
}

__device__ void load_words(const u8 *from, u32 (&to)[4]) {
    uint4 words = *(const uint4 *)from;
    to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
}

__device__ void load_words(const u8 *from, u32 (&to)[2]) {
    uint2 words = *(const uint2 *)from;
    to[0] = words.x, to[1] = words.y;
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

template <int SELECTOR>
__device__ void mma_sp(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {
#if HALF
#define TYPES "f32.f16.f16.f32"
#else
#define TYPES "f32.bf16.bf16.f32"
#endif
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col." TYPES
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
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

// The nibbles that two products take from this lane: products 2 * PASS and 2 * PASS + 1 take them from lanes 0, 1 and
// 2, 3 of a quad, the first of the two for slots 0 to 3 (the even groups of the four lanes), the second for 4 to 7.
__device__ u32 four_nibbles(const Row &row, int pass, int t) {
    u32 product = 2 * pass + (t >> 1);
#if BITS == 16
    u32 bytes = __byte_perm(row.nibbles[0], row.nibbles[1], 0x6420 + 0x1111 * product);
#else
    u32 selector = 0x40 + 0x11 * product;
    u32 bytes = __byte_perm(__byte_perm(row.nibbles[0], row.nibbles[1], selector),
                            __byte_perm(row.nibbles[2], row.nibbles[3], selector), 0x5410);
#endif
    bytes = bytes >> (4 * (t & 1)) & 0x0f0f0f0f;
    return bytes | bytes >> 4;  // in bytes 0 and 2
}

__device__ Places places(const u8 *values, const u8 *indices, const u16 *x, int tokens, int outputs, int columns,
                         int lane) {
    int g = lane / 4, t = lane % 4;
    long row = (long)blockIdx.x * ROWS, token = (long)blockIdx.y * TOKENS;
    u32 value_bytes = columns / 2 * (BITS / 8), index_bytes = columns / 8, x_bytes = columns * 2;
    Places at;
    at.values = values + row * value_bytes;
    at.indices = indices + row * index_bytes;
    at.x = (const u8 *)x + token * x_bytes;
    for (int tile = 0; tile < ROW_TILES; ++tile)
        for (int half = 0; half < 2; ++half) {
            int n = 16 * tile + 8 * half + g;
            n = row + n < outputs ? n : 0;  // a row beyond the last is not written
            at.values_of[tile][half] = n * value_bytes + 16 * t;
            at.indices_of[tile][half] = n * index_bytes;
        }
    // Even lanes read the features of the groups that lane t / 2 of the quad holds, odd lanes those of lane t / 2 + 2.
    int block = t / 2 + 2 * (t % 2);
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
        at.is_token[tile] = token + 8 * tile + g < tokens;
        at.x_of[tile] = (8 * tile + g) * x_bytes + 8 * GROUPS * block;
    }
    return at;
}

__device__ Chunk load(const Places &at, u32 chunk) {
    Chunk result;
    for (int tile = 0; tile < ROW_TILES; ++tile)
        for (int half = 0; half < 2; ++half) {
            Row &row = result.rows[tile][half];
            load_once(at.values + (at.values_of[tile][half] + chunk * 64), row.values);
            load_words(at.indices + (at.indices_of[tile][half] + chunk * 2 * GROUPS), row.nibbles);
        }
    return result;
}

__device__ void multiply(float (&sums)[ROW_TILES][TOKEN_TILES][4], const Chunk &chunk, const Places &at, u32 number,
                         int t) {
    u32 metadata[ROW_TILES][GROUPS / 4];
    for (int tile = 0; tile < ROW_TILES; ++tile)
        for (int pass = 0; pass < GROUPS / 4; ++pass)
            metadata[tile][pass] = __byte_perm(four_nibbles(chunk.rows[tile][0], pass, t),
                                               four_nibbles(chunk.rows[tile][1], pass, t), 0x6420);
    bool odd = t % 2;
    for (int product = 0; product < PRODUCTS; ++product) {
        u32 a[ROW_TILES][4];
        for (int tile = 0; tile < ROW_TILES; ++tile)
            for (int half = 0; half < 2; ++half) {
                const u32(&values)[4] = chunk.rows[tile][half].values;
#if BITS == 16
                a[tile][half] = values[2 * product], a[tile][2 + half] = values[2 * product + 1];
#else
                a[tile][half] = widened(values[product]), a[tile][2 + half] = widened(values[product] >> 16);
#endif
            }
        for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
            u32 two[4] = {};  // groups: places 0, 1 and 2, 3 of the first, then of the second
            if (at.is_token[tokens])
                load_words(at.x + (at.x_of[tokens] + number * 2 * COLUMNS + 16 * product), two);
            // A lane needs one half of each group, of both blocks: its neighbour has read the other block.
            u32 b[4];
            for (int i = 0; i < 2; ++i) {
                u32 mine = odd ? two[2 * i + 1] : two[2 * i];
                u32 other = __shfl_xor_sync(0xffffffff, odd ? two[2 * i] : two[2 * i + 1], 1);
                b[2 * i] = odd ? other : mine;
                b[2 * i + 1] = odd ? mine : other;
            }
            for (int tile = 0; tile < ROW_TILES; ++tile)
                if (product % 2 == 0)
                    mma_sp<0>(sums[tile][tokens], a[tile], b, metadata[tile][product / 2]);
                else
                    mma_sp<1>(sums[tile][tokens], a[tile], b, metadata[tile][product / 2]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    few_tokens_linear(const u16 *x, const u8 *values, const u8 *indices, const float *scale, const u16 *bias, u16 *out,
                      int tokens, int outputs, int columns) {
    __shared__ float total[ROWS][TOKENS + 1];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int chunks = columns / COLUMNS;
    float sums[ROW_TILES][TOKEN_TILES][4] = {};
    if (warp < chunks) {
        Places at = places(values, indices, x, tokens, outputs, columns, lane);
        Chunk next = load(at, warp);
        for (int chunk = warp; chunk < chunks; chunk += WARPS) {
            Chunk now = next;
            next = load(at, chunk + WARPS < chunks ? chunk + WARPS : chunk);
            multiply(sums, now, at, chunk, t);
        }
    }
    // One warp after the other: the same sum every time.
    for (int turn = 0; turn < WARPS; ++turn) {
        if (turn == warp)
            for (int tile = 0; tile < ROW_TILES; ++tile)
                for (int tile_of_tokens = 0; tile_of_tokens < TOKEN_TILES; ++tile_of_tokens)
                    for (int i = 0; i < 4; ++i) {
                        float &sum = total[16 * tile + 8 * (i / 2) + g][8 * tile_of_tokens + 2 * t + i % 2];
                        sum = sums[tile][tile_of_tokens][i] + (turn ? sum : 0);
                    }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < ROWS * TOKENS; i += 32 * WARPS) {
        long n = (long)blockIdx.x * ROWS + i % ROWS, m = (long)blockIdx.y * TOKENS + i / ROWS;
        if (n >= outputs || m >= tokens) continue;
        float value = total[i % ROWS][i / ROWS];
        if (scale) value *= scale[n];
        if (bias) value += to_float(bias[n]);
        out[m * outputs + n] = to_half(value);
    }
}
