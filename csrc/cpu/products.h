// What the dispatcher (products.cpp) and the files of each instruction set share. See fastfip.h for the contract.
#pragma once

#include <stdint.h>

#include "fastfip.h"

namespace fastfip {

// One call with the roles dealt out: which operand is broadcast by rows, which is packed into lanes.
struct Problem {
    int64_t samples, positions;
    int64_t line;  // positions that follow each other at equal distances: all, or one row of a convolution's output
    Matrix lanes, rows;
    const Windows* windows;  // null: `rows` is a matrix; otherwise rows are (channel, kernel position) of this map
    void *out, *grad;        // grad may be null; norms: out is G_n of every sample, or null
    double* norms;           // [samples]; null: the sum of squares
    int64_t result_row, result_lane, result_sample;  // strides of the result; result_sample for norms only
    int64_t group_outputs;            // output channels of a group (grouped kernel only)
};

// The part of the result that one thread computes: of one group, a range of rows and a range of lanes.
struct Slice {
    int64_t row_begin, row_end, lane_begin, lane_end;
    int64_t lane_first;     // index of lane_begin in the operand (with the groups before it)
    int64_t channel_first;  // first channel of the group in the map
    int64_t result_first;   // offset of the group in the result
    double* norms;          // [samples], this slice's share of them
};

struct Backend {
    int64_t (*scratch_bytes)(const Problem&, const Slice&);
    void (*run)(const Problem&, const Slice&, void* scratch);
    int lane_width;
};

// What a kernel is compiled for: the type of accumulation, lanes that are features or groups.
struct Kind {
    bool is_double, grouped;
};

// For each instruction set.
Backend products_portable(Kind kind);
Backend products_avx2(Kind kind);
Backend products_avx512(Kind kind);
Backend products_bf16();

// Deal out the roles of the operands and run: the results' addresses are in `p`, everything else is filled in.
void run_dense(Problem p, const Matrix& g, const Matrix& a, int64_t samples, int64_t positions, int64_t outputs, int64_t inputs,
               const Options& options);
void run_windows(Problem p, const Matrix& g, const Windows& a, int64_t samples, int64_t outputs, int64_t groups,
                 const Options& options);

namespace {

inline int64_t kernel_size(const Windows& w) { return w.kernel[0] * w.kernel[1] * w.kernel[2]; }

inline int64_t padded_size(const Windows& w) { return w.padded[0] * w.padded[1] * w.padded[2]; }

// Offset of kernel position k in the padded map of a channel.
inline int64_t kernel_offset(const Windows& w, int64_t k) {
    const int64_t x = k % w.kernel[2], y = k / w.kernel[2] % w.kernel[1], z = k / w.kernel[2] / w.kernel[1];
    return (z * w.dilation[0] * w.padded[1] + y * w.dilation[1]) * w.padded[2] + x * w.dilation[2];
}

// Offset of an output position's window in the padded map of a channel.
inline int64_t position_offset(const Windows& w, int64_t z, int64_t y, int64_t x) {
    return (z * w.step[0] * w.padded[1] + y * w.step[1]) * w.padded[2] + x * w.step[2];
}

inline void position_offsets(const Windows& w, int64_t* to) {
    for (int64_t z = 0; z < w.positions[0]; ++z)
        for (int64_t y = 0; y < w.positions[1]; ++y)
            for (int64_t x = 0; x < w.positions[2]; ++x) *to++ = position_offset(w, z, y, x);
}

}  // namespace
}  // namespace fastfip
