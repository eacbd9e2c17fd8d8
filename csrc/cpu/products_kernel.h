// The products of each sample and their sums, written once with vector extensions. Each instruction set includes this in a file of
// its own, compiled with its own flags. Everything is in an unnamed namespace and no inline function of the standard library is
// used: a linker that merged two copies could otherwise put wide instructions on a path that any CPU takes.
//
// One operand is packed into panels of lanes, lanes[n][t][NV * W]; of the other one, MR rows at a time are broadcast. A tile
// of G_n (MR x NV vectors) stays in registers over all t, is squared there and added to its running tile. For norms
// (grad_norm_squared) the squares are summed to one number for the sample instead, and the tile is stored where it is wanted:
// a branch for each sample, since a second set of tiles would double the time that this file takes to compile.
//   matrix:      rows are packed too, rows[n][t][MR], and the larger or better fitting of o and i are the lanes.
//   convolution: rows are (channel, kernel position) and are read where they lie: row r at position t is
//                map[row_offset(r) + position_offset[t]]. The unfolded matrix exists nowhere. Lanes are output channels.
#pragma once

#include <stdint.h>

#include "cpu/products.h"
#include "cpu/products_pack.h"

namespace fastfip {
namespace {

// How operands are stored and multiplied: as they are. (products_bf16.cpp has the other way.) One step is one position.
template <class R>
struct Exact {
    typedef R Element;
    static constexpr bool kInPlace = true;  // an operand of type R may be read where it lies

    static int64_t steps(const Problem& p) { return p.positions; }
    static void offsets(const Windows& w, int64_t* to) { position_offsets(w, to); }

    static void pack(const Problem& p, const Matrix& m, int64_t n, int64_t first, int64_t count, int64_t width, R* to) {
        Pack<R>::pack(m, n, first, p.positions, count, width, to);
    }
    static void pad(const Windows& w, int64_t n, int64_t channel, R* to, R*) { Pack<R>::pad(w, n, channel, to); }

    template <class Vec>
    static inline __attribute__((always_inline)) Vec multiply_add(R row, Vec lane, Vec sum) { return sum + row * lane; }
};

template <class R, int W, class Operand = Exact<R>>
struct Kernel {
    typedef typename Operand::Element Element;  // of the size of R
    typedef R Vec __attribute__((vector_size(W * sizeof(R)), aligned(sizeof(R)), may_alias));
    typedef Element Lane __attribute__((vector_size(W * sizeof(R)), aligned(sizeof(R)), may_alias));

    static constexpr int kRegisters = FASTFIP_VECTOR_REGISTERS;
    static constexpr int kMaxNV = kRegisters >= 32 ? 4 : 2;
    // As many accumulators as registers allow beside kMaxNV lanes and one broadcast.
    static constexpr int kMaxRows = kRegisters >= 32 ? 7 : 6;
    // Steps summed before they are added to the total: bounds the growth of rounding errors in long sums.
    static constexpr int64_t kBlock = 128;
    static constexpr int64_t kSteps = 1024, kPackedBytes = int64_t(8) << 20;

    struct Tile {
        int64_t samples, steps;
        const Element* rows[kMaxRows];
        int64_t row_sample;                // distance from one sample's rows to the next one's
        const int64_t* offset;             // null: packed rows, step t is at t * MR
        const Element* lanes;
        int64_t lane_sample, lane_step;    // from one sample to the next, from one step to the next
        R* out;
        R* grad;                           // null: not wanted
        R* total;                          // room for a tile: the sum of the blocks before
        double* norms;                     // of the first sample; null: the sum of squares
    };

