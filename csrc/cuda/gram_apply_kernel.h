// The CUDA kernel of gram_apply: out[n,t] = sum_u (q[n,t] . k[n,u]) v[n,u]. A block owns some positions t of a sample and some
// columns of the result. It forms a tile of the Gram matrix in registers on tensor cores, multiplies it there with the rows of v
// and goes on to the next u; a warp does so with its own part of the tile, and warps that have the same t are added in the end.
// Include device.h (or the tests' cuda_on_cpu.h) before.
#pragma once

#include <stdint.h>

#include "load.h"
#include "multiply.h"

namespace fastfip {
namespace cuda {

struct GramProblem {
    Lines q, k, v;
    void* out;  // [samples, t, e]
    int64_t samples, t, u, d, e, tiles_t, tiles_e;
    bool exact;
};

inline GramProblem gram_apply_problem_of(const Lines& q, const Lines& k, const Lines& v, const GramSizes& sizes, Type type, bool exact,
                                         void* out) {
    const Tile tile = tile_of(type);
    const GramProblem p = {q,       k,       v,       out,     sizes.samples, sizes.t, sizes.u,
                           sizes.d, sizes.e, divide_up(sizes.t, tile.outputs), divide_up(sizes.e, tile.inputs), exact};
    if (p.tiles_t * p.tiles_e * p.samples >= 2 * LIMIT) throw std::invalid_argument("CUDA kernels: more blocks than a grid has");
    for (const Lines& lines : {q, k, v})
        if (!lines_are_aligned(lines.data, type, lines.stride_n, lines.stride_line, 1))
            throw std::invalid_argument("CUDA kernels: rows are not aligned to 16 bytes");
    return p;
}

// How 16 x 8 numbers of the Gram matrix, as a product leaves them in registers, are the left operand of the next product: its
// depth may come in any order, so number 2p of a lane's row stands at p and number 2p + 1 at p + 4, and the rows of v likewise.
template <class Kind>
struct Again;

// The Gram matrix stays float32: it is multiplied in two parts of TF32, which holds numbers of 16 bits as they are.
template <bool BFLOAT16>
struct Again<Half<BFLOAT16>> {
    uint32_t high[4], low[4];

    FASTFIP_DEVICE Again(const float (&c)[4], bool) {
        const float a[4] = {c[0], c[2], c[1], c[3]};
        for (int j = 0; j < 4; ++j) high[j] = to_tf32(a[j]), low[j] = to_tf32(a[j] - as_float(high[j]));
    }

    FASTFIP_DEVICE void multiply(float (&out)[4], uint16_t v0, uint16_t v1, bool) const {
        const uint32_t b0 = to_tf32(Half<BFLOAT16>::number(v0)), b1 = to_tf32(Half<BFLOAT16>::number(v1));
        multiply_tf32(out, low, b0, b1);
        multiply_tf32(out, high, b0, b1);
    }
};

template <>
struct Again<Single> {
    uint32_t high[4], low[4];

    FASTFIP_DEVICE Again(const float (&c)[4], bool exact) {
        const float a[4] = {c[0], c[2], c[1], c[3]};
        for (int j = 0; j < 4; ++j) {
            high[j] = to_tf32(a[j]);
            if (exact) low[j] = to_tf32(a[j] - as_float(high[j]));
        }
    }

    FASTFIP_DEVICE void multiply(float (&out)[4], float v0, float v1, bool exact) const {
        const uint32_t b0 = to_tf32(v0), b1 = to_tf32(v1);
        if (!exact) return multiply_tf32(out, high, b0, b1);
        float few[4] = {0, 0, 0, 0};
        multiply_tf32(few, low, b0, b1);
        multiply_tf32(few, high, to_tf32(v0 - as_float(b0)), to_tf32(v1 - as_float(b1)));
        multiply_tf32(few, high, b0, b1);
        for (int j = 0; j < 4; ++j) out[j] += few[j];
    }
};

template <>
struct Again<Double> {
    double a[4];

    FASTFIP_DEVICE Again(const double (&c)[4], bool) {
        for (int j = 0; j < 4; ++j) a[j] = c[j];
    }

