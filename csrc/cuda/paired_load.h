// How a block of paired.h gets its operands, BLOCK_DEPTH features at a time. Include device.h (or the tests' cuda_on_cpu.h) before.
#pragma once

#include <stdint.h>

#include "load.h"
#include "paired_problem.h"

namespace fastfip {
namespace cuda {

// Which features of which positions come next, and for which of the two products.
struct Walk {
    int t, side;
    int64_t depth;

    FASTFIP_DEVICE int64_t left(const Operands& p) const { return (side == 0 ? p.outputs : p.inputs) - depth; }

    template <class Kind, bool KNOWN>
    FASTFIP_DEVICE Walk next(const Operands& p) const {
        if (left(p) > Kind::BLOCK_DEPTH) return {t, side, depth + Kind::BLOCK_DEPTH};
        if (!KNOWN && side == 0) return {t, 1, 0};
        return {t + Kind::ROWS, KNOWN ? side : 0, 0};
    }
};

// Which block this is.
struct PairedPlace {
    int64_t sample, group, first;  // first: column
    int end;                       // of the positions
};

// The right operand: lines of directions, one a feature, or lines of features, one a position.
template <class Kind, bool GRAM>
struct LoadLines {
    typedef typename Kind::Element Element;
    static constexpr int LINES = GRAM ? Kind::COLUMNS : Kind::BLOCK_DEPTH, WIDTH = GRAM ? Kind::BLOCK_DEPTH : Kind::COLUMNS;
    static constexpr int LINE = WIDTH + (GRAM ? Kind::PAD_DEPTH : Kind::PAD), NUMBERS = LINES * LINE;
    static constexpr bool DEPTH_FIRST = !GRAM;

    static FASTFIP_DEVICE void fetch(const PairedProblem& p, const PairedPlace& place, const Walk& at, Element* to) {
        const Lines& lines = at.side == 0 ? p.left : p.right;
        const int64_t line = GRAM ? place.first : at.depth, first = GRAM ? at.depth : place.first;
        const int64_t columns = p.columns - place.first, features = at.left(p);
        const Element* from = static_cast<const Element*>(lines.data) + place.sample * lines.stride_n +
                              place.group * lines.stride_group + line * lines.stride_line + first;
        copy_lines<threads_of<Kind>, LINES, WIDTH, LINE>(from, lines.stride_line, GRAM ? features : columns,
                                                           GRAM ? columns : features, to);
    }
};

// The left operand where features follow each other in memory and rows are aligned to 16 bytes: [position, feature].
template <class Kind>
struct LoadPositionRows {
    typedef typename Kind::Element Element;
    static constexpr bool DEPTH_FIRST = false;
    static constexpr int STAGES = Kind::STAGES, LINE = Kind::BLOCK_DEPTH + Kind::PAD_DEPTH, NUMBERS = LINE * Kind::ROWS;
    static constexpr int TABLE_BYTES = 0;

    FASTFIP_DEVICE LoadPositionRows(const PairedProblem&, char*, const PairedPlace&, const Walk&) {}

    FASTFIP_DEVICE void fetch(const PairedProblem& p, const PairedPlace& place, const Walk& at, const Walk&, Element* to) {
        const int64_t stride = at.side == 0 ? p.g_at[2] : p.x_at[2];
        const Element* from = static_cast<const Element*>(at.side == 0 ? p.g : p.x) +
                              place.sample * (at.side == 0 ? p.g_n : p.x_n) + at.t * stride + at.depth;
        copy_lines<threads_of<Kind>, Kind::ROWS, Kind::BLOCK_DEPTH, LINE>(from, stride, at.left(p), p.positions - at.t, to);
    }

