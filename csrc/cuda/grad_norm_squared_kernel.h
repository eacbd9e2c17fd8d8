// What the CUDA kernel of grad_norm_squared makes of each sample's tile of the weight gradient: the sum of its squares, a number
// for each warp. Include device.h (or the tests' cuda_on_cpu.h) before.
#pragma once

#include <stdint.h>

#include "weight_gradient.h"

namespace fastfip {
namespace cuda {

// parts [samples, blocks of tiles, warps] is p.out; features beyond the last one are zeros there.
template <class Kind>
struct Norms {
    typedef typename Kind::Sum Sum;

    FASTFIP_DEVICE void add(const Problem& p, const TilePlace& place, const Warp<Kind>& warp,
                            const typename Warp<Kind>::Sums& product, int64_t sample) {
        constexpr int WARPS = Kind::WARPS_DOWN * Kind::WARPS_ACROSS;
        Sum sum = 0;
        for_each_number<Kind>([&](int m, int n, int r) { sum += product[m][n][r] * product[m][n][r]; });
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) sum += of_other_lane(sum, mask);
        const int64_t line = sample * p.tiles_o * p.tiles_i * p.groups + place.index;
        if (warp.lane == 0) static_cast<Sum*>(p.out)[line * WARPS + thread_index() / 32] = sum;
    }

    FASTFIP_DEVICE void finish(const Problem&, const TilePlace&, const Warp<Kind>&) {}
};

template <class Kind, class Load>
FASTFIP_DEVICE void grad_norm_squared_block(const Problem& p) {
    weight_gradient_block<Kind, Load, Norms<Kind>>(p);
}

}  // namespace cuda
}  // namespace fastfip
