// The CUDA kernels of sum_grad_squared, run by cuda_on_cpu.h and called with ctypes. Compiled by test_cuda_on_cpu.py.
#include "cuda_on_cpu.h"

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

}  // namespace

// The numbers of fastfip.h in the order of the binding's arguments; returns what is wrong, or null. `rows` is told which loader ran.
extern "C" const char* cuda_on_cpu(const int64_t* n, int order, int* rows) {
    auto pointer = [](int64_t address) { return reinterpret_cast<void*>(address); };
    auto map = [&]() {
        Map m = {pointer(n[0]), n[1], n[2], n[3], {n[4], n[5], n[6]}};
        n += 7;
        return m;
    };
    const Map g = map(), x = map();
    Sizes sizes = {n[0], n[1], n[2], n[3], n[4], {}, {}, {}, {}, {}, {}};
    n += 5;
    for (int64_t* three : {sizes.positions, sizes.kernel, sizes.step, sizes.dilation, sizes.padding, sizes.size})
        for (int d = 0; d < 3; ++d) three[d] = *n++;
    const Type type = static_cast<Type>(n[0]);
    const Results results = {pointer(n[2]), pointer(n[3]), pointer(n[4]), n[5]};
    static char said[256];
    try {
        const Problem p = problem_of(g, x, sizes, type, n[1] != 0, results);
        *rows = rows_are_aligned(p, type);
        if (type == Type::f32) run<Single>(p, *rows, order);
        if (type == Type::f64) run<Double>(p, *rows, order);
        if (type == Type::bf16) run<Half<true>>(p, *rows, order);
        if (type == Type::f16) run<Half<false>>(p, *rows, order);
    } catch (const std::exception& error) {
        strncpy(said, error.what(), sizeof(said) - 1);
        return said;
    }
    return nullptr;
}

extern "C" int64_t cuda_shares(int type, int64_t samples, int64_t outputs, int64_t inputs, int64_t groups, int multiprocessors) {
    return shares_of(static_cast<Type>(type), samples, outputs, inputs, groups, multiprocessors);
}
