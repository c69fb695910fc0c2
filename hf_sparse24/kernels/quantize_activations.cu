// Dynamic quantization of activations, and the scales that are left for after a product: one pass over memory each.
//
// To be defined (see quantize_activations.py): INPUT of the activations (32: float32, 16: float16, 17: bfloat16), FP8 (0:
// int8, 1: e4m3), WIDTH (elements a thread reads at once), VECTORS (how often) and THREADS of a block.

#include "overlap.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

constexpr float LARGEST = FP8 ? 448.0f : 127.0f;

#ifndef EMULATED
__device__ float float_of(u32 bits) { return __uint_as_float(bits); }
__device__ u32 bits_of(float value) { return __float_as_uint(value); }

__device__ float from_half(u16 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

__device__ u16 to_half(float value) {
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

__device__ u16 to_bfloat(float value) {
    u16 half;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

__device__ u8 to_e4m3(float value) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
    return pair;
}
#endif

__device__ float to_float(float value) { return value; }
__device__ float to_float(u16 half) { return INPUT == 17 ? float_of((u32)half << 16) : from_half(half); }

#if INPUT == 32
typedef float Element;
#else
typedef u16 Element;
#endif

struct alignas(WIDTH * sizeof(Element)) Vector {
    Element elements[WIDTH];
};
struct alignas(WIDTH) Bytes {
    u8 bytes[WIDTH];
};

__device__ u8 rounded(float scaled) {
#if FP8
    return to_e4m3(scaled);  // saturates
#else
    return (u8)(signed char)fminf(fmaxf(rintf(scaled), -LARGEST), LARGEST);
#endif
}

// A block a token. The token stays in registers between the search for its largest magnitude and its rounding. As bits
// of |x|, magnitudes are ordered like integers, with infinity and then NaN at the top.
extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_token(const Element *input, u8 *output, float *scales, int stride, int features, float smallest) {
    __shared__ u32 largest_of[THREADS / 32];
    let_the_next_kernel_begin();
    wait_for_the_kernel_before();
    const Element *token = input + (long long)blockIdx.x * stride;
    u8 *quantized = output + (long long)blockIdx.x * features;
    Vector vectors[VECTORS];
    u32 largest = 0;
    for (int i = 0; i < VECTORS; ++i) {
        int column = WIDTH * (threadIdx.x + i * THREADS);
        if (column < features) vectors[i] = *(const Vector *)(token + column);
    }
    for (int i = 0; i < VECTORS; ++i)
        if (WIDTH * (threadIdx.x + i * THREADS) < features)
            for (int j = 0; j < WIDTH; ++j) {
                u32 magnitude = bits_of(to_float(vectors[i].elements[j])) & 0x7fffffff;
                largest = magnitude > largest ? magnitude : largest;
            }
    largest = __reduce_max_sync(0xffffffff, largest);
    if (threadIdx.x % 32 == 0) largest_of[threadIdx.x / 32] = largest;
    __syncthreads();
    for (int warp = 0; warp < THREADS / 32; ++warp) largest = largest_of[warp] > largest ? largest_of[warp] : largest;
    float scale = __fdiv_rn(float_of(largest), LARGEST);
    if (scale < smallest) scale = 1;
    float inverse = __fdiv_rn(1.0f, scale);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    for (int i = 0; i < VECTORS; ++i) {
        int column = WIDTH * (threadIdx.x + i * THREADS);
        if (column >= features) break;
        Bytes bytes;
        for (int j = 0; j < WIDTH; ++j) bytes.bytes[j] = rounded(__fmul_rn(to_float(vectors[i].elements[j]), inverse));
        *(Bytes *)(quantized + column) = bytes;
    }
}

// product[m][n] * weight_scale[n] * token_scale[m] + bias[n], where the product was in bfloat16, in its place. The
// result is in the dtype INPUT, also of 16 bits. `outputs` is a multiple of 8.
extern "C" __global__ void __launch_bounds__(THREADS)
    scale_product(u16 *product, const float *token_scales, const float *weight_scales, const u16 *bias, int outputs) {
    let_the_next_kernel_begin();
    wait_for_the_kernel_before();
    int n = 8 * (threadIdx.x + blockIdx.y * THREADS);
    if (n >= outputs) return;
    struct alignas(16) Eight {
        u16 elements[8];
    };
    Eight *place = (Eight *)(product + (long long)blockIdx.x * outputs + n);
    Eight eight = *place;
    float token_scale = token_scales[blockIdx.x];
    for (int j = 0; j < 8; ++j) {
        float value = float_of((u32)eight.elements[j] << 16);
        if (weight_scales) value *= weight_scales[n + j];
        value *= token_scale;
        if (bias) value += INPUT == 17 ? float_of((u32)bias[n + j] << 16) : from_half(bias[n + j]);
        eight.elements[j] = INPUT == 17 ? to_bfloat(value) : to_half(value);
    }
    *place = eight;
}
