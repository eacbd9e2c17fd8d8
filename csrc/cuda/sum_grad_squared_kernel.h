// What the CUDA kernel of sum_grad_squared makes of each sample's tile of the weight gradient: its square, and itself where the
// gradient is wanted, are added to running tiles. Include device.h (or the tests' cuda_on_cpu.h) before.
#pragma once

#include <stdint.h>

#include "weight_gradient.h"

namespace fastfip {
namespace cuda {

template <class Kind, bool GRADIENT>
struct Squares {
    typedef typename Kind::Sum Sum;
    typedef typename Warp<Kind>::Sums Sums;
    static constexpr int DOWN = Warp<Kind>::DOWN, ACROSS = Warp<Kind>::ACROSS;

    Sum out[DOWN][ACROSS][4] = {}, grad[GRADIENT ? DOWN : 1][GRADIENT ? ACROSS : 1][4] = {};

    FASTFIP_DEVICE void add(const Problem&, const TilePlace&, const Warp<Kind>&, const Sums& product, int64_t) {
        for_each_number<Kind>([&](int m, int n, int r) {
            out[m][n][r] += product[m][n][r] * product[m][n][r];
            if constexpr (GRADIENT) grad[m][n][r] += product[m][n][r];
        });
    }

    FASTFIP_DEVICE void finish(const Problem& p, const TilePlace& place, const Warp<Kind>& warp) {
        const bool parts = p.shares > 1;
        Sum* const to_out = static_cast<Sum*>(parts ? p.part_out : p.out);
        Sum* const to_grad = static_cast<Sum*>(parts ? p.part_grad : p.grad);
        const int64_t share_first = parts ? block_y() * p.groups * p.outputs * p.inputs : 0;
        for_each_number<Kind>([&](int m, int n, int r) {
            const int64_t o = place.first_o + warp.row(m, r), i = place.first_i + warp.column(n, r);
            if (o >= p.outputs || i >= p.inputs) return;
            const int64_t at = share_first + (place.group * p.outputs + o) * p.inputs + i;
            to_out[at] = out[m][n][r] + (parts ? Sum(0) : to_out[at]);
            if constexpr (GRADIENT) to_grad[at] = grad[m][n][r] + (parts ? Sum(0) : to_grad[at]);
        });
    }
};

template <class Kind, class Load, bool GRADIENT>
FASTFIP_DEVICE void sum_grad_squared_block(const Problem& p) {
    weight_gradient_block<Kind, Load, Squares<Kind, GRADIENT>>(p);
}

// result[e] += parts[0][e] + parts[1][e] + ..., in this order whatever the device.
template <class Sum>
FASTFIP_DEVICE void add_shares_block(Sum* result, const Sum* parts, int64_t numbers, int64_t shares) {
    const int64_t e = block_x() * 256 + thread_index();
    if (e >= numbers) return;
    Sum sum = 0;
    for (int64_t s = 0; s < shares; ++s) sum += parts[s * numbers + e];
    result[e] += sum;
}

}  // namespace cuda
}  // namespace fastfip
