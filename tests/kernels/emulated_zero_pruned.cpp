#define WARPS (THREADS / 32)
#include "emulated_gpu.h"
#include "zero_pruned.cu"

extern "C" void zero(int width, int height, const Tensor *tensors, int blocks) {
    emulate(width, height, 0, zero_pruned, tensors, blocks);
}
