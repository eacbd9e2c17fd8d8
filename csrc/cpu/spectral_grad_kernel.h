// q = g U and p = a V of a block of positions, multiplied and summed while they lie in the first-level cache. Included by the file
// of each instruction set (see products_kernel.h, whose product of rows and lanes this uses).
//
// A tile of q or p stays in registers over up to kSteps features. Which operand becomes lanes hangs on how memory lies:
//   features follow each other (a Linear layer):  rows are positions, read where they lie; lanes are directions.
//   positions follow each other (a map):          lanes are positions, copied a block at a time, the windows of a convolution
//                                                 too; rows are directions.
#pragma once

#include <stdint.h>

#include "cpu/products_kernel.h"
#include "cpu/spectral_grad.h"

namespace fastfip {
namespace {

template <class R, int W, bool LanesArePositions>
struct Spectral {
    typedef Kernel<R, W> Tiles;
    typedef typename Tiles::Vec Vec;
    static constexpr bool kLanes = LanesArePositions;
    static constexpr int kMaxRows = Tiles::kMaxRows, kMaxNV = Tiles::kMaxNV;
    // Positions of a block: enough to use each direction often while it is in the first-level cache.
    static constexpr int64_t kBlock = kLanes ? (kMaxNV >= 4 ? 2 : 4) * kMaxNV * W : 8 * kMaxRows;
    // From one feature to the next: not a power of two, so that lines do not fall together in the first-level cache.
    static constexpr int64_t kWidth = kBlock + 2 * W;
    static constexpr int64_t kSteps = Tiles::kBlock;  // features summed in registers: bounds rounding errors, and the panels
    static constexpr Type kOwn = sizeof(R) == sizeof(double) ? Type::f64 : Type::f32;

    static int64_t up(int64_t n) { return (n + W - 1) / W * W; }
    static R* at(void* base, int64_t elements) { return static_cast<R*>(base) + elements; }

    struct Segment {
        int64_t sample, first, count, at;  // positions of a sample, and where in the block they begin
    };

    // ---- copies -----------------------------------------------------------------------------------------------------------

    // The block after this one of a feature: its lines lie where no hardware looks ahead. Beyond the end it does nothing.
    template <class S>
    static void prefetch(const S* next) {
        for (int64_t line = 0; line < kBlock * int64_t(sizeof(S)); line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(next) + line);
    }

    // to[r * width + c] = x[r * row + c * column]
    template <class S>
    static void copy(const S* x, int64_t row, int64_t column, int64_t rows, int64_t columns, int64_t width, R* to) {
        if (column != 1 && row == 1 && Pack<R>::is_float(x) && rows >= 4 && columns >= 4) {
            const int64_t whole_r = rows / 4 * 4, whole_c = columns / 4 * 4;
            Pack<R>::transpose(reinterpret_cast<const float*>(x), column, whole_r, whole_c, width, reinterpret_cast<float*>(to));
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = r < whole_r ? whole_c : 0; c < columns; ++c) to[r * width + c] = Pack<R>::load(x + r + c * column);
            return;
        }
        for (int64_t r = 0; r < rows; ++r) {
            const S* from = x + r * row;
            if (column == 1) {
                if (kLanes) prefetch(from + kBlock);
                for (int64_t c = 0; c < columns; ++c) to[r * width + c] = Pack<R>::load(from + c);
            } else {
                for (int64_t c = 0; c < columns; ++c) to[r * width + c] = Pack<R>::load(from + c * column);
            }
        }
    }

    static void copy(const void* data, Type type, int64_t first, int64_t row, int64_t column, int64_t rows, int64_t columns,
                     int64_t width, R* to) {
        typedef typename Pack<R>::Bf16 Bf16;
        typedef typename Pack<R>::F16 F16;
        switch (type) {
            case Type::f32: return copy(static_cast<const float*>(data) + first, row, column, rows, columns, width, to);
            case Type::f64: return copy(static_cast<const double*>(data) + first, row, column, rows, columns, width, to);
            case Type::bf16: return copy(static_cast<const Bf16*>(data) + first, row, column, rows, columns, width, to);
            case Type::f16: return copy(static_cast<const F16*>(data) + first, row, column, rows, columns, width, to);
        }
    }

