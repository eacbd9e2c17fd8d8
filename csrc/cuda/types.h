// The types of operands: how 16 rows by DEPTH numbers come from shared memory to the registers of a warp, and how they are
// multiplied on tensor cores. A block makes ROWS x COLUMNS numbers, each a sum over depth (of the weight gradient rows and
// columns are features and depth is positions; of a projection rows are positions, columns directions and depth is features),
// BLOCK_DEPTH of it at a time. Include device.h (or the tests' cuda_on_cpu.h) before.
//
// A fragment holds rows q and q + 8 (q = lane / 4) in the order (q, low), (q + 8, low), (q, high), (q + 8, high), low and
// high being halves of the depth. It is the left operand of a product of 16 rows, and {0, 2} and {1, 3} of it are the
// right operands of two products of 8 columns. Every product of 16 x 8 lies in four numbers: (q, 2p), (q, 2p + 1),
// (q + 8, 2p), (q + 8, 2p + 1) with p = lane % 4.
#pragma once

#include <stdint.h>

namespace fastfip {
namespace cuda {

template <class Kind>
constexpr int threads_of = 32 * Kind::WARPS_DOWN * Kind::WARPS_ACROSS;

template <bool BFLOAT16>
struct Half {
    typedef uint16_t Element;  // only its bits are ever needed
    typedef float Sum;
    typedef struct {
        uint32_t r[4];
    } Fragment;
    static constexpr int ROWS = 128, COLUMNS = 64, WARPS_DOWN = 4, WARPS_ACROSS = 2, DEPTH = 16, BLOCK_DEPTH = 32, STAGES = 3;
    static constexpr int BLOCKS[2] = {2, 1};
    static constexpr int PAD = 8, PAD_DEPTH = 8;  // 16 bytes beyond a multiple of 128 (or 5 times 16): no bank twice

    template <bool DEPTH_FIRST, int LINE>
    static FASTFIP_DEVICE void load(Fragment& x, const Element* s, int lane, bool) {
        const int low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
        if constexpr (DEPTH_FIRST)
            load_matrices<true>(x.r, s + (low + third) * LINE + second);
        else
            load_matrices<false>(x.r, s + (low + second) * LINE + third);
    }

    static FASTFIP_DEVICE void multiply(float (&c)[4], const Fragment& a, const Fragment& b, int half, bool) {
        multiply_16bit<BFLOAT16>(c, a.r, b.r[half], b.r[half + 2]);
    }

    static FASTFIP_DEVICE float number(Element x) { return BFLOAT16 ? as_float(uint32_t(x) << 16) : float16_value(x); }
};

template <class T, int LINE, bool DEPTH_FIRST>
FASTFIP_DEVICE T element(const T* s, int row, int depth) {
    return DEPTH_FIRST ? s[depth * LINE + row] : s[row * LINE + depth];
}

// float32 by TF32 tensor cores. A number is the sum of two of TF32 to 2^-22 of itself; `exact` multiplies both parts (three
// products) and adds eight of them at a time in ordinary float32, since the tensor cores' own additions are cut off, not rounded.
struct Single {
    typedef float Element;
    typedef float Sum;
    typedef struct {
        uint32_t high[4], low[4];
    } Fragment;
    static constexpr int ROWS = 64, COLUMNS = 64, WARPS_DOWN = 2, WARPS_ACROSS = 2, DEPTH = 8, BLOCK_DEPTH = 32, STAGES = 2;
    static constexpr int BLOCKS[2] = {3, 3};
    static constexpr int PAD = 8, PAD_DEPTH = 4;

    template <bool DEPTH_FIRST, int LINE>
    static FASTFIP_DEVICE void load(Fragment& x, const float* s, int lane, bool exact) {
        for (int j = 0; j < 4; ++j) {
            const float v = element<float, LINE, DEPTH_FIRST>(s, lane / 4 + j % 2 * 8, lane % 4 + j / 2 * 4);
            x.high[j] = to_tf32(v);
            if (exact) x.low[j] = to_tf32(v - as_float(x.high[j]));
        }
    }

    static FASTFIP_DEVICE void multiply(float (&c)[4], const Fragment& a, const Fragment& b, int half, bool exact) {
        if (!exact) return multiply_tf32(c, a.high, b.high[half], b.high[half + 2]);
        float few[4] = {0, 0, 0, 0};
        multiply_tf32(few, a.low, b.high[half], b.high[half + 2]);
        multiply_tf32(few, a.high, b.low[half], b.low[half + 2]);
        multiply_tf32(few, a.high, b.high[half], b.high[half + 2]);
        for (int j = 0; j < 4; ++j) c[j] += few[j];
    }

    static FASTFIP_DEVICE float number(float x) { return x; }
};

struct Double {
    typedef double Element;
    typedef double Sum;
    typedef struct {
        double r[4];
    } Fragment;
    static constexpr int ROWS = 64, COLUMNS = 32, WARPS_DOWN = 2, WARPS_ACROSS = 2, DEPTH = 8, BLOCK_DEPTH = 16, STAGES = 3;
    static constexpr int BLOCKS[2] = {3, 3};
    static constexpr int PAD = 4, PAD_DEPTH = 4;

    template <bool DEPTH_FIRST, int LINE>
    static FASTFIP_DEVICE void load(Fragment& x, const double* s, int lane, bool) {
        for (int j = 0; j < 4; ++j)
            x.r[j] = element<double, LINE, DEPTH_FIRST>(s, lane / 4 + j % 2 * 8, lane % 4 + j / 2 * 4);
    }

    static FASTFIP_DEVICE void multiply(double (&c)[4], const Fragment& a, const Fragment& b, int half, bool) {
        for (int k = 0; k < 4; k += 2) {
            multiply_f64(c[0], c[1], a.r[k], b.r[half + k]);
            multiply_f64(c[2], c[3], a.r[k + 1], b.r[half + k]);
        }
    }

    static FASTFIP_DEVICE double number(double x) { return x; }
};

}  // namespace cuda
}  // namespace fastfip
