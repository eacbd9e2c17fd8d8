// The CUDA kernels of weight_gradient.h, run by cuda_on_cpu.h and called with ctypes. Compiled by cuda_emulation.py.
#include "cuda_on_cpu.h"

#include "cuda_on_cpu_arguments.h"
#include "grad_norm_squared_kernel.h"
#include "sum_grad_squared_kernel.h"

using namespace fastfip;
using namespace fastfip::cuda;

namespace {

template <class Kind, class Load, bool GRADIENT>
void blocks(const Problem& p, int order) {
    typedef Layout<Kind, Load> Memory;
    for (int64_t y = 0; y < p.shares; ++y)
        for (int64_t x = 0; x < p.tiles_o * p.tiles_i * p.groups; ++x)
            run_block(Memory::THREADS, Memory::BYTES, x, y, order, [&] { sum_grad_squared_block<Kind, Load, GRADIENT>(p); });
}

template <class Sum>
void shares(void* result, const void* parts, const Problem& p) {
    const int64_t numbers = p.groups * p.outputs * p.inputs;
    for (int64_t x = 0; x < divide_up(numbers, 256); ++x)
        run_block(256, 16, x, 0, 0, [&] {
            add_shares_block(static_cast<Sum*>(result), static_cast<const Sum*>(parts), numbers, p.shares);
        });
}

template <class Kind>
void run(const Problem& p, bool rows, int order) {
    if (rows && p.grad) blocks<Kind, LoadRows<Kind>, true>(p, order);
    if (rows && !p.grad) blocks<Kind, LoadRows<Kind>, false>(p, order);
    if (!rows && p.grad) blocks<Kind, LoadWindows<Kind>, true>(p, order);
    if (!rows && !p.grad) blocks<Kind, LoadWindows<Kind>, false>(p, order);
    if (p.shares < 2) return;
    shares<typename Kind::Sum>(p.out, p.part_out, p);
    if (p.grad) shares<typename Kind::Sum>(p.grad, p.part_grad, p);
}

template <class Kind, class Load>
void norm_blocks(const Problem& p, int order) {
    typedef Layout<Kind, Load> Memory;
    for (int64_t y = 0; y < p.shares; ++y)
        for (int64_t x = 0; x < p.tiles_o * p.tiles_i * p.groups; ++x)
            run_block(Memory::THREADS, Memory::BYTES, x, y, order, [&] { grad_norm_squared_block<Kind, Load>(p); });
}

template <class Kind>
void run_norms(const Problem& p, bool rows, int order) {
    if (rows) norm_blocks<Kind, LoadRows<Kind>>(p, order);
    if (!rows) norm_blocks<Kind, LoadWindows<Kind>>(p, order);
}

}  // namespace

// Returns what is wrong, or null. `rows` is told which loader ran.
extern "C" const char* cuda_on_cpu(const int64_t* numbers, int order, int* rows) {
    Arguments n = {numbers};
    return words([&] {
        const Map g = n.map(), x = n.map();
        const Sizes sizes = n.sizes();
        const Type type = n.type();
        const bool exact = n.number() != 0;
        void *const out = n.pointer(), *const grad = n.pointer(), *const room = n.pointer();
        const Problem p = problem_of(g, x, sizes, type, exact, {out, grad, room, n.number()});
        *rows = rows_are_aligned(p, type);
        if (type == Type::f32) run<Single>(p, *rows, order);
        if (type == Type::f64) run<Double>(p, *rows, order);
        if (type == Type::bf16) run<Half<true>>(p, *rows, order);
        if (type == Type::f16) run<Half<false>>(p, *rows, order);
    });
}

extern "C" const char* grad_norm_squared_on_cpu(const int64_t* numbers, int order, int* rows) {
    Arguments n = {numbers};
    return words([&] {
        const Map g = n.map(), x = n.map();
        const Sizes sizes = n.sizes();
        const Type type = n.type();
        const bool exact = n.number() != 0;
        void* const parts = n.pointer();
        const Problem p = problem_of(g, x, sizes, type, exact, {parts, nullptr, nullptr, n.number()});
        *rows = rows_are_aligned(p, type);
        if (type == Type::f32) run_norms<Single>(p, *rows, order);
        if (type == Type::f64) run_norms<Double>(p, *rows, order);
        if (type == Type::bf16) run_norms<Half<true>>(p, *rows, order);
        if (type == Type::f16) run_norms<Half<false>>(p, *rows, order);
    });
}

extern "C" int64_t norm_warps(int type) { return tile_of(static_cast<Type>(type)).threads / 32; }

extern "C" int64_t cuda_shares(int type, int64_t samples, int64_t outputs, int64_t inputs, int64_t groups, int multiprocessors) {
    return shares_of(static_cast<Type>(type), samples, outputs, inputs, groups, multiprocessors);
}
