// Instances and launches of the CUDA sum_grad_squared; see sum_grad_squared_kernel.h for how it works, fastfip.h for the contract.
#include "device.h"

#include "sum_grad_squared_kernel.h"

#include "device_guard.h"

namespace fastfip {
namespace cuda {
namespace {

template <class Kind, class Load, bool GRADIENT>
__global__ void __launch_bounds__(threads_of<Kind>, Kind::BLOCKS[GRADIENT])
    sum_grad_squared_kernel(const __grid_constant__ Problem p) {
    sum_grad_squared_block<Kind, Load, GRADIENT>(p);
}

template <class Sum>
__global__ void add_shares_kernel(Sum* result, const Sum* parts, int64_t numbers, int64_t shares) {
    add_shares_block(result, parts, numbers, shares);
}

template <class Kind, class Load>
void launch(const Problem& p, cudaStream_t stream) {
    typedef Layout<Kind, Load> Memory;
    const dim3 blocks(static_cast<unsigned>(p.tiles_o * p.tiles_i * p.groups), static_cast<unsigned>(p.shares));
    if (p.grad)
        sum_grad_squared_kernel<Kind, Load, true><<<blocks, Memory::THREADS, Memory::BYTES, stream>>>(p);
    else
        sum_grad_squared_kernel<Kind, Load, false><<<blocks, Memory::THREADS, Memory::BYTES, stream>>>(p);
    check(cudaGetLastError(), "sum_grad_squared");
}

template <class Sum>
void add_shares(const Problem& p, cudaStream_t stream) {
    const int64_t numbers = p.groups * p.outputs * p.inputs;
    const dim3 blocks(static_cast<unsigned>(divide_up(numbers, 256)));
    add_shares_kernel<<<blocks, 256, 0, stream>>>(static_cast<Sum*>(p.out), static_cast<const Sum*>(p.part_out), numbers, p.shares);
    if (p.grad)
        add_shares_kernel<<<blocks, 256, 0, stream>>>(static_cast<Sum*>(p.grad), static_cast<const Sum*>(p.part_grad), numbers,
                                                      p.shares);
    check(cudaGetLastError(), "sum_grad_squared (shares)");
}

template <class Kind>
void run(const Problem& p, bool rows, cudaStream_t stream) {
    if (rows)
        launch<Kind, LoadRows<Kind>>(p, stream);
    else
        launch<Kind, LoadWindows<Kind>>(p, stream);
    if (p.shares > 1) add_shares<typename Kind::Sum>(p, stream);
}

}  // namespace

void sum_grad_squared(const Map& g, const Map& x, const Sizes& sizes, Type type, bool exact, const Results& results,
                      const Place& place) {
    const Problem p = problem_of(g, x, sizes, type, exact, results);
    const DeviceGuard guard(place.device);
    const cudaStream_t stream = reinterpret_cast<cudaStream_t>(place.stream);
    const bool rows = rows_are_aligned(p, type);
    if (type == Type::f32) return run<Single>(p, rows, stream);
    if (type == Type::f64) return run<Double>(p, rows, stream);
    if (type == Type::bf16) return run<Half<true>>(p, rows, stream);
    return run<Half<false>>(p, rows, stream);
}

}  // namespace cuda
}  // namespace fastfip