    static void zero(R* to, int64_t count) {
        for (int64_t i = 0; i < count; ++i) to[i] = 0;
    }

    // Lanes of [row][position] that no position fills.
    static void zero_tails(const Segment* segments, int64_t many, int64_t rows, R* to) {
        for (int64_t i = 0; kLanes && i < many; ++i)
            for (int64_t r = 0; segments[i].count % W && r < rows; ++r)
                for (int64_t t = segments[i].count; t < up(segments[i].count); ++t) to[r * kWidth + segments[i].at + t] = 0;
    }

    // Features [first, first + features) of a segment: as columns of [feature][position], or as rows of [position][feature].
    static void copy_segment(const Matrix& m, const Segment& s, int64_t first, int64_t features, int64_t width, R* block) {
        const int64_t from = s.sample * m.stride_n + s.first * m.stride_t + first * m.stride_f;
        if (kLanes)
            copy(m.data, m.type, from, m.stride_f, m.stride_t, features, s.count, width, block + s.at);
        else
            copy(m.data, m.type, from, m.stride_t, m.stride_f, s.count, features, width, block + s.at * width);
    }

    // ---- directions, packed once for a call -------------------------------------------------------------------------------

    static int64_t packed_group(const SpectralProblem& p, int side) {
        return p.side[side].features * (kLanes ? p.directions : up(p.directions));
    }

    static int64_t packed_bytes(const SpectralProblem& p, int side) {
        return p.side[side].directions.data ? packed_group(p, side) * p.groups * int64_t(sizeof(R)) : 0;
    }

    // Panels of rows or of lanes, each [feature][row or lane].
    static void pack(const SpectralProblem& p, int side, void* memory) {
        const Directions& d = p.side[side].directions;
        const int64_t features = p.side[side].features, all = p.directions;
        for (int64_t group = 0; group < p.groups; ++group) {
            R* const to = at(memory, group * packed_group(p, side));
            const int64_t from = group * d.stride_group;
            if (kLanes) {
                for (int64_t index = 0; index < Tiles::row_panels(all); ++index) {
                    int64_t first;
                    int rows;
                    Tiles::row_panel(all, index, first, rows);
                    copy(d.data, d.type, from + first * d.stride_k, d.stride_f, d.stride_k, features, rows, rows,
                         to + first * features);
                }
                continue;
            }
            for (int64_t first = 0, width; first < all; first += width) {
                width = Tiles::nv_at(first, all) * W;
                const int64_t used = all - first < width ? all - first : width;
                if (used < width) zero(to + first * features, width * features);
                copy(d.data, d.type, from + first * d.stride_k, d.stride_f, d.stride_k, features, used, width,
                     to + first * features);
            }
        }
    }

    // ---- a block ----------------------------------------------------------------------------------------------------------

    struct Layout {
        int64_t data, map, projected;  // elements: a block of an operand, a padded map, a block of q or p
        int64_t at_map, at_projected, at_sums, at_offset, at_positions, size;
    };

    static Layout layout(const SpectralProblem& p) {
        Layout l = {};
        int64_t features = 0;
        for (const SpectralSide& side : p.side) {
            if (side.directions.data && side.features > features) features = side.features;
            if (side.windows) l.map = side.windows->channels * padded_size(*side.windows);
        }
        const int64_t indices = int64_t(sizeof(int64_t) / sizeof(R));
        l.data = features * (kLanes ? kWidth : kBlock);
        l.projected = kLanes ? p.directions * kWidth : kBlock * up(p.directions);
        l.at_map = up(l.data);
        l.at_projected = l.at_map + up(l.map);
        l.at_sums = l.at_projected + 2 * up(l.projected);
        l.at_offset = l.at_sums + up(kLanes ? p.directions * W : up(p.directions));
        l.at_positions = l.at_offset + up(features * indices);
        l.size = l.at_positions + (l.map ? up(p.positions * indices) : 0);
        return l;
    }

