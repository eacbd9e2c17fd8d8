// The parts of the CUDA backend that need no CUDA compiler.
#include "paired_problem.h"
#include "problem.h"

namespace fastfip {
namespace cuda {

int64_t sum_grad_squared_shares(const Sizes& sizes, Type type, int multiprocessors) {
    int64_t taps = 1;
    for (int64_t size : sizes.kernel) taps *= size;
    return shares_of(type, sizes.samples, sizes.outputs / sizes.groups, sizes.channels / sizes.groups * taps, sizes.groups,
                     multiprocessors);
}

NormPlan grad_norm_squared_plan(const Sizes& sizes, Type type, bool gram, int multiprocessors) {
    int64_t taps = 1, positions = 1;
    for (int d = 0; d < 3; ++d) taps *= sizes.kernel[d], positions *= sizes.positions[d];
    if (gram) {
        const int64_t shares = paired_shares(type, sizes.samples, positions, positions, 1, multiprocessors);
        return {shares, shares * positions};
    }
    const Tile tile = tile_of(type);
    const int64_t tiles = divide_up(sizes.outputs / sizes.groups, tile.outputs) *
                          divide_up(sizes.channels / sizes.groups * taps, tile.inputs) * sizes.groups;
    return {norm_shares_of(type, sizes.samples, tiles, multiprocessors), tiles * tile.threads / 32};
}

int64_t spectral_grad_shares(const Sizes& sizes, int64_t directions, Type type, int multiprocessors) {
    const int64_t positions = sizes.positions[0] * sizes.positions[1] * sizes.positions[2];
    return paired_shares(type, sizes.samples, positions, directions, sizes.groups, multiprocessors);
}

}  // namespace cuda
}  // namespace fastfip
