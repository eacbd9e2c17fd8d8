// The products G_n of every sample, which the ops sum_grad_squared.cpp and grad_norm_squared.cpp use in their own ways. This file
// deals out the roles of the operands, the threads' slices and the scratch memory; the work is in products_kernel.h.
#include "cpu/products.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "cpu/team.h"

namespace fastfip {
namespace {

Backend backend(const Options& options, bool norms, bool grouped = false) {
    if (options.isa > best_isa()) throw std::invalid_argument("this CPU lacks the instruction set that was asked for");
#if defined(FASTFIP_BF16)
    if (options.bf16 && !grouped && !norms && options.isa >= Isa::avx512_bf16) return products_bf16();
#endif
    if (options.bf16 && norms) throw std::invalid_argument("norms have no bfloat16 products");
    if (options.bf16 && !grouped) throw std::invalid_argument("bfloat16 products need a CPU and a compiler with AVX512_BF16");
    const Kind kind = {options.is_double, grouped};
#if defined(__x86_64__)
    if (options.isa >= Isa::avx512) return products_avx512(kind);
    if (options.isa == Isa::avx2) return products_avx2(kind);
#endif
    return products_portable(kind);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void run_slices(const Problem& p, const Backend& b, const std::vector<std::vector<Slice>>& work) {
    std::vector<int64_t> at(work.size() + 1, 0);
    for (size_t i = 0; i < work.size(); ++i) {
        int64_t most = 0;
        for (const Slice& s : work[i]) most = std::max(most, b.scratch_bytes(p, s));
        at[i + 1] = at[i] + ceil_div(most, 64) * 64;
    }
    char* const memory = reserve_scratch(at.back());
    struct Team {
        const Problem& p;
        const Backend& b;
        const std::vector<std::vector<Slice>>& work;
        const std::vector<int64_t>& at;
        char* memory;
        std::atomic<size_t> next{0};

        void run() {  // whoever comes takes the next share, however many threads there are
            for (size_t i; (i = next++) < work.size();)
                for (const Slice& s : work[i]) b.run(p, s, memory + at[i]);
        }
    } team{p, b, work, at, memory};
    run_team(work.size(), [](void* data) { static_cast<Team*>(data)->run(); }, &team);
}

// Each group's result is cut into a grid of slices: the grid that packs least, since every slice packs its own rows and lanes.
void run_groups(const Problem& p, const Backend& b, int64_t rows, int64_t lanes, int64_t groups, int64_t channels, int threads,
                bool split_rows = true) {
    const double flops = 2.0 * p.samples * p.positions * rows * lanes * groups;
    // Starting a thread costs about as much as a million operations.
    const int64_t useful = std::max<int64_t>(1, static_cast<int64_t>(flops / 2e6));
    const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, useful));

    int64_t by_rows = 1, by_lanes = 1;
    if (groups < count) {
        const int64_t share = count / groups, panels = ceil_div(lanes, b.lane_width);
        double best = 1e300;
        for (int64_t l = 1; l <= std::min(share, panels); ++l) {
            const int64_t r = split_rows ? std::min(share / l, rows) : 1;
            // What the busiest slice multiplies, and what it packs (about eight products' time for each element).
            const double width = double(ceil_div(panels, l) * b.lane_width), height = double(ceil_div(rows, r));
            const double cost = width * height + 8.0 * (width + height);
            if (cost < best) best = cost, by_rows = r, by_lanes = l;
        }
    }
    std::vector<std::vector<Slice>> work(static_cast<size_t>(std::min(count, groups * by_rows * by_lanes)));
    const int64_t panels = ceil_div(lanes, b.lane_width), total = groups * by_rows * by_lanes;
    std::vector<double> norms(p.norms ? static_cast<size_t>(total * p.samples) : 0);
    for (int64_t index = 0; index < total; ++index) {
        const int64_t group = index / (by_rows * by_lanes), r = index / by_lanes % by_rows, l = index % by_lanes;
        Slice s;
        s.row_begin = rows * r / by_rows;
        s.row_end = rows * (r + 1) / by_rows;
        s.lane_begin = std::min(lanes, panels * l / by_lanes * b.lane_width);
        s.lane_end = std::min(lanes, panels * (l + 1) / by_lanes * b.lane_width);
        s.lane_first = group * lanes + s.lane_begin;
        s.channel_first = group * channels;
        s.result_first = group * lanes * rows;
        s.norms = p.norms ? norms.data() + index * p.samples : nullptr;
        work[static_cast<size_t>(index * int64_t(work.size()) / total)].push_back(s);
    }
    run_slices(p, b, work);
    for (size_t i = 0; i < norms.size(); ++i) p.norms[i % static_cast<size_t>(p.samples)] += norms[i];
}

}  // namespace

void run_dense(Problem p, const Matrix& g, const Matrix& a, int64_t samples, int64_t positions, int64_t outputs, int64_t inputs,
               const Options& options) {
    if (samples == 0 || positions == 0 || outputs == 0 || inputs == 0) return;
    const Backend b = backend(options, p.norms);
    // Lanes are padded to whole vectors: give them the operand that wastes less, or else the larger one.
    const double waste_o = double(ceil_div(outputs, b.lane_width) * b.lane_width) / double(outputs);
    const double waste_i = double(ceil_div(inputs, b.lane_width) * b.lane_width) / double(inputs);
    const bool lanes_are_inputs = waste_i < waste_o || (waste_i == waste_o && inputs >= outputs);
    p.samples = samples;
    p.positions = p.line = positions;
    p.lanes = lanes_are_inputs ? a : g;
    p.rows = lanes_are_inputs ? g : a;
    p.result_row = lanes_are_inputs ? inputs : 1;
    p.result_lane = lanes_are_inputs ? 1 : inputs;
    p.result_sample = outputs * inputs;
    const int64_t rows = lanes_are_inputs ? outputs : inputs, lanes = lanes_are_inputs ? inputs : outputs;
    run_groups(p, b, rows, lanes, 1, 0, options.threads);
}

void run_windows(Problem p, const Matrix& g, const Windows& a, int64_t samples, int64_t outputs, int64_t groups,
                 const Options& options) {
    const int64_t positions = a.positions[0] * a.positions[1] * a.positions[2];
    const int64_t inputs = a.channels * kernel_size(a);
    if (samples == 0 || positions == 0 || outputs == 0 || inputs == 0) return;
    p.samples = samples;
    p.positions = positions;
    p.line = a.positions[2];
    p.lanes = g;
    p.windows = &a;
    p.result_row = 1;
    p.result_lane = inputs;
    p.result_sample = outputs * inputs;
    const Backend features = backend(options, p.norms);
    // Lanes that are output channels of one group stand empty when it has few; groups as lanes cost a load for each product.
    const auto use = [&](int64_t n) { return double(n) / double(ceil_div(n, features.lane_width) * features.lane_width); };
    p.group_outputs = outputs / groups;
    if (0.5 * use(groups) > use(p.group_outputs))
        run_groups(p, backend(options, p.norms, true), inputs * p.group_outputs, groups, 1, a.channels, options.threads, false);
    else
        run_groups(p, features, inputs, p.group_outputs, groups, a.channels, options.threads);
}

}  // namespace fastfip
