// What the kernels ask of a GPU, on a CPU: a thread for every lane, and the instructions by their definition in the PTX
// ISA. Included before a kernel; `emulate` then runs a grid, block by block. To be defined: WARPS of a block.

#include <barrier>
#include <cmath>
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

static uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
    auto &warp = exchanged[threadIdx.x / 32];
    warp[threadIdx.x % 32][0] = value;
    __syncwarp();
    for (auto &lane : warp) value = lane[0] > value ? lane[0] : value;
    __syncwarp();
    return value;
}

static float __fdiv_rn(float a, float b) { return a / b; }
static float __fmul_rn(float a, float b) { return a * b; }

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static float from_half(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return value;
}
static uint16_t to_float16(float value) {
    _Float16 half = value;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
static uint16_t to_bfloat(float value) {
    uint32_t bits = bits_of(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
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
