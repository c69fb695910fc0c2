// What decode.cu asks of a GPU, on a CPU: a thread for every lane, and the instructions by their definition in the PTX
// ISA. Included before decode.cu; `emulate` then runs a grid, block by block.

#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define EMULATED
#define __device__ static inline
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

struct Position {
    int x, y;
};
static thread_local Position threadIdx, blockIdx;

static std::unique_ptr<std::barrier<>> block_barrier, warp_barriers[WARPS];
static uint32_t exchanged[WARPS][32][9];

static void __syncthreads() { block_barrier->arrive_and_wait(); }
static void __syncwarp() { warp_barriers[threadIdx.x / 32]->arrive_and_wait(); }

static uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    uint64_t bytes = (uint64_t)high << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

static uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int distance) {
    auto &warp = exchanged[threadIdx.x / 32];
    warp[threadIdx.x % 32][0] = value;
    __syncwarp();
    uint32_t result = warp[threadIdx.x % 32 ^ distance][0];
    __syncwarp();
    return result;
}

#if HALF
static float to_float(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return value;
}
static uint16_t to_half(float value) {
    _Float16 half = value;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
#else
static float to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}
static uint16_t to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#endif

static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        double exact = (double)to_float(a >> shift) * to_float(b >> shift) + to_float(c >> shift);
        result |= (uint32_t)to_half(exact) << shift;
    }
    return result;
}

template <int WORDS>
static void load_words(const unsigned char *from, uint32_t (&to)[WORDS]) {
    memcpy(to, from, sizeof to);
}
static void load_once(const void *from, uint32_t (&to)[4]) { memcpy(to, from, sizeof to); }

// mma.sp::ordered_metadata.m16n8k32 with 16-bit operands: lane 4 g + t has the pairs of slots t and 4 + t of rows g and
// g + 8 of A; places 2 t, 2 t + 1 of column g of B, eight further for each register; columns 2 t, 2 t + 1 of rows g and
// g + 8 of D. Lanes 2 SELECTOR and 2 SELECTOR + 1 of a quad have the nibbles of slots 0 to 3 and 4 to 7, row g in the
// lower half.
template <int SELECTOR>
static void mma_sp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
    auto &warp = exchanged[threadIdx.x / 32];
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

template <typename Kernel, typename... Arguments>
static void emulate(int width, int height, Kernel kernel, Arguments... arguments) {
    for (int block = 0; block < width * height; ++block) {
        block_barrier = std::make_unique<std::barrier<>>(32 * WARPS);
        for (auto &barrier : warp_barriers) barrier = std::make_unique<std::barrier<>>(32);
        std::vector<std::thread> lanes;
        for (int lane = 0; lane < 32 * WARPS; ++lane)
            lanes.emplace_back([=] {
                threadIdx = {lane, 0}, blockIdx = {block % width, block / width};
                kernel(arguments...);
            });
        for (auto &lane : lanes) lane.join();
    }
}
