// The op spectral_grad: q = g U and p = a V of each position, multiplied and summed by sample without being stored. This file deals
// out the work; it is done in spectral_grad_kernel.h.
#include "cpu/spectral_grad.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "cpu/team.h"

namespace fastfip {
namespace {

// Positions of a long sample that one thread sums: a number of blocks that does not hang on how many threads there are.
constexpr int64_t kChunk = 1536;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

SpectralBackend backend(const Options& options, bool lanes_are_positions) {
    if (options.isa > best_isa()) throw std::invalid_argument("this CPU lacks the instruction set that was asked for");
#if defined(__x86_64__)
    // The template makes 64-byte vectors too, which have not run on a CPU with AVX-512: until they have, AVX2 runs there.
    if (options.isa >= Isa::avx2) return spectral_avx2(options.is_double, lanes_are_positions);
#endif
    return spectral_portable(options.is_double, lanes_are_positions);
}

template <class R>
void add_chunks(const SpectralProblem& p, R* each) {
    const R* const sums = static_cast<const R*>(p.sums);
    const int64_t size = p.groups * p.directions;
    for (int64_t n = 0; n < p.samples; ++n) {
        for (int64_t k = 0; k < size; ++k) {
            double sum = 0;
            for (int64_t c = 0; c < p.chunks; ++c) sum += sums[(n * p.chunks + c) * size + k];
            each[n * size + k] += static_cast<R>(sum);
        }
    }
}

void run(SpectralProblem p, void* each, const Options& options) {
    if (p.samples == 0 || p.positions == 0 || p.directions == 0) return;
    const SpectralBackend b = backend(options, p.lanes_are_positions);
    const int64_t number = options.is_double ? sizeof(double) : sizeof(float);
    const int64_t short_one = p.lanes_are_positions ? ceil_div(p.positions, b.lane_width) * b.lane_width : p.positions;
    p.together = std::max<int64_t>(1, b.block / short_one);
    // A map is padded once for all of its positions.
    p.chunk = p.side[1].windows ? p.positions : std::max(b.block, kChunk / b.block * b.block);
    p.chunks = p.together > 1 ? 1 : ceil_div(p.positions, p.chunk);
    const int64_t units = p.together > 1 ? ceil_div(p.samples, p.together) : p.samples * p.chunks, items = units * p.groups;

    const int64_t features = p.side[0].features * (p.side[0].directions.data != nullptr) +
                             p.side[1].features * (p.side[1].directions.data != nullptr);
    const double flops = 2.0 * p.samples * p.positions * p.directions * p.groups * double(features);
    // Starting a thread costs about as much as a million operations.
    const int64_t useful = std::max<int64_t>(1, static_cast<int64_t>(flops / 2e6));
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>({options.threads, useful, items}));

    const int64_t sums = p.chunks > 1 ? p.samples * p.chunks * p.groups * p.directions * number : 0;
    const int64_t first = aligned(b.packed_bytes(p, 0)), second = aligned(b.packed_bytes(p, 1));
    const int64_t scratch = aligned(b.scratch_bytes(p));
    char* memory = reserve_scratch(first + second + aligned(sums) + threads * scratch);
    p.side[0].packed = memory;
    p.side[1].packed = memory + first;
    for (int side = 0; side < 2; ++side)
        if (p.side[side].directions.data) b.pack(p, side, memory + side * first);
    memory += first + second;
    p.sums = sums ? memory : each;
    std::fill(memory, memory + sums, 0);
    memory += aligned(sums);

    struct Team {
        const SpectralProblem& p;
        const SpectralBackend& b;
        char* memory;
        int64_t scratch, items;
        std::atomic<int64_t> next{0}, workers{0};

        void run() {
            char* const mine = memory + scratch * workers++;
            for (int64_t i; (i = next++) < items;) b.run(p, i % p.groups, i / p.groups, mine);
        }
    } team{p, b, memory, scratch, items};
    run_team(static_cast<size_t>(threads), [](void* data) { static_cast<Team*>(data)->run(); }, &team);
    if (!sums) return;
    if (options.is_double) add_chunks(p, static_cast<double*>(each));
    else add_chunks(p, static_cast<float*>(each));
}

}  // namespace

void spectral_grad(const Matrix& g, const Directions& u, const Matrix& a, const Directions& v, int64_t samples,
                   int64_t positions, int64_t outputs, int64_t inputs, int64_t directions, int64_t groups, void* each,
                   const Options& options) {
    SpectralProblem p = {};
    p.side[0] = {g, nullptr, u, outputs, nullptr};
    p.side[1] = {a, nullptr, v, inputs, nullptr};
    p.samples = samples, p.positions = positions, p.directions = directions, p.groups = groups;
    // Of the operand that has more to be multiplied, what follows each other in memory decides.
    const bool by_g = u.data && (!v.data || outputs >= inputs);
    const Matrix& m = by_g ? g : a;
    p.lanes_are_positions = positions > 1 && m.stride_t == 1 && m.stride_f != 1;
    run(p, each, options);
}

void spectral_grad_windows(const Matrix& g, const Directions& u, const Windows& a, const Directions& v, int64_t samples,
                           int64_t outputs, int64_t directions, int64_t groups, void* each, const Options& options) {
    SpectralProblem p = {};
    p.side[0] = {g, nullptr, u, outputs, nullptr};
    p.side[1] = {{}, &a, v, a.channels * kernel_size(a), nullptr};
    p.samples = samples, p.directions = directions, p.groups = groups;
    p.positions = a.positions[0] * a.positions[1] * a.positions[2];
    p.lanes_are_positions = true;
    run(p, each, options);
}

}  // namespace fastfip
