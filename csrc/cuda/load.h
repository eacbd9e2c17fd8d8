// How a block's share of the operands, BLOCK_DEPTH positions at a time, comes to shared memory: asynchronously, zeros beyond every
// edge. Include device.h (or the tests' cuda_on_cpu.h) before.
#pragma once

#include <stdint.h>

#include "problem.h"
#include "types.h"

namespace fastfip {
namespace cuda {

// A position beyond the last one, and a feature beyond the last one, lie so far outside the map that the sum of both does too.
constexpr int OUTSIDE = -(1 << 30);

// Where a position lies: offsets in the sample's g and x, and its window's first corner in the map.
struct Position {
    int64_t g, x;
    int corner[3];
};

FASTFIP_DEVICE Position place_of(const Operands& p, int t) {
    Position at;
    if (t >= p.positions) return {0, 0, {OUTSIDE, OUTSIDE, OUTSIDE}};
    int where[3];
    for (int d = 2; d > 0; --d) where[d] = t % p.position[d], t /= p.position[d];
    where[0] = t % p.position[0];
    const int frame = t / p.position[0];
    at.g = frame * p.g_frame;
    at.x = frame * p.x_frame;
    for (int d = 0; d < 3; ++d) {
        at.corner[d] = where[d] * p.step[d] - p.padding[d];
        at.g += where[d] * p.g_at[d];
        at.x += at.corner[d] * p.x_at[d];  // negative in the padding, where nothing is read
    }
    return at;
}

// Where an input feature (channel, kernel position) lies relative to a window's corner.
struct Tap {
    int64_t x;
    int reach[3];
};

FASTFIP_DEVICE Tap tap_of(const Operands& p, int64_t group, int64_t i) {
    Tap tap;
    if (i >= p.inputs) return {0, {OUTSIDE, OUTSIDE, OUTSIDE}};
    int64_t rest = i;
    tap.x = 0;
    for (int d = 2; d >= 0; --d) {
        tap.reach[d] = static_cast<int>(rest % p.kernel[d]) * p.dilation[d];
        rest /= p.kernel[d];
        tap.x += tap.reach[d] * p.x_at[d];
    }
    tap.x += (group * p.channels + rest) * p.x_c;
    return tap;
}

FASTFIP_DEVICE bool inside(const Operands& p, const int (&corner)[3], const int (&reach)[3]) {
    return static_cast<unsigned>(corner[0] + reach[0]) < static_cast<unsigned>(p.size[0]) &&
           static_cast<unsigned>(corner[1] + reach[1]) < static_cast<unsigned>(p.size[1]) &&
           static_cast<unsigned>(corner[2] + reach[2]) < static_cast<unsigned>(p.size[2]);
}

// What every loader knows: its block's tile, and where the next positions to load are.
template <class Kind>
struct Cursor {
    int64_t sample;
    int t;

    FASTFIP_DEVICE void next(const Operands& p) {
        t += Kind::BLOCK_DEPTH;
        if (t >= p.positions) t = 0, ++sample;
    }
};

// Copies LINES lines of NUMBERS numbers, 16 bytes at a time; zeros beyond the first `lines` lines and `numbers` numbers.
template <int THREADS, int LINES, int NUMBERS, int LINE, class Element>
FASTFIP_DEVICE void copy_lines(const Element* from, int64_t stride, int64_t numbers, int64_t lines, Element* to) {
    constexpr int EACH = 16 / sizeof(Element), CHUNKS = NUMBERS / EACH, STEP = THREADS / CHUNKS;
    static_assert(LINES % STEP == 0 || STEP > LINES, "every thread that copies at all copies equally much");
    const int f = thread_index() % CHUNKS * EACH, line = thread_index() / CHUNKS;
    if (STEP > LINES && line >= LINES) return;
    const int64_t valid = numbers - f;
    const int bytes = valid < 0 ? 0 : (valid > EACH ? EACH : static_cast<int>(valid)) * static_cast<int>(sizeof(Element));
    const Element* row = from + line * stride + f;
    to += line * LINE + f;
#pragma unroll
    for (int j = 0; j < LINES; j += STEP) {
        const bool there = line + j < lines && bytes > 0;
        copy_async<16>(to + j * LINE, there ? row : from, there ? bytes : 0);
        row += STEP * stride;
    }
}

// Operands whose features follow each other in memory and are aligned to 16 bytes: shared memory is [position, feature].
template <class Kind>
struct LoadRows {
    typedef typename Kind::Element Element;
    static constexpr bool DEPTH_FIRST = true;
    static constexpr int STAGES = Kind::STAGES, THREADS = threads_of<Kind>;
    static constexpr int G_LINE = Kind::ROWS + Kind::PAD, X_LINE = Kind::COLUMNS + Kind::PAD;
    static constexpr int G_NUMBERS = G_LINE * Kind::BLOCK_DEPTH, X_NUMBERS = X_LINE * Kind::BLOCK_DEPTH;
    static constexpr int TABLE_BYTES = 0;

    int64_t first_o, first_i;

    FASTFIP_DEVICE LoadRows(const Operands&, char*, int64_t, int64_t o, int64_t i) : first_o(o), first_i(i) {}

