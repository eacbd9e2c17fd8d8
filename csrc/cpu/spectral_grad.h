// What the dispatcher (spectral_grad.cpp) and the kernels of each instruction set share. See fastfip.h for the contract.
#pragma once

#include <stdint.h>

#include "cpu/products.h"

namespace fastfip {

// One of the two operands: g with u, or a with v.
struct SpectralSide {
    Matrix matrix;
    const Windows* windows;  // null: `matrix`
    Directions directions;
    int64_t features;        // of one group
    const void* packed;      // the directions of all groups as the kernel reads them
};

struct SpectralProblem {
    SpectralSide side[2];
    int64_t samples, positions, directions, groups;
    bool lanes_are_positions;   // otherwise lanes are directions
    int64_t chunk, chunks;      // positions of a sample that are summed at a time, and how many such chunks it has
    int64_t together;           // samples of one unit where they are short, otherwise 1
    void* sums;                 // [samples, chunks, groups, directions]
};

struct SpectralBackend {
    int64_t block;  // positions at a time
    int64_t lane_width;
    int64_t (*packed_bytes)(const SpectralProblem&, int side);
    void (*pack)(const SpectralProblem&, int side, void* to);
    int64_t (*scratch_bytes)(const SpectralProblem&);
    // One unit of one group: `together` samples, or a chunk of one.
    void (*run)(const SpectralProblem&, int64_t group, int64_t unit, void* scratch);
};

// For each instruction set.
SpectralBackend spectral_portable(bool is_double, bool lanes_are_positions);
SpectralBackend spectral_avx2(bool is_double, bool lanes_are_positions);

}  // namespace fastfip
