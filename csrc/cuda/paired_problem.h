// Sums of the elementwise product of two products, as spectral_grad and the Gram form of grad_norm_squared need them. Plain
// C++: no CUDA needed.
#pragma once

#include "problem.h"

namespace fastfip {
namespace cuda {

// What the rows of g and of the windows of x are multiplied with: directions [group, feature, column], or the rows of a sample
// themselves [sample, column, feature] (their Gram matrix). Lines follow each other at `line`, 16 bytes at a time.
struct PairedProblem : Operands {
    Lines left, right;
    int made;              // which product there is where the other operand is one already: 0 that of g, 1 that of x
    int64_t columns, tiles, shares;
    int share;             // positions of a share, a multiple of a tile's rows
    void* parts;           // [samples, shares, groups, columns]
};

inline int64_t paired_shares(Type type, int64_t samples, int64_t positions, int64_t columns, int64_t groups, int multiprocessors) {
    const Tile tile = tile_of(type);
    const int64_t blocks = divide_up(columns, tile.inputs) * groups * samples, rows = divide_up(positions, tile.outputs);
    const int64_t wanted = divide_up(int64_t(2) * multiprocessors * tile.blocks_per_multiprocessor, blocks < 1 ? 1 : blocks);
    const int64_t shares = wanted < rows ? wanted : rows;
    return shares < 1 ? 1 : divide_up(rows, divide_up(rows, shares));  // none is empty
}

inline PairedProblem paired_problem_of(const Operands& operands, const Lines& left, const Lines& right, int64_t columns, Type type,
                                       void* parts, int64_t shares) {
    PairedProblem p = {};
    static_cast<Operands&>(p) = operands;
    const Tile tile = tile_of(type);
    p.left = left, p.right = right, p.columns = columns, p.parts = parts, p.shares = shares;
    p.made = left.data ? 0 : 1;
    p.tiles = divide_up(columns, tile.inputs);
    if (shares < 1 || p.tiles * p.groups * p.samples >= 2 * LIMIT / shares)
        throw std::invalid_argument("CUDA kernels: more blocks than a grid has");
    p.share = static_cast<int>(divide_up(divide_up(p.positions, tile.outputs), shares) * tile.outputs);
    for (const Lines& lines : {left, right})
        if (lines.data && (!lines_are_aligned(lines.data, type, lines.stride_n, lines.stride_line, 1) ||
                           !lines_are_aligned(lines.data, type, lines.stride_group, 0, 1)))
            throw std::invalid_argument("CUDA kernels: directions are not aligned to 16 bytes");
    return p;
}

inline bool paired_rows_are_aligned(const PairedProblem& p, Type type) {
    return rows_are_aligned(p, type, p.left.data != nullptr, p.right.data != nullptr);
}

// Both Gram matrices over positions, whose elementwise product is summed.
inline PairedProblem gram_problem_of(const Operands& operands, Type type, void* parts, int64_t shares) {
    const Lines g = {operands.g, operands.g_n, 0, operands.g_at[2]}, x = {operands.x, operands.x_n, 0, operands.x_at[2]};
    const PairedProblem p = paired_problem_of(operands, g, x, operands.positions, type, parts, shares);
    if (!rows_are_aligned(p, type)) throw std::invalid_argument("CUDA kernels: rows are not aligned to 16 bytes");
    return p;
}

}  // namespace cuda
}  // namespace fastfip
