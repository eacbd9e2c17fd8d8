// Grouped convolutions whose groups have few output channels (depthwise: one). Lanes are groups there: W groups at a time are
// transposed to the innermost axis, and for each pair of an output and an input channel of the group up to nine kernel positions
// are summed in registers. In the words of Problem and Slice: a slice is a range of groups (lanes) with all their rows.
#pragma once

#include "cpu/products.h"
#include "cpu/products_pack.h"

namespace fastfip {
namespace {

template <class R, int W>
struct Grouped {
    typedef R Vec __attribute__((vector_size(W * sizeof(R)), aligned(sizeof(R)), may_alias));
    static constexpr int kMaxK = 9;
    static constexpr int64_t kBlock = 128;  // bounds rounding errors, as in Kernel

    // sum[k] = sum_t g[t] map[offset[t] + kernel[k]], W groups at once.
    template <int K>
    static void multiply(const R* g, const R* map, const int64_t* offset, const int64_t* kernel, int64_t positions, Vec* sum) {
        Vec total[K] = {};
        for (int64_t t0 = 0; t0 < positions; t0 += kBlock) {
            const int64_t t1 = t0 + kBlock < positions ? t0 + kBlock : positions;
            Vec acc[K] = {};
            for (int64_t t = t0; t < t1; ++t) {
                const Vec gt = *reinterpret_cast<const Vec*>(g + t * W);
                const R* at = map + offset[t] * W;
#pragma GCC unroll 9
                for (int k = 0; k < K; ++k) acc[k] += gt * *reinterpret_cast<const Vec*>(at + kernel[k] * W);
            }
#pragma GCC unroll 9
            for (int k = 0; k < K; ++k) total[k] += acc[k];
        }
#pragma GCC unroll 9
        for (int k = 0; k < K; ++k) sum[k] = total[k];
    }

    static void multiply(int count, const R* g, const R* map, const int64_t* offset, const int64_t* kernel, int64_t positions,
                         Vec* sum) {
        switch (count) {
            case 1: return multiply<1>(g, map, offset, kernel, positions, sum);
            case 2: return multiply<2>(g, map, offset, kernel, positions, sum);
            case 3: return multiply<3>(g, map, offset, kernel, positions, sum);
            case 4: return multiply<4>(g, map, offset, kernel, positions, sum);
            case 5: return multiply<5>(g, map, offset, kernel, positions, sum);
            case 6: return multiply<6>(g, map, offset, kernel, positions, sum);
            case 7: return multiply<7>(g, map, offset, kernel, positions, sum);
            case 8: return multiply<8>(g, map, offset, kernel, positions, sum);
            case 9: return multiply<9>(g, map, offset, kernel, positions, sum);
        }
    }

    struct Layout {
        int64_t g, map, plain;  // elements: gradients, maps and untransposed maps of W groups
        int64_t at_map, at_plain, at_out, at_grad, at_offset, at_kernel, size;
    };

    static Layout layout(const Problem& p) {
        const Windows& w = *p.windows;
        Layout l = {};
        l.g = p.group_outputs * p.positions * W;
        l.plain = padded_size(w) * W;
        l.map = w.channels * l.plain;
        const int64_t results = p.group_outputs * w.channels * kernel_size(w) * W, indices = int64_t(sizeof(int64_t) / sizeof(R));
        l.at_map = l.g;
        l.at_plain = l.at_map + l.map;
        l.at_out = l.at_plain + l.plain;
        l.at_grad = l.at_out + results;
        l.at_offset = l.at_grad + results;
        l.at_kernel = l.at_offset + p.positions * indices;
        l.size = l.at_kernel + kernel_size(w) * indices;
        return l;
    }

    static int64_t scratch_bytes(const Problem& p, const Slice&) { return layout(p).size * int64_t(sizeof(R)); }

    static void run(const Problem& p, const Slice& s, void* scratch) {
        const Windows& w = *p.windows;
        const Layout l = layout(p);
        R *const g = static_cast<R*>(scratch), *const map = g + l.at_map, *const plain = g + l.at_plain;
        R *const out = g + l.at_out, *const grad = g + l.at_grad;
        int64_t *const offset = reinterpret_cast<int64_t*>(g + l.at_offset), *const kernel = reinterpret_cast<int64_t*>(g + l.at_kernel);
        const int64_t size = padded_size(w), window = kernel_size(w), inputs = w.channels * window;
        position_offsets(w, offset);
        for (int64_t k = 0; k < window; ++k) kernel[k] = kernel_offset(w, k);
        for (int64_t group = s.lane_begin; group < s.lane_end; group += W) {
            const int64_t used = s.lane_end - group < W ? s.lane_end - group : W;
            for (int64_t i = 0; i < 2 * (l.at_grad - l.at_out); ++i) out[i] = 0;
            for (int64_t n = 0; n < p.samples; ++n) {
                for (int64_t o = 0; o < p.group_outputs; ++o) {
                    Matrix lanes = p.lanes;  // every group_outputs-th channel
                    lanes.stride_f *= p.group_outputs;
                    Pack<R>::pack_from(lanes, n, (group * p.group_outputs + o) * p.lanes.stride_f, p.positions, used, W,
                                       g + o * p.positions * W);
                }
                for (int64_t c = 0; c < w.channels; ++c) {
                    for (int64_t f = 0; f < used; ++f) Pack<R>::pad(w, n, (group + f) * w.channels + c, plain + f * size);
                    Pack<R>::pack(plain, 1, size, size, used, W, map + c * l.plain);
                }
                R *square = out, *sum = grad;
                double norm = 0;
                for (int64_t o = 0; o < p.group_outputs; ++o) {
                    for (int64_t c = 0; c < w.channels; ++c) {
                        for (int64_t k = 0; k < window; k += kMaxK) {
                            const int count = static_cast<int>(window - k < kMaxK ? window - k : kMaxK);
                            Vec acc[kMaxK];
                            multiply(count, g + o * p.positions * W, map + c * l.plain, offset, kernel + k, p.positions, acc);
                            Vec squares = {};
                            for (int i = 0; i < count; ++i, square += W, sum += W) {
                                if (p.norms) {
                                    *reinterpret_cast<Vec*>(square) = acc[i];
                                    squares += acc[i] * acc[i];
                                    continue;
                                }
                                *reinterpret_cast<Vec*>(square) += acc[i] * acc[i];
                                *reinterpret_cast<Vec*>(sum) += acc[i];
                            }
                            for (int f = 0; p.norms && f < W; ++f) norm += squares[f];
                        }
                    }
                }
                if (!p.norms) continue;
                s.norms[n] += norm;
                for (int64_t f = 0; p.out && f < used; ++f) {
                    R* const to = static_cast<R*>(p.out) + n * p.result_sample + (group + f) * p.group_outputs * inputs;
                    for (int64_t i = 0; i < p.group_outputs * inputs; ++i) to[i] = out[i * W + f];
                }
            }
            if (p.norms) continue;
            // Tiles are [output][input][group], the result is [group][output][input].
            for (int64_t f = 0; f < used; ++f) {
                const int64_t at = (group + f) * p.group_outputs * inputs;
                for (int64_t i = 0; i < p.group_outputs * inputs; ++i) {
                    static_cast<R*>(p.out)[at + i] += out[i * W + f];
                    if (p.grad) static_cast<R*>(p.grad)[at + i] += grad[i * W + f];
                }
            }
        }
    }
};

}  // namespace
}  // namespace fastfip
