#define WARPS (ROW_WARPS * TEAMS)
#include "emulated_gpu.h"

static uint32_t shared_memory() { return 0; }
template <int BYTES>
static void copy(uint32_t to, const void *from, int available = BYTES) {
    start_copy(to, from, BYTES, available);
}
template <int GROUPS>
static void wait_for_all_copies_but() {
    wait_for_copies(GROUPS);
}
static void wait_for_team(int team) { wait_at(current->block->barriers[team + 1], 32 * ROW_WARPS); }

static uint32_t read_u16(uint32_t from) { return *(uint16_t *)shared(from, 2); }
static uint32_t read_u32(uint32_t from) { return *(uint32_t *)shared(from, 4); }
static void write(uint32_t to, float value) { *(float *)shared(to, 4) = value; }
static void read_four(float (&to)[4], uint32_t from, int rank) { memcpy(to, shared(from, 16, rank), 16); }

#if HALF
static float to_float(uint16_t bits) { return from_half(bits); }
static uint16_t to_half(float value) { return to_float16(value); }
#else
static float to_float(uint16_t bits) { return float_of((uint32_t)bits << 16); }
static uint16_t to_half(float value) { return to_bfloat(value); }
#endif

static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        double exact = (double)to_float(a >> shift) * to_float(b >> shift) + to_float(c >> shift);
        result |= (uint32_t)to_half(exact) << shift;
    }
    return result;
}

#if X_BITS == 8
#if FP8
typedef float Number;
static float number(uint8_t code) {
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float magnitude = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    return (code & 127) == 127 ? __builtin_nanf("") : code & 128 ? -magnitude : magnitude;
}
#else
typedef int Number;
static int number(uint8_t code) { return (int8_t)code; }
#endif

// mma.sp::ordered_metadata.m16n8k64 with operands of 8 bits, by the same section of the PTX ISA. A register of A holds the
// four values of 8 columns: of lane 4 g + t, register i, columns 8 t (and 32 further for i of 2 and 3) of row g (g + 8 for
// odd i). B: register i holds places 4 t to 4 t + 3, 16 i further, of column g. Every lane has metadata, the selector is
// 0: t even of row g, odd of row g + 8, nibbles of columns 0 to 31 for t of 0 and 1, else of 32 to 63.
template <int SELECTOR>
static void mma_sp(Number (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
    static_assert(SELECTOR == 0, "the only one there is");
    auto &warp = current->block->exchanged[threadIdx.x / 32];
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    memcpy(warp[lane], a, sizeof a);
    memcpy(warp[lane] + 4, b, sizeof b);
    warp[lane][8] = metadata;
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        int lower_row = i / 2, column = 2 * t + i % 2;
        for (int group = 0; group < 16; ++group) {
            uint32_t nibble = warp[4 * g + group / 8 * 2 + lower_row][8] >> 4 * (group % 8) & 15;
            uint32_t four = warp[4 * g + group % 8 / 2][group / 8 * 2 + lower_row];
            if ((nibble & 3) >= nibble >> 2) fprintf(stderr, "indices that are not in order\n"), abort();
            for (int value = 0; value < 2; ++value) {
                int place = 4 * group + (value ? nibble >> 2 : nibble & 3);
                uint32_t other = warp[4 * column + place % 16 / 4][4 + place / 16];
                d[i] += number(four >> 16 * (group % 2) + 8 * value) * number(other >> 8 * (place % 4));
            }
        }
    }
    __syncwarp();
}
#else
// mma.sp::ordered_metadata.m16n8k32 with 16-bit operands: lane 4 g + t has the pairs of slots t and 4 + t of rows g and
// g + 8 of A; places 2 t, 2 t + 1 of column g of B, eight further for each register; columns 2 t, 2 t + 1 of rows g and
// g + 8 of D. Lanes 2 SELECTOR and 2 SELECTOR + 1 of a quad have the nibbles of slots 0 to 3 and 4 to 7, row g in the
// lower half.
template <int SELECTOR>
static void mma_sp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
    auto &warp = current->block->exchanged[threadIdx.x / 32];
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    memcpy(warp[lane], a, sizeof a);
    memcpy(warp[lane] + 4, b, sizeof b);
    warp[lane][8] = metadata;
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        int lower_row = i / 2, column = 2 * t + i % 2;
        for (int slot = 0; slot < 8; ++slot) {
            uint32_t nibbles = warp[4 * g + 2 * SELECTOR + slot / 4][8] >> 16 * lower_row;
            uint32_t nibble = nibbles >> 4 * (slot % 4) & 15, pair = warp[4 * g + slot % 4][slot / 4 * 2 + lower_row];
            if ((nibble & 3) >= nibble >> 2) d[i] = __builtin_nanf("");  // not ordered: undefined
            for (int value = 0; value < 2; ++value) {
                int place = 4 * slot + (value ? nibble >> 2 : nibble & 3);
                uint32_t other = warp[4 * column + place % 8 / 2][4 + place / 8];
                d[i] += to_float(pair >> 16 * value) * to_float(other >> 16 * (place % 2));
            }
        }
    }
    __syncwarp();
}
#endif

#include "decode.cu"

#if GROUPED
#define STACK_ARGUMENTS offsets, experts, pitch,
#else
#define STACK_ARGUMENTS
#endif
extern "C" void run(int width, int height, int shared_bytes, const u8 *x, const float *token_scale, const u8 *values,
                    const u8 *indices, const float *scale, const u16 *bias, u16 *out, OF_A_STACK int tokens, int outputs,
                    int columns) {
    emulate(width, height, shared_bytes, few_tokens_linear, x, token_scale, values, indices, scale, bias, out,
            STACK_ARGUMENTS tokens, outputs, columns);
}