    FASTFIP_DEVICE void store(Element*) {}
};

// The left operand of any strides, and the windows of a convolution: [feature, position]. A thread keeps its positions for as
// long as it walks over features; where these lie is in a table, written one step ahead. 16-bit numbers pass through registers, as
// in load.h.
template <class Kind>
struct LoadPositions {
    typedef typename Kind::Element Element;
    static constexpr bool DEPTH_FIRST = true, BY_REGISTERS = sizeof(Element) == 2;
    static constexpr int STAGES = 2, LINE = Kind::ROWS + Kind::PAD, NUMBERS = LINE * Kind::BLOCK_DEPTH;
    static constexpr int EACH = BY_REGISTERS ? 2 : 1, SLOTS = Kind::ROWS / EACH, STEP = threads_of<Kind> / SLOTS;
    static constexpr int MANY = Kind::BLOCK_DEPTH / STEP;
    static constexpr int TABLE_BYTES = 2 * Kind::BLOCK_DEPTH * static_cast<int>(sizeof(Tap));

    struct Spot {
        int64_t offset;
        int corner[3];
    };

    Tap* table;  // two of them
    int now = 0;
    Spot spot[EACH];
    uint32_t kept[BY_REGISTERS ? MANY : 1];

    FASTFIP_DEVICE LoadPositions(const PairedProblem& p, char* memory, const PairedPlace& place, const Walk& first)
        : table(reinterpret_cast<Tap*>(memory)) {
        write_table(p, place, first, 0);
        barrier();
    }

    FASTFIP_DEVICE void write_table(const PairedProblem& p, const PairedPlace& place, const Walk& at, int which) {
        const int f = thread_index();
        if (f >= Kind::BLOCK_DEPTH) return;
        const int64_t feature = at.depth + f;
        Tap tap = {(place.group * p.outputs + feature) * p.g_o, {0, 0, 0}};
        if (at.side == 1)
            tap = tap_of(p, place.group, feature);
        else if (feature >= p.outputs)
            tap.reach[0] = OUTSIDE;
        table[which * Kind::BLOCK_DEPTH + f] = tap;
    }

    FASTFIP_DEVICE void find(const PairedProblem& p, const Walk& at, int slot) {
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const Position where = place_of(p, at.t + slot * EACH + e);
            spot[e].offset = at.side == 0 ? where.g : where.x;
#pragma unroll
            for (int d = 0; d < 3; ++d)  // g has no windows: its corner is 0 wherever there is a position
                spot[e].corner[d] = at.side == 1 ? where.corner[d] : where.corner[0] > OUTSIDE ? 0 : OUTSIDE;
        }
    }

    FASTFIP_DEVICE void fetch(const PairedProblem& p, const PairedPlace& place, const Walk& at, const Walk& later, Element* to) {
        const int slot = thread_index() % SLOTS, first = thread_index() / SLOTS;
        if (at.depth == 0) find(p, at, slot);
        if (later.t < place.end) write_table(p, place, later, 1 - now);
        const Element* from =
            static_cast<const Element*>(at.side == 0 ? p.g : p.x) + place.sample * (at.side == 0 ? p.g_n : p.x_n);
        const Tap* taps = table + now * Kind::BLOCK_DEPTH;
#pragma unroll
        for (int j = 0; j < MANY; ++j) {
            const int row = first + j * STEP;
            const Tap& tap = taps[row];
            if constexpr (BY_REGISTERS) {
                uint32_t pair = 0;
                if (inside(p, spot[0].corner, tap.reach)) pair = from[tap.x + spot[0].offset];
                if (inside(p, spot[1].corner, tap.reach)) pair |= uint32_t(from[tap.x + spot[1].offset]) << 16;
                kept[j] = pair;
            } else {
                const bool there = inside(p, spot[0].corner, tap.reach);
                copy_async<sizeof(Element)>(to + row * LINE + slot, there ? from + tap.x + spot[0].offset : from,
                                            there ? sizeof(Element) : 0);
            }
        }
        now = 1 - now;
    }

    // Puts what fetch left in registers where it was to go.
    FASTFIP_DEVICE void store(Element* to) {
        if constexpr (BY_REGISTERS) {
            const int slot = thread_index() % SLOTS, first = thread_index() / SLOTS;
#pragma unroll
            for (int j = 0; j < MANY; ++j) *reinterpret_cast<uint32_t*>(to + (first + j * STEP) * LINE + slot * EACH) = kept[j];
        }
    }
};

}  // namespace cuda
}  // namespace fastfip
