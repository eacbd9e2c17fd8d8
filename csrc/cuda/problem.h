// Calls of the CUDA kernels as they see them, and how they are cut into blocks. Plain C++: no CUDA needed.
#pragma once

#include <stdint.h>

#include <stdexcept>

#include "fastfip.h"

#ifdef __CUDACC__
#define FASTFIP_HOST_DEVICE __host__ __device__
#else
#define FASTFIP_HOST_DEVICE
#endif

namespace fastfip {
namespace cuda {

// Everything is a convolution: a dense layer is one of a 1-wide kernel along T. Positions of a sample are (frame, z, y, x).
struct Operands {
    const void *g, *x;
    int64_t samples, outputs, inputs, groups;  // outputs and inputs of one group
    int64_t g_n, g_frame, g_o, g_at[3];
    int64_t x_n, x_frame, x_c, x_at[3];
    int64_t channels;  // of one group
    int positions;     // frames * z * y * x
    int position[3], kernel[3], step[3], dilation[3], padding[3], size[3];
    bool exact;  // float32: three TF32 products for each one
};

// What sum_grad_squared and grad_norm_squared cut into tiles of the weight gradient.
struct Problem : Operands {
    void *out, *grad;            // added to
    void *part_out, *part_grad;  // [shares, groups * outputs, inputs], written instead where there are several shares
    int64_t tiles_o, tiles_i, shares;
};

constexpr int64_t LIMIT = int64_t(1) << 30;  // of what is counted in 32 bits

// Tiles of the result that a block owns, by type of the operands.
struct Tile {
    int outputs, inputs, threads, blocks_per_multiprocessor;
};

inline Tile tile_of(Type type) {
    if (type == Type::f64) return {64, 32, 128, 3};
    if (type == Type::f32) return {64, 64, 128, 3};
    return {128, 64, 256, 1};
}

FASTFIP_HOST_DEVICE inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Into how many shares the samples are cut, each summed by blocks of its own and added up by a second kernel. The cost of a
// choice is the number of waves of blocks, each as long as its samples and about one more for writing a tile down.
inline int64_t shares_of(Type type, int64_t samples, int64_t outputs, int64_t inputs, int64_t groups, int multiprocessors) {
    const Tile tile = tile_of(type);
    const int64_t tiles = divide_up(outputs, tile.outputs) * divide_up(inputs, tile.inputs) * groups;
    const int64_t places = int64_t(multiprocessors) * tile.blocks_per_multiprocessor;
    const int64_t numbers = outputs * inputs * groups, room = int64_t(1) << 24;  // numbers in the workspace, at most
    int64_t best = 1, best_cost = divide_up(tiles, places) * samples;
    for (int64_t shares = 2; shares <= samples && shares <= 4096; ++shares) {
        if (shares * numbers > room) break;
        const int64_t cost = divide_up(tiles * shares, places) * (divide_up(samples, shares) + 1);
        if (cost < best_cost) best = shares, best_cost = cost;
        if (tiles * shares >= 8 * places) break;  // waves enough to hide the last one
    }
    return best;
}

// The same where every sample's tile is written down anyway: shares cost nothing, and enough of them fill the device.
inline int64_t norm_shares_of(Type type, int64_t samples, int64_t tiles, int multiprocessors) {
    const int64_t places = int64_t(multiprocessors) * tile_of(type).blocks_per_multiprocessor;
    const int64_t wanted = divide_up(8 * places, tiles < 1 ? 1 : tiles), most = samples < 65535 ? samples : 65535;
    return wanted < most ? wanted : most < 1 ? 1 : most;
}

FASTFIP_HOST_DEVICE inline int64_t first_sample(int64_t share, int64_t shares, int64_t samples) { return share * samples / shares; }

inline Operands operands_of(const Map& g, const Map& x, const Sizes& sizes, bool exact) {
    Operands p = {};
    p.g = g.data, p.x = x.data, p.exact = exact;
    p.samples = sizes.samples, p.groups = sizes.groups;
    p.outputs = sizes.outputs / sizes.groups, p.channels = sizes.channels / sizes.groups;
    p.g_n = g.stride_n, p.g_frame = g.stride_frame, p.g_o = g.stride_f;
    p.x_n = x.stride_n, p.x_frame = x.stride_frame, p.x_c = x.stride_f;
    int64_t positions = sizes.frames, taps = 1;
    for (int d = 0; d < 3; ++d) {
        p.g_at[d] = g.stride[d], p.x_at[d] = x.stride[d];
        positions *= sizes.positions[d], taps *= sizes.kernel[d];
        const int64_t reach = sizes.positions[d] * sizes.step[d] + sizes.kernel[d] * sizes.dilation[d] + sizes.padding[d];
        if (positions >= LIMIT || taps >= LIMIT || reach >= LIMIT || sizes.size[d] >= LIMIT)
            throw std::invalid_argument("CUDA kernels: an axis of 2^30 positions or more");
        p.position[d] = static_cast<int>(sizes.positions[d]), p.kernel[d] = static_cast<int>(sizes.kernel[d]);
        p.step[d] = static_cast<int>(sizes.step[d]), p.dilation[d] = static_cast<int>(sizes.dilation[d]);
        p.padding[d] = static_cast<int>(sizes.padding[d]), p.size[d] = static_cast<int>(sizes.size[d]);
    }
    p.positions = static_cast<int>(positions);
    p.inputs = p.channels * taps;
    return p;
}

inline Problem problem_of(const Map& g, const Map& x, const Sizes& sizes, Type type, bool exact, const Results& results) {
    Problem p = {};
    static_cast<Operands&>(p) = operands_of(g, x, sizes, exact);
    p.out = results.out, p.grad = results.grad, p.shares = results.shares;
    const Tile tile = tile_of(type);
    p.tiles_o = divide_up(p.outputs, tile.outputs), p.tiles_i = divide_up(p.inputs, tile.inputs);
    if (p.tiles_o * p.tiles_i * p.groups >= 2 * LIMIT || p.shares < 1 || p.shares > 65535)
        throw std::invalid_argument("CUDA kernels: more blocks than a grid has");
    const int64_t bytes = p.shares * p.groups * p.outputs * p.inputs * (type == Type::f64 ? 8 : 4);
    p.part_out = results.room;
    p.part_grad = results.room ? static_cast<char*>(results.room) + bytes : nullptr;
    return p;
}

// Whether a matrix can be copied 16 bytes at a time.
inline bool lines_are_aligned(const void* data, Type type, int64_t stride_n, int64_t stride_line, int64_t stride) {
    const int64_t each = type == Type::f64 ? 2 : type == Type::f32 ? 4 : 8;
    return stride == 1 && stride_n % each == 0 && stride_line % each == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Whether the operands are matrices of one group, of which g (and x) can be copied 16 bytes at a time.
inline bool rows_are_aligned(const Operands& p, Type type, bool g = true, bool x = true) {
    bool fits = p.groups == 1 && p.position[2] == p.positions && p.size[2] == p.positions && p.inputs == p.channels;
    fits = fits && p.step[2] == 1 && p.padding[0] + p.padding[1] + p.padding[2] == 0;
    fits = fits && (!g || lines_are_aligned(p.g, type, p.g_n, p.g_at[2], p.g_o));
    return fits && (!x || lines_are_aligned(p.x, type, p.x_n, p.x_at[2], p.x_c));
}

}  // namespace cuda
}  // namespace fastfip