    template <int MR, int NV, bool Indexed>
    static inline __attribute__((always_inline)) void multiply(
        Vec (&acc)[MR][NV], const Element* const* rows, const int64_t* offset, const Element* lanes, int64_t lane_step,
        int64_t count) {
        const Element* row[MR];
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) row[r] = rows[r];
        for (int64_t t = 0; t < count; ++t) {
            Lane lane[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) lane[v] = *reinterpret_cast<const Lane*>(lanes + v * W);
            const int64_t at = Indexed ? offset[t] : 0;
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r) {
                const Element value = Indexed ? row[r][at] : row[0][r];
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) acc[r][v] = Operand::multiply_add(value, lane[v], acc[r][v]);
            }
            lanes += lane_step;
            if (!Indexed) row[0] += MR;
        }
    }

    // The tile of sample n as `norms` want it; `out` is where it is left for `store`, if it is to be stored.
    template <int MR, int NV>
    static inline __attribute__((always_inline)) void take_norm(const Tile& job, int64_t n, const Vec (&acc)[MR][NV]) {
        Vec sum = {};
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum += acc[r][v] * acc[r][v];
        double total = 0;
        for (int w = 0; w < W; ++w) total += sum[w];
        job.norms[n] += total;
        if (!job.out) return;
        Vec* to = reinterpret_cast<Vec*>(job.out) + n * MR * NV;
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) to[r * NV + v] = acc[r][v];
    }

    template <int MR, int NV, bool Indexed>
    static void tile(const Tile& job) {
        Vec* out = reinterpret_cast<Vec*>(job.out);
        Vec* grad = reinterpret_cast<Vec*>(job.grad);
        Vec* const total = reinterpret_cast<Vec*>(job.total);
        for (int64_t n = 0; n < job.samples; ++n) {
            const Element* rows[MR];
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r) rows[r] = job.rows[r] + n * job.row_sample;
            const Element* lanes = job.lanes + n * job.lane_sample;
            Vec acc[MR][NV];
            const bool blocks = job.steps > kBlock;
            const int64_t* offset = job.offset;
            // One loop for short and long sums: the code of `multiply` is in it once.
            for (int64_t left = job.steps;;) {
                const int64_t count = left < kBlock ? left : kBlock;
#pragma GCC unroll 8
                for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
                    for (int v = 0; v < NV; ++v) acc[r][v] = Vec{};
                multiply<MR, NV, Indexed>(acc, rows, offset, lanes, job.lane_step, count);
                if (!blocks) break;
                const bool first = left == job.steps, last = left <= kBlock;
#pragma GCC unroll 8
                for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
                    for (int v = 0; v < NV; ++v) {
                        if (!first) acc[r][v] += total[r * NV + v];
                        total[r * NV + v] = acc[r][v];
                    }
                if (last) break;
                left -= kBlock;
                lanes += count * job.lane_step;
                if (Indexed) offset += count; else rows[0] += count * MR;
            }
            if (job.norms) {
                take_norm<MR, NV>(job, n, acc);
                continue;
            }
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) out[r * NV + v] += acc[r][v] * acc[r][v];
            if (grad) {
#pragma GCC unroll 8
                for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
                    for (int v = 0; v < NV; ++v) grad[r * NV + v] += acc[r][v];
            }
        }
    }

    template <int NV, bool Indexed>
    static void tile_of(int rows, const Tile& job) {
        switch (rows) {
            case 1: return tile<1, NV, Indexed>(job);
            case 2: return tile<2, NV, Indexed>(job);
            case 3: return tile<3, NV, Indexed>(job);
            case 4: return tile<4, NV, Indexed>(job);
            case 5: return tile<5, NV, Indexed>(job);
            case 6: return tile<6, NV, Indexed>(job);
            case 7: if constexpr (kMaxRows >= 7) return tile<7, NV, Indexed>(job); break;
        }
    }

    template <bool Indexed>
    static void tile_of(int rows, int nv, const Tile& job) {
        switch (nv) {
            case 1: return tile_of<1, Indexed>(rows, job);
            case 2: return tile_of<2, Indexed>(rows, job);
            case 4: if constexpr (kMaxNV >= 4) return tile_of<4, Indexed>(rows, job); break;
        }
    }

    // ---- panels: how many lanes or rows each one has ------------------------------------------------------------------------

    static int nv_at(int64_t start, int64_t count) {
        const int64_t left = (count - start + W - 1) / W;
        return left >= kMaxNV ? kMaxNV : left >= 2 ? 2 : 1;
    }

    // Rows are dealt out evenly: 10 rows are 5 + 5, not 7 + 3.
    static void row_panel(int64_t count, int64_t index, int64_t& start, int& rows) {
        const int64_t panels = row_panels(count);
        start = index * count / panels;
        rows = static_cast<int>((index + 1) * count / panels - start);
    }

    static int64_t row_panels(int64_t count) { return (count + kMaxRows - 1) / kMaxRows; }

    // ---- one slice of the result, by one thread -----------------------------------------------------------------------------

    // Where the parts of a slice's scratch memory begin, in elements of R.
    struct Layout {
        int64_t chunk, steps;             // samples packed at a time, steps of a sample
        int64_t lanes, rows;              // elements of one sample: packed lanes; packed rows or padded channels
        int64_t tiles;                    // elements of the running tiles: all of them, or one if there is one chunk only
        int64_t at_rows, at_out, at_grad, at_plain, at_offset, size;
    };

    static Layout layout(const Problem& p, const Slice& s) {
        Layout l = {};
        const int64_t rows = s.row_end - s.row_begin, lanes = (s.lane_end - s.lane_begin + W - 1) / W * W;
        l.steps = Operand::steps(p);
        l.lanes = l.steps * lanes;
        if (p.windows) {
            const int64_t k = kernel_size(*p.windows);
            l.rows = ((s.row_end - 1) / k - s.row_begin / k + 1) * padded_size(*p.windows);
        } else {
            l.rows = l.steps * rows;
        }
        // So many steps at a time amortise reading and writing the running tiles; more than the caches hold is of no use.
        const int64_t most = kPackedBytes / int64_t(sizeof(R)) / (l.lanes + l.rows) + 1;
        l.chunk = (kSteps + l.steps - 1) / l.steps;
        if (l.chunk > most) l.chunk = most;
        if (l.chunk > p.samples) l.chunk = p.samples;
        // The running tiles; of norms one tile for each sample, from which it is stored.
        l.tiles = p.norms ? (p.out ? l.chunk * kMaxRows * kMaxNV * W : 0)
                        : l.chunk < p.samples ? rows * lanes : kMaxRows * kMaxNV * W;
        const auto up = [](int64_t n) { return (n + W - 1) / W * W; };
        l.at_rows = l.chunk * l.lanes;
        l.at_out = l.at_rows + up(l.chunk * l.rows);
        l.at_grad = l.at_out + l.tiles;
        l.at_plain = l.at_grad + (p.grad ? l.tiles : 0);
        l.at_offset = l.at_plain + (p.windows && !Operand::kInPlace ? up(padded_size(*p.windows)) : 0);
        l.size = l.at_offset + (p.windows ? l.steps * int64_t(sizeof(int64_t) / sizeof(R)) : 0);
        return l;
    }

    static int64_t scratch_bytes(const Problem& p, const Slice& s) { return layout(p, s).size * int64_t(sizeof(R)); }

    static void run(const Problem& p, const Slice& s, void* scratch) {
        const Layout l = layout(p, s);
        R *const base = static_cast<R*>(scratch), *const out = base + l.at_out, *const grad = base + l.at_grad;
        Element *const packed_lanes = static_cast<Element*>(scratch), *const packed_rows = packed_lanes + l.at_rows;
        int64_t* const offset = reinterpret_cast<int64_t*>(base + l.at_offset);
        R total[kMaxRows * kMaxNV * W];
        if (p.windows) Operand::offsets(*p.windows, offset);
        for (int64_t n0 = 0; n0 < p.samples; n0 += l.chunk) {
            const int64_t count = p.samples - n0 < l.chunk ? p.samples - n0 : l.chunk;
            const bool first = n0 == 0, last = n0 + count == p.samples;
            pack_rows(p, s, n0, count, l.steps, packed_rows, base + l.at_plain);
            const Lanes lanes = pack_lanes(p, s, n0, count, l.steps, packed_lanes);
            const int64_t rows = s.row_end - s.row_begin, width_all = s.lane_end - s.lane_begin;
            int64_t at = 0;  // of the running tile
            for (int64_t start = 0, width; start < width_all; start += width) {
                const int nv = nv_at(start, width_all);
                width = nv * W;
                Tile job;
                job.samples = count;
                job.steps = l.steps;
                job.total = total;
                lanes.panel(start, width, job);
                for (int64_t index = 0; index < row_panels(rows); ++index) {
                    int64_t row;
                    int height;
                    row_panel(rows, index, row, height);
                    job.out = out + at;
                    job.grad = p.grad ? grad + at : nullptr;
                    job.norms = p.norms ? s.norms + n0 : nullptr;
                    if (p.norms) {
                        job.out = p.out ? out : nullptr;
                    } else if (first) {
                        for (int64_t i = 0; i < height * width; ++i) job.out[i] = 0;
                        for (int64_t i = 0; job.grad && i < height * width; ++i) job.grad[i] = 0;
                    }
                    if (p.windows) {
                        window_rows(p, s, row, height, count, packed_rows, job);
                        job.offset = offset;
                        tile_of<true>(height, nv, job);
                    } else {
                        for (int r = 0; r < height; ++r) job.rows[r] = packed_rows + row * count * l.steps;
                        job.row_sample = height * l.steps;
                        job.offset = nullptr;
                        tile_of<false>(height, nv, job);
                    }
                    if (p.norms) {
                        for (int64_t n = 0; p.out && n < count; ++n)
                            put_tile<false>(p, s, row, height, start, width, out + n * height * width,
                                            static_cast<R*>(p.out) + (n0 + n) * p.result_sample);
                        continue;
                    }
                    if (last) {
                        // At once, while the tile lies in the first-level cache.
                        put_tile<true>(p, s, row, height, start, width, job.out, static_cast<R*>(p.out));
                        if (p.grad) put_tile<true>(p, s, row, height, start, width, job.grad, static_cast<R*>(p.grad));
                    }
                    if (l.chunk < p.samples) at += height * width;
                }
            }
        }
    }

    // Lanes as they were packed, or where they lie if that serves as well.
    struct Lanes {
        const Element *packed, *direct;
        int64_t direct_count, count, steps, sample, step;

        void panel(int64_t start, int64_t width, Tile& job) const {
            const bool in_place = start + width <= direct_count;
            job.lanes = in_place ? direct + start : packed + start * count * steps;
            job.lane_sample = in_place ? sample : width * steps;
            job.lane_step = in_place ? step : width;
        }
    };

    static Lanes pack_lanes(const Problem& p, const Slice& s, int64_t n0, int64_t count, int64_t steps, Element* to) {
        const int64_t all = s.lane_end - s.lane_begin;
        Lanes lanes = {to, nullptr, 0, count, steps, p.lanes.stride_n, p.lanes.stride_t};
        // Few rows read each lane only once or twice: not worth a copy.
        const Type own = sizeof(R) == sizeof(double) ? Type::f64 : Type::f32;
        if (Operand::kInPlace && p.lanes.type == own && p.lanes.stride_f == 1 && row_panels(s.row_end - s.row_begin) <= 2) {
            lanes.direct = static_cast<const Element*>(p.lanes.data) + n0 * p.lanes.stride_n + s.lane_first;
            lanes.direct_count = all / W * W;
        }
        for (int64_t start = 0, width; start < all; start += width) {
            width = nv_at(start, all) * W;
            if (start + width <= lanes.direct_count) continue;
            const int64_t used = all - start < width ? all - start : width;
            for (int64_t n = 0; n < count; ++n)
                Operand::pack(p, p.lanes, n0 + n, s.lane_first + start, used, width,
                     to + (start * count + n * width) * steps);
        }
        return lanes;
    }

    // A matrix: panels, each [n][t][rows]. A map: its padded channels, each [n][z][y][x].
    static void pack_rows(const Problem& p, const Slice& s, int64_t n0, int64_t count, int64_t steps, Element* to, R* plain) {
        if (p.windows) {
            const int64_t size = padded_size(*p.windows), kernel = kernel_size(*p.windows);
            for (int64_t c = s.row_begin / kernel; c <= (s.row_end - 1) / kernel; ++c)
                for (int64_t n = 0; n < count; ++n, to += size)
                    Operand::pad(*p.windows, n0 + n, s.channel_first + c, to, plain);
            return;
        }
        const int64_t rows = s.row_end - s.row_begin;
        for (int64_t index = 0; index < row_panels(rows); ++index) {
            int64_t first;
            int height;
            row_panel(rows, index, first, height);
            for (int64_t n = 0; n < count; ++n)
                Operand::pack(p, p.rows, n0 + n, s.row_begin + first, height, height,
                     to + (first * count + n * height) * steps);
        }
    }

    static void window_rows(const Problem& p, const Slice& s, int64_t first, int height, int64_t count, const Element* maps,
                            Tile& job) {
        const int64_t size = padded_size(*p.windows), kernel = kernel_size(*p.windows);
        for (int r = 0; r < height; ++r) {
            const int64_t row = s.row_begin + first + r, channel = row / kernel - s.row_begin / kernel;
            job.rows[r] = maps + channel * count * size + kernel_offset(*p.windows, row % kernel);
        }
        job.row_sample = size;
    }

    // Adds a tile to a result, or stores it there.
    template <bool Add>
    static void put_tile(const Problem& p, const Slice& s, int64_t row, int height, int64_t lane, int64_t width, const R* from,
                         R* result) {
        const int64_t left = s.lane_end - s.lane_begin - lane, used = left < width ? left : width;
        R* const to = result + s.result_first + (s.row_begin + row) * p.result_row + (s.lane_begin + lane) * p.result_lane;
        const auto put = [](R& x, R value) { x = Add ? x + value : value; };
        if (p.result_lane == 1) {
            for (int r = 0; r < height; ++r)
                for (int64_t v = 0; v < used; ++v) put(to[r * p.result_row + v], from[r * width + v]);
        } else {
            for (int64_t v = 0; v < used; ++v)
                for (int r = 0; r < height; ++r) put(to[r * p.result_row + v * p.result_lane], from[r * width + v]);
        }
    }
};

}  // namespace
}  // namespace fastfip
