// The CUDA kernel of gram_apply, run by cuda_on_cpu.h and called with ctypes. Compiled by tests/support/cuda_emulation.py.
#include "cuda_on_cpu.h"

#include "cuda_on_cpu_arguments.h"
#include "gram_apply_kernel.h"

using namespace fastfip;
using namespace fastfip::cuda;

namespace {

template <class Kind>
void run(const GramProblem& p, int order) {
    for (int64_t x = 0; x < p.tiles_t * p.tiles_e * p.samples; ++x)
        run_block(threads_of<Kind>, GramLayout<Kind>::BYTES, x, 0, order, [&] { gram_apply_block<Kind>(p); });
}

}  // namespace

// Returns what is wrong, or null. There is one loader.
extern "C" const char* gram_apply_on_cpu(const int64_t* numbers, int order, int* rows) {
    Arguments n = {numbers};
    return words([&] {
        const Lines q = n.lines(), k = n.lines(), v = n.lines();
        const GramSizes sizes = {n.number(), n.number(), n.number(), n.number(), n.number()};
        const Type type = n.type();
        const bool exact = n.number() != 0;
        const GramProblem p = gram_apply_problem_of(q, k, v, sizes, type, exact, n.pointer());
        *rows = 1;
        if (type == Type::f32) run<Single>(p, order);
        if (type == Type::f64) run<Double>(p, order);
        if (type == Type::bf16) run<Half<true>>(p, order);
        if (type == Type::f16) run<Half<false>>(p, order);
    });
}
