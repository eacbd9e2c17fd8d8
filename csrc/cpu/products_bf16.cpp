// Products of operands rounded to bfloat16, summed in float32 and squared there: AVX512_BF16 (CMakeLists.txt compiles this file,
// and no other, with it). One instruction multiplies and adds two positions at a time, so a step is a pair of positions: an
// element holds the values at both, the first one in its low half.
#define FASTFIP_VECTOR_REGISTERS 32
#include <immintrin.h>

#include "cpu/products_kernel.h"

namespace fastfip {
namespace {

struct Pairs {
    typedef uint32_t Element;
    static constexpr bool kInPlace = false;

    // Positions are paired within a line; the last one of an odd line has a zero beside it.
    static int64_t steps(const Problem& p) { return p.positions / p.line * ((p.line + 1) / 2); }

    static void offsets(const Windows& w, int64_t* to) {
        for (int64_t z = 0; z < w.positions[0]; ++z)
            for (int64_t y = 0; y < w.positions[1]; ++y)
                for (int64_t x = 0; x < w.positions[2]; x += 2) *to++ = position_offset(w, z, y, x);
    }

    // Round to nearest, ties to even; a NaN stays one.
    static uint32_t round(float value) {
        uint32_t bits;
        __builtin_memcpy(&bits, &value, 4);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
        return value != value ? 0x7fc0u : rounded;
    }

    static void pack(const Problem& p, const Matrix& m, int64_t n, int64_t first, int64_t count, int64_t width, uint32_t* to) {
        constexpr int64_t kPart = 32, kMaxWidth = 64;
        float part[kPart * kMaxWidth];
        for (int64_t start = 0; start < p.positions; start += p.line) {
            for (int64_t t = 0; t < p.line; t += kPart) {
                const int64_t size = p.line - t < kPart ? p.line - t : kPart;
                Pack<float>::pack_from(m, n, first * m.stride_f + (start + t) * m.stride_t, size, count, width, part);
                for (int64_t i = 0; i < size; i += 2, to += width) {
                    const float *low = part + i * width, *high = low + width;
                    if (i + 1 < size)
                        for (int64_t f = 0; f < width; ++f) to[f] = round(low[f]) | round(high[f]) << 16;
                    else
                        for (int64_t f = 0; f < width; ++f) to[f] = round(low[f]);
                }
            }
        }
    }

    // Each element of the map with the one that the next position's window has in its place. Where an odd line ends that one is
    // of no line, and meets a zero: it must be finite, so it is a zero too where the map ends.
    static void pad(const Windows& w, int64_t n, int64_t channel, uint32_t* to, float* plain) {
        Pack<float>::pad(w, n, channel, plain);
        const int64_t size = padded_size(w), step = w.step[2];
        const int64_t paired = size > step ? size - step : 0;
        for (int64_t i = 0; i < paired; ++i) to[i] = round(plain[i]) | round(plain[i + step]) << 16;
        for (int64_t i = paired; i < size; ++i) to[i] = round(plain[i]);
    }

    template <class Lane, class Vec>
    static inline __attribute__((always_inline)) Vec multiply_add(uint32_t row, Lane lane, Vec sum) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lane, (__m512bh)_mm512_set1_epi32(static_cast<int>(row)));
    }
};

}  // namespace

Backend products_bf16() {
    typedef Kernel<float, 16, Pairs> Features;
    return {Features::scratch_bytes, Features::run, 16};
}

}  // namespace fastfip
