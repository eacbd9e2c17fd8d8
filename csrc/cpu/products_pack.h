// Copies of operands in the order and type in which a kernel reads them. Included by the files of each instruction set: no inline
// function of the standard library, everything in an unnamed namespace (see products_kernel.h).
#pragma once

#include <stdint.h>

#include "fastfip.h"

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define FASTFIP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int FastfipIndex __attribute__((vector_size(16)));
#define FASTFIP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FastfipIndex{__VA_ARGS__})
#endif

namespace fastfip {
namespace {

template <class R>
struct Pack {
    static R load(const float* p) { return static_cast<R>(*p); }
    static R load(const double* p) { return static_cast<R>(*p); }

    struct Bf16 { uint16_t bits; };
    struct F16 { uint16_t bits; };

    // Whether S is read as it is into floats.
    template <class S>
    static constexpr bool is_float(const S*) { return false; }
    static constexpr bool is_float(const float*) { return sizeof(R) == sizeof(float); }

    static float from_bits(uint32_t bits) {
        float value;
        __builtin_memcpy(&value, &bits, 4);
        return value;
    }
    static R load(const Bf16* p) { return static_cast<R>(from_bits(static_cast<uint32_t>(p->bits) << 16)); }
    static R load(const F16* p) {
        const uint32_t h = p->bits, magnitude = (h & 0x7fffu) << 13;
        // Scaling by 2^112 moves the exponent's bias and is exact for subnormal numbers too; Inf and NaN keep all ones above.
        float value = from_bits(magnitude) * from_bits(0x77800000u);
        if ((h & 0x7c00u) == 0x7c00u) value = from_bits(magnitude | 0x7f800000u);
        return static_cast<R>((h & 0x8000u) ? -value : value);
    }

    // to[t * width + f] = x[f * stride_f + t]: four by four in registers; positions and count
    // are multiples of four.
    static void transpose(const float* x, int64_t stride_f, int64_t positions, int64_t count, int64_t width, float* to) {
        typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
        const auto out = [=](int64_t t, int64_t f) -> Four& { return *reinterpret_cast<Four*>(to + t * width + f); };
        const auto in = [x](int64_t at) { return *reinterpret_cast<const Four*>(x + at); };
        // A line of sixteen positions is used up at once: rows that lie 4 KiB apart share one set of the first-level cache.
        for (int64_t t0 = 0; t0 < positions; t0 += 16) {
            const int64_t t1 = t0 + 16 < positions ? t0 + 16 : positions;
            for (int64_t f = 0; f < count; f += 4) {
                for (int64_t t = t0; t < t1; t += 4) {
                    const int64_t at = f * stride_f + t;
                    const Four a = in(at), b = in(at + stride_f), c = in(at + 2 * stride_f), d = in(at + 3 * stride_f);
                    const Four ab0 = FASTFIP_SHUFFLE(a, b, 0, 4, 1, 5), ab1 = FASTFIP_SHUFFLE(a, b, 2, 6, 3, 7);
                    const Four cd0 = FASTFIP_SHUFFLE(c, d, 0, 4, 1, 5), cd1 = FASTFIP_SHUFFLE(c, d, 2, 6, 3, 7);
                    out(t, f) = FASTFIP_SHUFFLE(ab0, cd0, 0, 1, 4, 5);
                    out(t + 1, f) = FASTFIP_SHUFFLE(ab0, cd0, 2, 3, 6, 7);
                    out(t + 2, f) = FASTFIP_SHUFFLE(ab1, cd1, 0, 1, 4, 5);
                    out(t + 3, f) = FASTFIP_SHUFFLE(ab1, cd1, 2, 3, 6, 7);
                }
            }
        }
    }

    template <int Count, class S>
    static void copy(const S* x, int64_t stride_t, int64_t positions, int64_t width, R* to) {
        for (int64_t t = 0; t < positions; ++t, x += stride_t, to += width) {
#pragma GCC unroll 8
            for (int f = 0; f < Count; ++f) to[f] = load(x + f);
        }
    }

