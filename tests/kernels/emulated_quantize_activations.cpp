#define WARPS (THREADS / 32)
#include "emulated_gpu.h"

static uint16_t to_half(float value) { return to_float16(value); }

// To the nearest value of e4m3, halves to the even one, saturating; below 2^-6 the steps stay at 2^-9.
static uint8_t to_e4m3(float value) {
    uint8_t sign = bits_of(value) >> 24 & 0x80;
    float magnitude = std::fabs(value);
    if (std::isnan(magnitude)) return sign | 0x7f;
    if (magnitude >= 448) return sign | 0x7e;
    int exponent = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);
    int steps = (int)std::nearbyint(std::ldexp(magnitude, 3 - exponent));  // 8 to 16, below 2^-6 fewer than 8
    return sign | (8 * (exponent + 6) + steps);
}
#include "quantize_activations.cu"

extern "C" void quantize(int width, int height, const Element *input, u8 *output, float *scales, int stride,
                         int features, float smallest) {
    emulate(width, height, 0, quantize_token, input, output, scales, stride, features, smallest);
}

extern "C" void scale(int width, int height, u16 *product, const float *token_scales, const float *weight_scales,
                      const u16 *bias, int outputs) {
    emulate(width, height, 0, scale_product, product, token_scales, weight_scales, bias, outputs);
}
