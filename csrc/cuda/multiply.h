// What the kernels do with a stage of operands in shared memory, and with the numbers that threads hold. Include device.h (or
// the tests' cuda_on_cpu.h) before.
#pragma once

#include "types.h"

namespace fastfip {
namespace cuda {

// How a block's tile is shared among its warps, and a warp's part of it among its threads.
template <class Kind>
struct Warp {
    static constexpr int ROWS = Kind::ROWS / Kind::WARPS_DOWN, COLUMNS = Kind::COLUMNS / Kind::WARPS_ACROSS;
    static constexpr int DOWN = ROWS / 16, ACROSS = COLUMNS / 8;  // products of 16 x 8
    typedef typename Kind::Sum Sums[DOWN][ACROSS][4];

    int lane, first_row, first_column;

    FASTFIP_DEVICE Warp() {
        const int warp = thread_index() / 32;
        lane = thread_index() % 32;
        first_row = warp % Kind::WARPS_DOWN * ROWS, first_column = warp / Kind::WARPS_DOWN * COLUMNS;
    }

    // Where in the tile number r of product (m, n) lies.
    FASTFIP_DEVICE int row(int m, int r) const { return first_row + m * 16 + r / 2 * 8 + lane / 4; }
    FASTFIP_DEVICE int column(int n, int r) const { return first_column + n * 8 + lane % 4 * 2 + r % 2; }
};

// sums[m][n] += the warp's part of the product of two stages, of which `left` of the depth is of use.
template <class Kind, bool A_DEPTH_FIRST, int A_LINE, bool B_DEPTH_FIRST, int B_LINE>
FASTFIP_DEVICE void multiply_stage(typename Warp<Kind>::Sums& sums, const Warp<Kind>& warp, const typename Kind::Element* left,
                                   const typename Kind::Element* right, int64_t depth, bool exact) {
    constexpr int DOWN = Warp<Kind>::DOWN, ACROSS = Warp<Kind>::ACROSS;
#pragma unroll
    for (int k = 0; k < Kind::BLOCK_DEPTH; k += Kind::DEPTH) {
        if (k >= depth) break;
        typename Kind::Fragment a[DOWN], b[ACROSS / 2];
#pragma unroll
        for (int m = 0; m < DOWN; ++m) {
            const int f = warp.first_row + m * 16;
            Kind::template load<A_DEPTH_FIRST, A_LINE>(a[m], left + (A_DEPTH_FIRST ? k * A_LINE + f : f * A_LINE + k), warp.lane,
                                                       exact);
        }
#pragma unroll
        for (int m = 0; m < ACROSS / 2; ++m) {
            const int f = warp.first_column + m * 16;
            Kind::template load<B_DEPTH_FIRST, B_LINE>(b[m], right + (B_DEPTH_FIRST ? k * B_LINE + f : f * B_LINE + k), warp.lane,
                                                       exact);
        }
#pragma unroll
        for (int m = 0; m < DOWN; ++m)
#pragma unroll
            for (int n = 0; n < ACROSS; ++n) Kind::multiply(sums[m][n], a[m], b[n / 2], n % 2, exact);
    }
}

// Calls f(m, n, r) for each number that a thread holds of the tile.
template <class Kind, class Function>
FASTFIP_DEVICE void for_each_number(const Function& f) {
#pragma unroll
    for (int m = 0; m < Warp<Kind>::DOWN; ++m)
#pragma unroll
        for (int n = 0; n < Warp<Kind>::ACROSS; ++n)
#pragma unroll
            for (int r = 0; r < 4; ++r) f(m, n, r);
}

}  // namespace cuda
}  // namespace fastfip
