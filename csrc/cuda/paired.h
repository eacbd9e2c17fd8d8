// sum_t (g U)[t, k] (x V)[t, k] for each sample and column k. A block owns a sample's share of positions and some columns. It forms
// a tile of one product in registers on tensor cores, then that of the other, multiplies and adds them there, and goes on to
// the next positions. All of that is one sequence, so that loads run ahead from one product to the next. The second product
// may be known (it is read where it lies). With GRAM the right operands are the rows themselves, and a number above the diagonal
// stands for that below it, too. Include device.h (or the tests' cuda_on_cpu.h) before.
#pragma once

#include <stdint.h>

#include "multiply.h"
#include "paired_load.h"

namespace fastfip {
namespace cuda {

template <class Kind, class Left, class Right>
struct PairedLayout {
    static constexpr int STAGE_BYTES = (Left::NUMBERS + Right::NUMBERS) * static_cast<int>(sizeof(typename Kind::Element));
    static constexpr int BYTES = Left::STAGES * STAGE_BYTES + Left::TABLE_BYTES;
    static constexpr int SUM_BYTES = Kind::WARPS_DOWN * Kind::COLUMNS * static_cast<int>(sizeof(typename Kind::Sum));
    static_assert(BYTES <= 48 * 1024, "more shared memory than a kernel may have without asking");
    static_assert(STAGE_BYTES % 16 == 0 && Left::NUMBERS * sizeof(typename Kind::Element) % 16 == 0, "copies are aligned");
    static_assert(SUM_BYTES <= STAGE_BYTES, "sums are exchanged where a stage was");
};

// One number a column and warp -> parts: lanes of the same columns first, then warps, always in the same order.
template <class Kind>
FASTFIP_DEVICE void write_columns(const PairedProblem& p, const PairedPlace& place, const Warp<Kind>& warp,
                                  typename Kind::Sum (&total)[Warp<Kind>::ACROSS][2], int64_t share) {
    typedef typename Kind::Sum Sum;
    Sum* const sums = reinterpret_cast<Sum*>(shared_memory());
    barrier();  // nobody reads a stage any more
#pragma unroll
    for (int n = 0; n < Warp<Kind>::ACROSS; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            Sum sum = total[n][r];
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) sum += of_other_lane(sum, mask);
            if (warp.lane < 4) sums[warp.first_row / Warp<Kind>::ROWS * Kind::COLUMNS + warp.column(n, r)] = sum;
        }
    barrier();
    const int column = thread_index();
    if (column >= Kind::COLUMNS || place.first + column >= p.columns) return;
    Sum sum = 0;
    for (int w = 0; w < Kind::WARPS_DOWN; ++w) sum += sums[w * Kind::COLUMNS + column];
    const int64_t line = (place.sample * p.shares + share) * p.groups + place.group;
    static_cast<Sum*>(p.parts)[line * p.columns + place.first + column] = sum;
}

// total += product times the numbers of the operand that is a product already.
template <class Kind>
FASTFIP_DEVICE void multiply_known(const PairedProblem& p, const PairedPlace& place, const Warp<Kind>& warp,
                                   const typename Warp<Kind>::Sums& product, int t,
                                   typename Kind::Sum (&total)[Warp<Kind>::ACROSS][2]) {
    const bool of_x = p.made == 0;
    const int64_t step = of_x ? p.x_c : p.g_o, first = place.group * p.columns + place.first;
    const typename Kind::Element* from =
        static_cast<const typename Kind::Element*>(of_x ? p.x : p.g) + place.sample * (of_x ? p.x_n : p.g_n) + first * step;
#pragma unroll
    for (int m = 0; m < Warp<Kind>::DOWN; ++m)
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
            const int row = t + warp.row(m, r);
            if (row >= place.end) continue;
            const Position where = place_of(p, row);
            const typename Kind::Element* line = from + (of_x ? where.x : where.g);
#pragma unroll
            for (int n = 0; n < Warp<Kind>::ACROSS; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int column = warp.column(n, c);
                    if (place.first + column < p.columns) total[n][c] += product[m][n][r + c] * Kind::number(line[column * step]);
                }
        }
}

