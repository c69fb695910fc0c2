// Zeros where masks have no bit, in many tensors at once: a row of blocks a tensor.
//
// To be defined (see zero_pruned.py): SIZE of an element in bytes (2 or 4) and THREADS of a block.

#include "overlap.h"

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#if SIZE == 4
typedef u32 Element;
#else
typedef u16 Element;
#endif

// The eight elements that a byte of a mask is of.
struct alignas(16) Eight {
    Element elements[8];
};

// Of each tensor: where it is, where its mask is, and how many elements it has.
struct Tensor {
    u64 values, bits, count;
};

extern "C" __global__ void __launch_bounds__(THREADS) zero_pruned(const Tensor *tensors, int blocks) {
    let_the_next_kernel_begin();
    wait_for_the_kernel_before();
    Tensor tensor = tensors[blockIdx.y];
    Element *values = (Element *)tensor.values;
    const u8 *bits = (const u8 *)tensor.bits;
    u64 whole = tensor.count / 8;
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < whole; i += (u64)blocks * THREADS) {
        Eight eight = ((const Eight *)values)[i];
        Element pruned = 0;
        for (int j = 0; j < 8; ++j)
            if (!(bits[i] >> j & 1)) pruned |= eight.elements[j], eight.elements[j] = 0;
        if (pruned) ((Eight *)values)[i] = eight;  // weights are zero already where an optimizer moved by gradients
    }
    u64 last = 8 * whole + threadIdx.x;
    if (blockIdx.x == 0 && last < tensor.count && !(bits[whole] >> threadIdx.x & 1)) values[last] = 0;
}