    FASTFIP_DEVICE void fetch(const Operands& p, const Cursor<Kind>& at, Element* g_to, Element* x_to) {
        const Element* g = static_cast<const Element*>(p.g) + at.sample * p.g_n + at.t * p.g_at[2] + first_o;
        const Element* x = static_cast<const Element*>(p.x) + at.sample * p.x_n + at.t * p.x_at[2] + first_i;
        const int64_t left = p.positions - at.t;
        copy_lines<THREADS, Kind::BLOCK_DEPTH, Kind::ROWS, G_LINE>(g, p.g_at[2], p.outputs - first_o, left, g_to);
        copy_lines<THREADS, Kind::BLOCK_DEPTH, Kind::COLUMNS, X_LINE>(x, p.x_at[2], p.inputs - first_i, left, x_to);
    }

    FASTFIP_DEVICE void store(Element*, Element*) {}
};

// Any strides, and the windows of a convolution: shared memory is [feature, position]. A thread keeps its positions and walks
// over features, whose offsets wait in a table. 16-bit numbers are too small for asynchronous copies: they pass through
// registers, loaded before the products of the positions before them and stored after.
template <class Kind>
struct LoadWindows {
    typedef typename Kind::Element Element;
    static constexpr bool DEPTH_FIRST = false, BY_REGISTERS = sizeof(Element) == 2;
    static constexpr int STAGES = 2, THREADS = threads_of<Kind>;
    static constexpr int G_LINE = Kind::BLOCK_DEPTH + Kind::PAD_DEPTH, X_LINE = G_LINE;
    static constexpr int G_NUMBERS = G_LINE * Kind::ROWS, X_NUMBERS = X_LINE * Kind::COLUMNS;
    static constexpr int EACH = BY_REGISTERS ? 2 : 1, SLOTS = Kind::BLOCK_DEPTH / EACH, STEP = THREADS / SLOTS;
    static constexpr int G_ROWS = Kind::ROWS / STEP, X_ROWS = Kind::COLUMNS / STEP;
    static constexpr int TABLE_BYTES = Kind::ROWS * 8 + Kind::COLUMNS * static_cast<int>(sizeof(Tap));

    int64_t* g_table;  // offset of an output feature, -1 beyond the last one
    Tap* x_table;
    uint32_t g_kept[BY_REGISTERS ? G_ROWS : 1], x_kept[BY_REGISTERS ? X_ROWS : 1];

    FASTFIP_DEVICE LoadWindows(const Operands& p, char* table, int64_t group, int64_t first_o, int64_t first_i) {
        x_table = reinterpret_cast<Tap*>(table);
        g_table = reinterpret_cast<int64_t*>(x_table + Kind::COLUMNS);
        for (int f = thread_index(); f < Kind::ROWS; f += THREADS)
            g_table[f] = first_o + f < p.outputs ? (group * p.outputs + first_o + f) * p.g_o : -1;
        for (int f = thread_index(); f < Kind::COLUMNS; f += THREADS) x_table[f] = tap_of(p, group, first_i + f);
        barrier();
    }

    FASTFIP_DEVICE void fetch(const Operands& p, const Cursor<Kind>& at, Element* g_to, Element* x_to) {
        const Element* g = static_cast<const Element*>(p.g) + at.sample * p.g_n;
        const Element* x = static_cast<const Element*>(p.x) + at.sample * p.x_n;
        const int slot = thread_index() % SLOTS, first = thread_index() / SLOTS;
        Position place[EACH];
#pragma unroll
        for (int e = 0; e < EACH; ++e) place[e] = place_of(p, at.t + slot * EACH + e);
#pragma unroll
        for (int j = 0; j < G_ROWS; ++j) {
            const int row = first + j * STEP;
            const int64_t offset = g_table[row];
            if constexpr (BY_REGISTERS) {
                uint32_t pair = 0;
                if (offset >= 0 && place[0].corner[0] > OUTSIDE) pair = g[offset + place[0].g];
                if (offset >= 0 && place[1].corner[0] > OUTSIDE) pair |= uint32_t(g[offset + place[1].g]) << 16;
                g_kept[j] = pair;
            } else {
                const bool there = offset >= 0 && place[0].corner[0] > OUTSIDE;
                copy_async<sizeof(Element)>(g_to + row * G_LINE + slot, there ? g + offset + place[0].g : g,
                                            there ? sizeof(Element) : 0);
            }
        }
#pragma unroll
        for (int j = 0; j < X_ROWS; ++j) {
            const int row = first + j * STEP;
            const Tap& tap = x_table[row];
            if constexpr (BY_REGISTERS) {
                uint32_t pair = 0;
                if (inside(p, place[0].corner, tap.reach)) pair = x[tap.x + place[0].x];
                if (inside(p, place[1].corner, tap.reach)) pair |= uint32_t(x[tap.x + place[1].x]) << 16;
                x_kept[j] = pair;
            } else {
                const bool there = inside(p, place[0].corner, tap.reach);
                copy_async<sizeof(Element)>(x_to + row * X_LINE + slot, there ? x + tap.x + place[0].x : x,
                                            there ? sizeof(Element) : 0);
            }
        }
    }

    // Puts what fetch left in registers where it was to go.
    FASTFIP_DEVICE void store(Element* g_to, Element* x_to) {
        if constexpr (BY_REGISTERS) {
            const int slot = thread_index() % SLOTS, first = thread_index() / SLOTS;
#pragma unroll
            for (int j = 0; j < G_ROWS; ++j)
                *reinterpret_cast<uint32_t*>(g_to + (first + j * STEP) * G_LINE + slot * EACH) = g_kept[j];
#pragma unroll
            for (int j = 0; j < X_ROWS; ++j)
                *reinterpret_cast<uint32_t*>(x_to + (first + j * STEP) * X_LINE + slot * EACH) = x_kept[j];
        }
    }
};

}  // namespace cuda
}  // namespace fastfip
