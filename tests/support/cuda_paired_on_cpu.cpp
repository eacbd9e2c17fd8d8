// The CUDA kernels of paired.h, run by cuda_on_cpu.h and called with ctypes. Compiled by tests/support/cuda_emulation.py.
#include "cuda_on_cpu.h"

#include "cuda_on_cpu_arguments.h"
#include "paired.h"

using namespace fastfip;
using namespace fastfip::cuda;

namespace {

template <class Kind, class Left, bool KNOWN, bool GRAM>
void blocks(const PairedProblem& p, int order) {
    typedef PairedLayout<Kind, Left, LoadLines<Kind, GRAM>> Memory;
    for (int64_t x = 0; x < p.tiles * p.groups * p.shares * p.samples; ++x)
        run_block(threads_of<Kind>, Memory::BYTES, x, 0, order, [&] { paired_block<Kind, Left, KNOWN, GRAM>(p); });
}

template <class Kind>
void run(const PairedProblem& p, bool rows, int order) {
    const bool known = !p.left.data || !p.right.data;
    if (rows && known) blocks<Kind, LoadPositionRows<Kind>, true, false>(p, order);
    if (rows && !known) blocks<Kind, LoadPositionRows<Kind>, false, false>(p, order);
    if (!rows && known) blocks<Kind, LoadPositions<Kind>, true, false>(p, order);
    if (!rows && !known) blocks<Kind, LoadPositions<Kind>, false, false>(p, order);
}

}  // namespace

// Returns what is wrong, or null. `rows` is told which loader ran.
extern "C" const char* spectral_grad_on_cpu(const int64_t* numbers, int order, int* rows) {
    Arguments n = {numbers};
    return words([&] {
        const Map g = n.map();
        const Lines u = n.lines();
        const Map x = n.map();
        const Lines v = n.lines();
        const Sizes sizes = n.sizes();
        const int64_t directions = n.number();
        const Type type = n.type();
        const bool exact = n.number() != 0;
        void* const parts = n.pointer();
        const PairedProblem p = paired_problem_of(operands_of(g, x, sizes, exact), u, v, directions, type, parts, n.number());
        *rows = paired_rows_are_aligned(p, type);
        if (type == Type::f32) run<Single>(p, *rows, order);
        if (type == Type::f64) run<Double>(p, *rows, order);
        if (type == Type::bf16) run<Half<true>>(p, *rows, order);
        if (type == Type::f16) run<Half<false>>(p, *rows, order);
    });
}

// The norms of grad_norm_squared by Gram matrices.
extern "C" const char* gram_norms_on_cpu(const int64_t* numbers, int order, int* rows) {
    Arguments n = {numbers};
    return words([&] {
        const Map g = n.map(), x = n.map();
        const Sizes sizes = n.sizes();
        const Type type = n.type();
        const bool exact = n.number() != 0;
        void* const parts = n.pointer();
        const PairedProblem p = gram_problem_of(operands_of(g, x, sizes, exact), type, parts, n.number());
        *rows = 1;
        if (type == Type::f32) blocks<Single, LoadPositionRows<Single>, false, true>(p, order);
        if (type == Type::f64) blocks<Double, LoadPositionRows<Double>, false, true>(p, order);
        if (type == Type::bf16) blocks<Half<true>, LoadPositionRows<Half<true>>, false, true>(p, order);
        if (type == Type::f16) blocks<Half<false>, LoadPositionRows<Half<false>>, false, true>(p, order);
    });
}

extern "C" int64_t paired_shares_on_cpu(int type, int64_t samples, int64_t positions, int64_t columns, int64_t groups, int processors) {
    return paired_shares(static_cast<Type>(type), samples, positions, columns, groups, processors);
}