    FASTFIP_DEVICE void multiply(double (&out)[4], double v0, double v1, bool) const {
        multiply_f64(out[0], out[1], a[0], v0);
        multiply_f64(out[0], out[1], a[1], v1);
        multiply_f64(out[2], out[3], a[2], v0);
        multiply_f64(out[2], out[3], a[3], v1);
    }
};

template <class Kind>
struct GramLayout {
    typedef typename Kind::Element Element;
    static constexpr int STAGES = Kind::STAGES, LINE = Kind::BLOCK_DEPTH + Kind::PAD_DEPTH;  // of q and k
    static constexpr int V_LINE = Kind::COLUMNS + Kind::PAD, V_EACH = Kind::BLOCK_DEPTH / Kind::WARPS_ACROSS;
    static constexpr int PARTS = Kind::COLUMNS / Kind::BLOCK_DEPTH;  // in which a tile's rows of v come
    static constexpr int Q_NUMBERS = Kind::ROWS * LINE, NUMBERS = Q_NUMBERS + Kind::COLUMNS * LINE;
    static constexpr int STAGE_BYTES = NUMBERS * static_cast<int>(sizeof(Element)), BYTES = STAGES * STAGE_BYTES;
    static_assert(BYTES <= 48 * 1024, "more shared memory than a kernel may have without asking");
    static_assert(STAGE_BYTES % 16 == 0 && Q_NUMBERS * sizeof(Element) % 16 == 0, "copies of 16 bytes are aligned");
    static_assert(Kind::BLOCK_DEPTH * V_LINE <= NUMBERS, "rows of v fit a stage");
    static_assert(PARTS == 2 && Kind::WARPS_ACROSS == 2 && V_EACH % 8 == 0, "a warp takes half of its columns at a time");
    static_assert(Kind::ROWS * Kind::COLUMNS * static_cast<int>(sizeof(typename Kind::Sum)) <= BYTES, "warps exchange their sums");
};

// What comes next: `step` counts parts of the depth of q and k, then those of v.
struct GramWalk {
    int64_t u;
    int64_t step;
};

template <class Kind>
FASTFIP_DEVICE void fetch_gram(const GramProblem& p, const GramWalk& at, int64_t steps, int64_t sample, int64_t first_t,
                               int64_t first_e, typename Kind::Element* to) {
    typedef typename Kind::Element Element;
    typedef GramLayout<Kind> Memory;
    constexpr int THREADS = threads_of<Kind>;
    auto line_of = [&](const Lines& x, int64_t line, int64_t first) {
        return static_cast<const Element*>(x.data) + sample * x.stride_n + line * x.stride_line + first;
    };
    if (at.step < steps) {
        const int64_t d = at.step * Kind::BLOCK_DEPTH;
        copy_lines<THREADS, Kind::ROWS, Kind::BLOCK_DEPTH, Memory::LINE>(line_of(p.q, first_t, d), p.q.stride_line, p.d - d,
                                                                         p.t - first_t, to);
        copy_lines<THREADS, Kind::COLUMNS, Kind::BLOCK_DEPTH, Memory::LINE>(line_of(p.k, at.u, d), p.k.stride_line, p.d - d,
                                                                            p.u - at.u, to + Memory::Q_NUMBERS);
        return;
    }
#pragma unroll
    for (int w = 0; w < Kind::WARPS_ACROSS; ++w) {  // of each warp's columns this part
        const int64_t u = at.u + w * Warp<Kind>::COLUMNS + (at.step - steps) * Memory::V_EACH, left = p.u - u;
        copy_lines<THREADS, Memory::V_EACH, Kind::COLUMNS, Memory::V_LINE>(line_of(p.v, left > 0 ? u : 0, first_e), p.v.stride_line,
                                                                           p.e - first_e, left, to + w * Memory::V_EACH * Memory::V_LINE);
    }
}

template <class Kind>
FASTFIP_DEVICE void gram_apply_block(const GramProblem& p) {
    typedef typename Kind::Element Element;
    typedef typename Kind::Sum Sum;
    typedef GramLayout<Kind> Memory;
    constexpr int DOWN = Warp<Kind>::DOWN, HALF = Warp<Kind>::ACROSS / 2, WIDE = Kind::COLUMNS / 8;

    char* const memory = shared_memory();
    auto stage_of = [&](int s) { return reinterpret_cast<Element*>(memory + s * Memory::STAGE_BYTES); };
    const int64_t first_e = block_x() % p.tiles_e * Kind::COLUMNS, first_t = block_x() / p.tiles_e % p.tiles_t * Kind::ROWS;
    const int64_t sample = block_x() / p.tiles_e / p.tiles_t, steps = divide_up(p.d, int64_t(Kind::BLOCK_DEPTH));
    const Warp<Kind> warp;
    const int across = warp.first_column / Warp<Kind>::COLUMNS;

    typename Warp<Kind>::Sums gram = {};
    Sum out[DOWN][WIDE][4] = {};

    GramWalk here = {0, 0}, ahead = here;
    auto next_of = [&](const GramWalk& at) -> GramWalk {
        if (at.step + 1 < steps + Memory::PARTS) return {at.u, at.step + 1};
        return {at.u + Kind::COLUMNS, 0};
    };
    auto fetch = [&](int s) {
        if (ahead.u < p.u) {
            fetch_gram<Kind>(p, ahead, steps, sample, first_t, first_e, stage_of(s));
            ahead = next_of(ahead);
        }
        copies_end_group();
    };
#pragma unroll
    for (int s = 0; s < Memory::STAGES - 1; ++s) fetch(s);
    for (int stage = 0, next = Memory::STAGES - 1; here.u < p.u;) {
        copies_wait<Memory::STAGES - 2>();
        barrier();  // the stage has come, and nobody reads the one that is filled now
        fetch(next);
        const Element* const s = stage_of(stage);
        if (here.step < steps) {
            multiply_stage<Kind, false, Memory::LINE, false, Memory::LINE>(gram, warp, s, s + Memory::Q_NUMBERS,
                                                                          p.d - here.step * Kind::BLOCK_DEPTH, p.exact);
        } else {
            const bool last = here.step - steps == 1;
            const Element* const rows = s + across * Memory::V_EACH * Memory::V_LINE;
#pragma unroll
            for (int n = 0; n < HALF; ++n) {
                const Element* const pair = rows + (n * 8 + warp.lane % 4 * 2) * Memory::V_LINE + warp.lane / 4;
#pragma unroll
                for (int m = 0; m < DOWN; ++m) {
                    Sum part[4];  // of the columns whose rows of v have come; an index that varies would need memory
                    for (int r = 0; r < 4; ++r) part[r] = last ? gram[m][HALF + n][r] : gram[m][n][r];
                    const Again<Kind> left(part, p.exact);
#pragma unroll
                    for (int j = 0; j < WIDE; ++j) left.multiply(out[m][j], pair[j * 8], pair[Memory::V_LINE + j * 8], p.exact);
                }
            }
            for_each_number<Kind>([&](int m, int n, int r) { gram[m][n][r] = last ? 0 : gram[m][n][r]; });
        }
        here = next_of(here);
        stage = stage + 1 == Memory::STAGES ? 0 : stage + 1;
        next = next + 1 == Memory::STAGES ? 0 : next + 1;
    }

    barrier();  // nobody reads a stage any more
    Sum* const sums = reinterpret_cast<Sum*>(memory) + warp.first_row * Kind::COLUMNS + warp.lane;
    auto for_each_sum = [&](auto f) {
#pragma unroll
        for (int m = 0; m < DOWN; ++m)
#pragma unroll
            for (int j = 0; j < WIDE; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r) f(m, j, r, sums[((m * WIDE + j) * 4 + r) * 32]);
    };
    if (across == 1) for_each_sum([&](int m, int j, int r, Sum& at) { at = out[m][j][r]; });
    barrier();
    if (across == 1) return;
    for_each_sum([&](int m, int j, int r, Sum& at) {
        const int64_t t = first_t + warp.row(m, r), e = first_e + j * 8 + warp.lane % 4 * 2 + r % 2;
        if (t < p.t && e < p.e) static_cast<Sum*>(p.out)[(sample * p.t + t) * p.e + e] = out[m][j][r] + at;
    });
}

}  // namespace cuda
}  // namespace fastfip
