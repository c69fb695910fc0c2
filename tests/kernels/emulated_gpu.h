// What the kernels ask of a GPU, on a CPU: a fiber for every lane, and the instructions by their definition in the PTX
// ISA. Included before a kernel; `emulate` then runs a grid, cluster by cluster. To be defined: WARPS of a block and,
// if not 1, CLUSTER, of blocks along y.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define EMULATED
#define OVERLAPS 1
#define __device__ static inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#ifndef CLUSTER
#define CLUSTER 1
#endif

struct Position {
    int x, y;
};

struct Barrier {
    int arrived = 0;
    long turns = 0;
};

struct Copy {
    uint8_t *to;
    const uint8_t *from;
    int size, available;
};

struct Block {
    std::vector<uint8_t> memory;  // dynamic shared memory
    std::map<int, Barrier> barriers;
    Barrier warp_barriers[WARPS];
    uint32_t exchanged[WARPS][32][9];
};

struct Lane {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Position thread, place;
    Block *block;
    std::deque<std::vector<Copy>> copies;  // in groups, the last of which is not yet committed
    bool finished;
};

static Block blocks[CLUSTER];
static Barrier cluster_barrier;
static Lane lanes[CLUSTER * WARPS * 32], *current;
static ucontext_t scheduler;
static std::function<void()> kernel_of_a_lane;
static bool progress;

#define threadIdx (current->thread)
#define blockIdx (current->place)
static Position gridDim;

static void wait_at(Barrier &barrier, int threads) {
    long turn = barrier.turns;
    if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.turns, progress = true;
    while (barrier.turns == turn) swapcontext(&current->context, &scheduler);
}

static void run_a_lane() {
    kernel_of_a_lane();
    current->finished = progress = true;
}

static void __syncthreads() { wait_at(current->block->barriers[0], 32 * WARPS); }
static void __syncwarp() { wait_at(current->block->warp_barriers[threadIdx.x / 32], 32); }
static void wait_for_cluster() { wait_at(cluster_barrier, 32 * WARPS * CLUSTER); }

static uint8_t *shared(uint32_t at, uint32_t size, int rank = -1) {
    Block &block = rank < 0 ? *current->block : blocks[rank];
    if (at % size || at + size > block.memory.size()) fprintf(stderr, "no shared memory at %u\n", at), abort();
    return block.memory.data() + at;
}

// A copy arrives when it is waited for, not before; what is read earlier is NaN, and so are indices.
static void start_copy(uint32_t to, const void *from, int size, int available) {
    if ((uintptr_t)from % size) fprintf(stderr, "a copy from an odd address\n"), abort();
    memset(shared(to, size), 255, size);
    current->copies.back().push_back({shared(to, size), (const uint8_t *)from, size, available});
}
static void commit_copies() { current->copies.emplace_back(); }
static void wait_for_copies(size_t groups) {
    for (; current->copies.size() > groups + 1; current->copies.pop_front())
        for (Copy &copy : current->copies.front()) {
            memset(copy.to, 0, copy.size);
            memcpy(copy.to, copy.from, copy.available);
        }
}

// ldmatrix.m8n8.x4: lane l has the address of row l % 8 of matrix l / 8; lane 4 g + t gets the t-th word of row g of each.
static void ldmatrix(uint32_t (&to)[4], uint32_t from) {
    auto &warp = current->block->exchanged[threadIdx.x / 32];
    int lane = threadIdx.x % 32;
    memcpy(warp[lane], shared(from, 16), 16);
    __syncwarp();
    for (int i = 0; i < 4; ++i) to[i] = warp[8 * i + lane / 4][lane % 4];
    __syncwarp();
}

static uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    uint64_t bytes = (uint64_t)high << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

static uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
    auto &warp = current->block->exchanged[threadIdx.x / 32];
    warp[threadIdx.x % 32][0] = value;
    __syncwarp();
    for (auto &lane : warp) value = lane[0] > value ? lane[0] : value;
    __syncwarp();
    return value;
}

static int __shfl_up_sync(uint32_t, int value, int distance) {
    auto &warp = current->block->exchanged[threadIdx.x / 32];
    int lane = threadIdx.x % 32;
    warp[lane][0] = value;
    __syncwarp();
    value = warp[lane < distance ? lane : lane - distance][0];
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
static float __uint_as_float(uint32_t bits) { return float_of(bits); }

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

static bool is_running() {
    for (Lane &lane : lanes)
        if (!lane.finished) return true;
    return false;
}

// Run the blocks of a cluster with `shared_bytes` of dynamic shared memory each, which has NaNs in it.
static void run_cluster(int x, int y, int shared_bytes) {
    constexpr int COUNT = CLUSTER * WARPS * 32, STACK = 1 << 16;
    for (Block &block : blocks) block = {}, block.memory.assign(shared_bytes, 255);
    cluster_barrier = {};
    for (int i = 0; i < COUNT; ++i) {
        Lane &lane = lanes[i];
        int rank = i / (32 * WARPS);
        if (!lane.stack) lane.stack.reset(new char[STACK]);
        lane.thread = {i % (32 * WARPS), 0}, lane.place = {x, y + rank}, lane.block = &blocks[rank];
        lane.copies.assign(1, {}), lane.finished = false;
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.get(), lane.context.uc_stack.ss_size = STACK;
        lane.context.uc_link = &scheduler;
        makecontext(&lane.context, run_a_lane, 0);
    }
    // One warp as far as it gets, then the next, back and forth: whatever is not waited for has not happened yet.
    for (int round = 0; is_running(); ++round) {
        bool stuck = true;
        for (int i = 0; i < COUNT; i += 32) {
            int warp = round % 2 ? COUNT - 32 - i : i;
            do {
                progress = false;
                for (int lane = warp; lane < warp + 32; ++lane)
                    if (!lanes[lane].finished) current = &lanes[lane], swapcontext(&scheduler, &current->context);
                stuck &= !progress;
            } while (progress);
        }
        if (stuck) fprintf(stderr, "every lane waits for another\n"), abort();
    }
}

template <typename Kernel, typename... Arguments>
static void emulate(int width, int height, int shared_bytes, Kernel kernel, Arguments... arguments) {
    kernel_of_a_lane = [=] { kernel(arguments...); };
    gridDim = {width, height};
    for (int y = 0; y < height; y += CLUSTER)
        for (int x = 0; x < width; ++x) run_cluster(x, y, shared_bytes);
}