    // to[t * width + f] = x[t, f] for f < count, zero for count <= f < width.
    template <class S>
    static void pack(const S* x, int64_t stride_t, int64_t stride_f, int64_t positions, int64_t count, int64_t width, R* to) {
        if (count < width)
            for (int64_t t = 0; t < positions; ++t)
                for (int64_t f = count; f < width; ++f) to[t * width + f] = 0;
        if (stride_f == 1) {
            switch (count) {  // of a size known to the compiler, few features are a few moves
                case 1: return copy<1>(x, stride_t, positions, width, to);
                case 2: return copy<2>(x, stride_t, positions, width, to);
                case 3: return copy<3>(x, stride_t, positions, width, to);
                case 4: return copy<4>(x, stride_t, positions, width, to);
                case 5: return copy<5>(x, stride_t, positions, width, to);
                case 6: return copy<6>(x, stride_t, positions, width, to);
                case 7: return copy<7>(x, stride_t, positions, width, to);
            }
            for (int64_t t = 0; t < positions; ++t) {
                const S* from = x + t * stride_t;
                for (int64_t f = 0; f < count; ++f) to[t * width + f] = load(from + f);
            }
        } else if (is_float(x) && stride_t == 1 && positions >= 4 && count >= 4) {
            const int64_t whole_t = positions / 4 * 4, whole_f = count / 4 * 4;
            transpose(reinterpret_cast<const float*>(x), stride_f, whole_t, whole_f, width, reinterpret_cast<float*>(to));
            for (int64_t f = whole_f; f < count; ++f)
                for (int64_t t = 0; t < whole_t; ++t) to[t * width + f] = load(x + f * stride_f + t);
            for (int64_t f = 0; f < count; ++f)
                for (int64_t t = whole_t; t < positions; ++t) to[t * width + f] = load(x + f * stride_f + t);
        } else {
            // Sixteen positions at a time: what is written stays in the first-level cache until its lines are full.
            for (int64_t t0 = 0; t0 < positions; t0 += 16) {
                const int64_t t1 = t0 + 16 < positions ? t0 + 16 : positions;
                for (int64_t f = 0; f < count; ++f) {
                    const S* from = x + f * stride_f;
                    for (int64_t t = t0; t < t1; ++t) to[t * width + f] = load(from + t * stride_t);
                }
            }
        }
    }

    static void pack(const Matrix& m, int64_t n, int64_t first, int64_t positions, int64_t count, int64_t width, R* to) {
        pack_from(m, n, first * m.stride_f, positions, count, width, to);
    }

    static void pack_from(const Matrix& m, int64_t n, int64_t first, int64_t positions, int64_t count, int64_t width, R* to) {
        const int64_t at = n * m.stride_n + first, st = m.stride_t, sf = m.stride_f;
        switch (m.type) {
            case Type::f32: return pack(static_cast<const float*>(m.data) + at, st, sf, positions, count, width, to);
            case Type::f64: return pack(static_cast<const double*>(m.data) + at, st, sf, positions, count, width, to);
            case Type::bf16: return pack(static_cast<const Bf16*>(m.data) + at, st, sf, positions, count, width, to);
            case Type::f16: return pack(static_cast<const F16*>(m.data) + at, st, sf, positions, count, width, to);
        }
    }

    // One channel of a sample with its padding: every padding mode is a table of source indices for each axis.
    template <class S>
    static void pad(const Windows& w, const S* x, R* to) {
        const int64_t *sz = w.source[0], *sy = w.source[1], *sx = w.source[2];
        const int64_t width = w.padded[2];
        int64_t from = 0, until = width;  // the run of x that is copied as it is
        while (from < width && sx[from] != 0) ++from;
        for (until = from; until < width && sx[until] == until - from;) ++until;
        for (int64_t z = 0; z < w.padded[0]; ++z) {
            for (int64_t y = 0; y < w.padded[1]; ++y, to += width) {
                if (sz[z] < 0 || sy[y] < 0) {
                    for (int64_t i = 0; i < width; ++i) to[i] = 0;
                    continue;
                }
                const S* row = x + sz[z] * w.stride[0] + sy[y] * w.stride[1];
                const int64_t step = w.stride[2];
                for (int64_t i = 0; i < from; ++i) to[i] = sx[i] < 0 ? R(0) : load(row + sx[i] * step);
                if (step == 1)
                    for (int64_t i = from; i < until; ++i) to[i] = load(row + (i - from));
                else
                    for (int64_t i = from; i < until; ++i) to[i] = load(row + (i - from) * step);
                for (int64_t i = until; i < width; ++i) to[i] = sx[i] < 0 ? R(0) : load(row + sx[i] * step);
            }
        }
    }

    static void pad(const Windows& w, int64_t n, int64_t channel, R* to) {
        const int64_t at = n * w.stride_n + channel * w.stride_c;
        switch (w.type) {
            case Type::f32: return pad(w, static_cast<const float*>(w.data) + at, to);
            case Type::f64: return pad(w, static_cast<const double*>(w.data) + at, to);
            case Type::bf16: return pad(w, static_cast<const Bf16*>(w.data) + at, to);
            case Type::f16: return pad(w, static_cast<const F16*>(w.data) + at, to);
        }
    }
};

}  // namespace
}  // namespace fastfip
