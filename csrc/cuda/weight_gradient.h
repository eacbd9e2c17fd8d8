// Tiles of each sample's weight gradient, for sum_grad_squared and grad_norm_squared. A block owns a tile and a share of the
// samples; it forms its tile of G_n in registers, hands it to a collector and goes on to the next sample. Positions of all its
// samples are one sequence, so that loads run ahead over the end of a sample. Include device.h (or the tests' cuda_on_cpu.h)
// before.
#pragma once

#include <stdint.h>

#include "load.h"
#include "multiply.h"
#include "problem.h"

namespace fastfip {
namespace cuda {

template <class Kind, class Load>
struct Layout {
    static constexpr int STAGE_BYTES = (Load::G_NUMBERS + Load::X_NUMBERS) * static_cast<int>(sizeof(typename Kind::Element));
    static constexpr int BYTES = Load::STAGES * STAGE_BYTES + Load::TABLE_BYTES;
    static constexpr int THREADS = threads_of<Kind>;
    static_assert(BYTES <= 48 * 1024, "more shared memory than a kernel may have without asking");
    static_assert(STAGE_BYTES % 16 == 0, "copies of 16 bytes are aligned");
};

// Which tile of which group a block has.
struct TilePlace {
    int64_t index, group, first_o, first_i;
};

// `Collect` has add(product, sample) for each sample's tile and finish() for the block's last act.
template <class Kind, class Load, class Collect>
FASTFIP_DEVICE void weight_gradient_block(const Problem& p) {
    typedef typename Kind::Element Element;
    typedef Layout<Kind, Load> Memory;

    char* const memory = shared_memory();
    auto g_stage = [&](int s) { return reinterpret_cast<Element*>(memory + s * Memory::STAGE_BYTES); };
    auto x_stage = [&](int s) { return g_stage(s) + Load::G_NUMBERS; };

    const int64_t tile = block_x(), tiles = p.tiles_o * p.tiles_i;
    const TilePlace place = {tile, tile / tiles, tile % tiles % p.tiles_o * Kind::ROWS, tile % tiles / p.tiles_o * Kind::COLUMNS};
    const int64_t begin = first_sample(block_y(), p.shares, p.samples), end = first_sample(block_y() + 1, p.shares, p.samples);
    const Warp<Kind> warp;

    typename Warp<Kind>::Sums product = {};
    Collect collect;

    Load load(p, memory + Load::STAGES * Memory::STAGE_BYTES, place.group, place.first_o, place.first_i);
    Cursor<Kind> ahead = {begin, 0}, here = {begin, 0};
#pragma unroll
    for (int s = 0; s < Load::STAGES - 1; ++s) {
        if (ahead.sample < end) {
            load.fetch(p, ahead, g_stage(s), x_stage(s));
            load.store(g_stage(s), x_stage(s));
            ahead.next(p);
        }
        copies_end_group();
    }
    for (int stage = 0, next = Load::STAGES - 1; here.sample < end;) {
        copies_wait<Load::STAGES - 2>();
        barrier();  // the stage has come, and nobody reads the one that is filled now
        const bool more = ahead.sample < end;
        if (more) load.fetch(p, ahead, g_stage(next), x_stage(next));
        copies_end_group();

        const int left = p.positions - here.t;
        multiply_stage<Kind, Load::DEPTH_FIRST, Load::G_LINE, Load::DEPTH_FIRST, Load::X_LINE>(product, warp, g_stage(stage),
                                                                                              x_stage(stage), left, p.exact);
        if (left <= Kind::BLOCK_DEPTH) {  // the sample's last positions: the tile of G_n is whole
            collect.add(p, place, warp, product, here.sample);
            for_each_number<Kind>([&](int m, int n, int r) { product[m][n][r] = 0; });
        }
        if (more) {
            load.store(g_stage(next), x_stage(next));
            ahead.next(p);
        }
        here.next(p);
        stage = stage + 1 == Load::STAGES ? 0 : stage + 1;
        next = next + 1 == Load::STAGES ? 0 : next + 1;
    }
    collect.finish(p, place, warp);
}

}  // namespace cuda
}  // namespace fastfip