template <class Kind, class Left, bool KNOWN, bool GRAM>
FASTFIP_DEVICE void paired_block(const PairedProblem& p) {
    typedef typename Kind::Element Element;
    typedef typename Kind::Sum Sum;
    typedef LoadLines<Kind, GRAM> Right;
    typedef PairedLayout<Kind, Left, Right> Memory;

    char* const memory = shared_memory();
    auto left_stage = [&](int s) { return reinterpret_cast<Element*>(memory + s * Memory::STAGE_BYTES); };
    auto right_stage = [&](int s) { return left_stage(s) + Left::NUMBERS; };

    int64_t rest = block_x() / p.tiles;
    const int64_t group = rest % p.groups;
    rest /= p.groups;
    const int64_t share = rest % p.shares, first = block_x() % p.tiles * Kind::COLUMNS;
    const int64_t begin = share * p.share, after = GRAM ? first + Kind::COLUMNS : begin + p.share;
    const int64_t stop = after < begin + p.share ? after : begin + p.share;
    const PairedPlace place = {rest / p.shares, group, first, static_cast<int>(stop < p.positions ? stop : p.positions)};
    const Warp<Kind> warp;

    typename Warp<Kind>::Sums product = {}, other = {};
    Sum total[Warp<Kind>::ACROSS][2] = {};

    Walk here = {static_cast<int>(begin), KNOWN ? p.made : 0, 0}, ahead = here;
    Left load(p, memory + Left::STAGES * Memory::STAGE_BYTES, place, here);
    auto fetch = [&](int s) {
        const Walk later = ahead.next<Kind, KNOWN>(p);
        load.fetch(p, place, ahead, later, left_stage(s));
        Right::fetch(p, place, ahead, right_stage(s));
        ahead = later;
    };
#pragma unroll
    for (int s = 0; s < Left::STAGES - 1; ++s) {
        if (ahead.t < place.end) {
            fetch(s);
            load.store(left_stage(s));
        }
        copies_end_group();
    }
    for (int stage = 0, next = Left::STAGES - 1; here.t < place.end;) {
        copies_wait<Left::STAGES - 2>();
        barrier();  // the stage has come, and nobody reads the one that is filled now
        const bool more = ahead.t < place.end;
        if (more) fetch(next);
        copies_end_group();

        const int64_t left = here.left(p);
        multiply_stage<Kind, Left::DEPTH_FIRST, Left::LINE, Right::DEPTH_FIRST, Right::LINE>(product, warp, left_stage(stage),
                                                                                            right_stage(stage), left, p.exact);
        if (left <= Kind::BLOCK_DEPTH) {  // the last features: the product is whole
            if constexpr (KNOWN) {
                multiply_known<Kind>(p, place, warp, product, here.t, total);
                for_each_number<Kind>([&](int m, int n, int r) { product[m][n][r] = 0; });
            } else {
                // Without a branch, which would cost registers: `other` is zero until the first product is whole.
                const bool first_one = here.side == 0;
                for_each_number<Kind>([&](int m, int n, int r) {
                    const int row = here.t + warp.row(m, r), column = static_cast<int>(place.first) + warp.column(n, r);
                    const Sum times = !GRAM || row == column ? 1 : row < column ? 2 : 0;
                    total[n][r % 2] += times * (other[m][n][r] * product[m][n][r]);
                    other[m][n][r] = first_one ? product[m][n][r] : 0;
                    product[m][n][r] = 0;
                });
            }
        }
        if (more) load.store(left_stage(next));
        here = here.next<Kind, KNOWN>(p);
        stage = stage + 1 == Left::STAGES ? 0 : stage + 1;
        next = next + 1 == Left::STAGES ? 0 : next + 1;
    }
    write_columns<Kind>(p, place, warp, total, share);
}

}  // namespace cuda
}  // namespace fastfip