    static int64_t scratch_bytes(const SpectralProblem& p) { return layout(p).size * int64_t(sizeof(R)); }

    // Where q or p of a block lies: [direction][position] or [position][direction].
    struct Projected {
        const R* data;
        int64_t width;
    };

    struct Operands {
        const R* lanes;
        int64_t lane_step;     // from one feature to the next; 0: panels
        const R* rows;         // panels; or null:
        const R* const* row;   // each row by itself, with
        const int64_t* offset; // where its features are
    };

    template <int MR, int NV>
    static void tile(const Operands& o, int64_t features, int64_t row, int64_t lane, int64_t first, int64_t count, R* to,
                     int64_t width) {
        Vec acc[MR][NV];
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) acc[r][v] = Vec{};
        const int64_t step = o.lane_step ? o.lane_step : NV * W;
        const R* lanes = o.lane_step ? o.lanes + lane + first * step : o.lanes + lane * features + first * step;
        const R* rows[MR];
        if constexpr (kLanes) {
            rows[0] = o.rows + row * features + first * MR;
            for (int r = 1; r < MR; ++r) rows[r] = rows[0];
            Tiles::template multiply<MR, NV, false>(acc, rows, nullptr, lanes, step, count);
        } else {
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r) rows[r] = o.row[row + r];
            Tiles::template multiply<MR, NV, true>(acc, rows, o.offset + first, lanes, step, count);
        }
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                Vec& sum = *reinterpret_cast<Vec*>(to + (row + r) * width + lane + v * W);
                sum = first ? sum + acc[r][v] : acc[r][v];
            }
    }

    template <int NV>
    static void tile_of(int rows, const Operands& o, int64_t features, int64_t row, int64_t lane, int64_t first, int64_t count,
                        R* to, int64_t width) {
        switch (rows) {
            case 1: return tile<1, NV>(o, features, row, lane, first, count, to, width);
            case 2: return tile<2, NV>(o, features, row, lane, first, count, to, width);
            case 3: return tile<3, NV>(o, features, row, lane, first, count, to, width);
            case 4: return tile<4, NV>(o, features, row, lane, first, count, to, width);
            case 5: return tile<5, NV>(o, features, row, lane, first, count, to, width);
            case 6: return tile<6, NV>(o, features, row, lane, first, count, to, width);
            case 7: if constexpr (kMaxRows >= 7) return tile<7, NV>(o, features, row, lane, first, count, to, width); break;
        }
    }

    static void multiply(const Operands& o, int64_t features, int64_t rows, int64_t lanes, R* to, int64_t width) {
        for (int64_t first = 0; first < features; first += kSteps) {
            const int64_t count = features - first < kSteps ? features - first : kSteps;
            for (int64_t lane = 0; lane < lanes;) {
                const int nv = Tiles::nv_at(lane, lanes);
                for (int64_t index = 0; index < Tiles::row_panels(rows); ++index) {
                    int64_t row;
                    int height;
                    Tiles::row_panel(rows, index, row, height);
                    switch (nv) {
                        case 1: tile_of<1>(height, o, features, row, lane, first, count, to, width); break;
                        case 2: tile_of<2>(height, o, features, row, lane, first, count, to, width); break;
                        case 4: if constexpr (kMaxNV >= 4) tile_of<4>(height, o, features, row, lane, first, count, to, width); break;
                    }
                }
                lane += nv * W;
            }
        }
    }

    // The windows of a segment as columns of [channel and kernel position][position].
    static void copy_windows(const Windows& w, const Segment& s, const R* map, const int64_t* position, R* block) {
        const int64_t size = padded_size(w), kernel = kernel_size(w);
        const int64_t* const where = position + s.first;
        for (int64_t c = 0; c < w.channels; ++c) {
            for (int64_t k = 0; k < kernel; ++k, block += kWidth) {
                const R* const from = map + c * size + kernel_offset(w, k);
                R* const to = block + s.at;
                if (w.step[2] != 1) {
                    for (int64_t i = 0; i < s.count; ++i) to[i] = from[where[i]];
                    continue;
                }
                for (int64_t i = 0; i < s.count;) {  // one line of the output at a time
                    int64_t end = i + w.positions[2] - (s.first + i) % w.positions[2];
                    if (end > s.count) end = s.count;
                    const R* const run = from + where[i] - i;
                    for (; i + W <= end; i += W) *reinterpret_cast<Vec*>(to + i) = *reinterpret_cast<const Vec*>(run + i);
                    for (; i < end; ++i) to[i] = run[i];
                }
            }
        }
    }

    static void pad_map(const Windows& w, int64_t sample, int64_t group, R* map) {
        for (int64_t c = 0; c < w.channels; ++c)
            Pack<R>::pad(w, sample, group * w.channels + c, map + c * padded_size(w));
    }

    static Projected project(const SpectralProblem& p, int which, int64_t group, const Segment* segments, int64_t many,
                             int64_t used, const Layout& l, R* base) {
        const SpectralSide& side = p.side[which];
        R* const to = base + l.at_projected + which * up(l.projected);
        const Matrix& m = side.matrix;
        const int64_t width = kLanes ? kWidth : up(p.directions);
        const bool own = m.type == kOwn && many == 1;
        if (!side.directions.data) {
            const int64_t first = group * p.directions, start = segments[0].sample * m.stride_n + segments[0].first * m.stride_t;
            const R* const lies = static_cast<const R*>(m.data) + start + first * m.stride_f;
            if (kLanes && own && m.stride_t == 1 && used % W == 0 && segments[0].count == used) return {lies, m.stride_f};
            if (!kLanes && own && m.stride_f == 1 && p.directions % W == 0) return {lies, m.stride_t};
            if (!kLanes && width != p.directions) zero(to, l.projected);
            zero_tails(segments, many, p.directions, to);
            for (int64_t i = 0; i < many; ++i) copy_segment(m, segments[i], first, p.directions, width, to);
            return {to, width};
        }
        const R* const packed = at(const_cast<void*>(side.packed), group * packed_group(p, which));
        if (kLanes) {
            zero_tails(segments, many, side.features, base);
            for (int64_t i = 0; i < many; ++i) {
                if (!side.windows) {
                    copy_segment(m, segments[i], group * side.features, side.features, kWidth, base);
                    continue;
                }
                R* const map = base + l.at_map;
                if (p.together > 1 || segments[i].first == 0) pad_map(*side.windows, segments[i].sample, group, map);
                copy_windows(*side.windows, segments[i], map, reinterpret_cast<const int64_t*>(base + l.at_positions), base);
            }
            multiply({base, kWidth, packed, nullptr, nullptr}, side.features, p.directions, used, to, width);
            return {to, width};
        }
        const bool in_place = m.type == kOwn && m.stride_f == 1;
        const R* row[kBlock];
        for (int64_t i = 0; i < many; ++i) {
            const Segment& s = segments[i];
            if (!in_place) copy_segment(m, s, group * side.features, side.features, side.features, base);
            const R* const lies = static_cast<const R*>(m.data) + s.sample * m.stride_n + group * side.features;
            for (int64_t t = 0; t < s.count; ++t)
                row[s.at + t] = in_place ? lies + (s.first + t) * m.stride_t : base + (s.at + t) * side.features;
        }
        const int64_t* const offset = reinterpret_cast<const int64_t*>(base + l.at_offset);
        multiply({packed, 0, nullptr, row, offset}, side.features, used, p.directions, to, width);
        return {to, width};
    }

    // Adds the products of a segment to `sums`: a vector for each direction, or all directions as vectors.
    static void reduce(const SpectralProblem& p, const Segment& s, const Projected& q, const Projected& a, R* sums) {
        if (kLanes) {
            for (int64_t k = 0; k < p.directions; ++k) {
                const R *x = q.data + k * q.width + s.at, *y = a.data + k * a.width + s.at;
                Vec sum = *reinterpret_cast<Vec*>(sums + k * W);
                if (a.width != kWidth) prefetch(y + kBlock);
                for (int64_t t = 0; t < s.count; t += W)
                    sum += *reinterpret_cast<const Vec*>(x + t) * *reinterpret_cast<const Vec*>(y + t);
                *reinterpret_cast<Vec*>(sums + k * W) = sum;
            }
            return;
        }
        for (int64_t k = 0; k < p.directions; k += W) {
            Vec sum = *reinterpret_cast<Vec*>(sums + k);
            for (int64_t t = s.at; t < s.at + s.count; ++t)
                sum += *reinterpret_cast<const Vec*>(q.data + t * q.width + k) * *reinterpret_cast<const Vec*>(a.data + t * a.width + k);
            *reinterpret_cast<Vec*>(sums + k) = sum;
        }
    }

    // Adds `sums` to the result of a sample's chunk, and clears them.
    static void flush(const SpectralProblem& p, int64_t group, int64_t sample, int64_t chunk, R* sums) {
        R* const to = at(p.sums, ((sample * p.chunks + chunk) * p.groups + group) * p.directions);
        for (int64_t k = 0; k < p.directions; ++k) {
            R sum = 0;
            if (kLanes)
                for (int w = 0; w < W; ++w) sum += sums[k * W + w];
            else
                sum = sums[k];
            to[k] += sum;
        }
        zero(sums, kLanes ? p.directions * W : up(p.directions));
    }

    static void run(const SpectralProblem& p, int64_t group, int64_t unit, void* scratch) {
        const Layout l = layout(p);
        R *const base = static_cast<R*>(scratch), *const sums = base + l.at_sums;
        zero(sums, kLanes ? p.directions * W : up(p.directions));
        int64_t* const offset = reinterpret_cast<int64_t*>(base + l.at_offset);
        for (const SpectralSide& side : p.side) {
            if (side.windows) position_offsets(*side.windows, reinterpret_cast<int64_t*>(base + l.at_positions));
            for (int64_t f = 0; !kLanes && side.directions.data && f < side.features; ++f) offset[f] = f;
        }
        Segment segments[kBlock] = {};
        if (p.together > 1) {
            const int64_t each = kLanes ? up(p.positions) : p.positions, first = unit * p.together;
            const int64_t many = p.samples - first < p.together ? p.samples - first : p.together;
            for (int64_t i = 0; i < many; ++i) segments[i] = {first + i, 0, p.positions, i * each};
            const Projected q = project(p, 0, group, segments, many, many * each, l, base);
            const Projected a = project(p, 1, group, segments, many, many * each, l, base);
            for (int64_t i = 0; i < many; ++i) {
                reduce(p, segments[i], q, a, sums);
                flush(p, group, first + i, 0, sums);
            }
            return;
        }
        const int64_t sample = unit / p.chunks, chunk = unit % p.chunks;
        const int64_t end = (chunk + 1) * p.chunk < p.positions ? (chunk + 1) * p.chunk : p.positions;
        for (int64_t t = chunk * p.chunk; t < end; t += kBlock) {
            const int64_t count = end - t < kBlock ? end - t : kBlock, used = kLanes ? up(count) : count;
            segments[0] = {sample, t, count, 0};
            const Projected q = project(p, 0, group, segments, 1, used, l, base);
            const Projected a = project(p, 1, group, segments, 1, used, l, base);
            reduce(p, segments[0], q, a, sums);
        }
        flush(p, group, sample, chunk, sums);
    }
};

template <class R, int W, bool LanesArePositions>
SpectralBackend spectral_instance() {
    typedef Spectral<R, W, LanesArePositions> S;
    return {S::kBlock, W, S::packed_bytes, S::pack, S::scratch_bytes, S::run};
}

template <int Bytes>
SpectralBackend spectral_instance(bool is_double, bool lanes_are_positions) {
    constexpr int doubles = Bytes / sizeof(double), floats = Bytes / sizeof(float);
    if (is_double) return lanes_are_positions ? spectral_instance<double, doubles, true>() : spectral_instance<double, doubles, false>();
    return lanes_are_positions ? spectral_instance<float, floats, true>() : spectral_instance<float, floats, false>();
}

}  // namespace
}  // namespace fastfip
