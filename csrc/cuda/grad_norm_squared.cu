// Instances and launches of the CUDA grad_norm_squared; see weight_gradient.h and paired.h for how it works, fastfip.h for the
// contract.
#include "device.h"

#include "grad_norm_squared_kernel.h"
#include "paired.h"

#include "device_guard.h"

namespace fastfip {
namespace cuda {
namespace {

template <class Kind, class Load>
__global__ void __launch_bounds__(threads_of<Kind>, Kind::BLOCKS[0])
    grad_norm_squared_kernel(const __grid_constant__ Problem p) {
    grad_norm_squared_block<Kind, Load>(p);
}

template <class Kind>
__global__ void __launch_bounds__(threads_of<Kind>, Kind::BLOCKS[0])
    grad_norm_squared_gram_kernel(const __grid_constant__ PairedProblem p) {
    paired_block<Kind, LoadPositionRows<Kind>, false, true>(p);
}

template <class Kind, class Load>
void launch(const Problem& p, cudaStream_t stream) {
    const dim3 blocks(static_cast<unsigned>(p.tiles_o * p.tiles_i * p.groups), static_cast<unsigned>(p.shares));
    grad_norm_squared_kernel<Kind, Load><<<blocks, threads_of<Kind>, Layout<Kind, Load>::BYTES, stream>>>(p);
    check(cudaGetLastError(), "grad_norm_squared");
}

template <class Kind>
void run(const Problem& p, bool rows, cudaStream_t stream) {
    if (rows)
        launch<Kind, LoadRows<Kind>>(p, stream);
    else
        launch<Kind, LoadWindows<Kind>>(p, stream);
}

template <class Kind>
void run_gram(const PairedProblem& p, cudaStream_t stream) {
    typedef PairedLayout<Kind, LoadPositionRows<Kind>, LoadLines<Kind, true>> Memory;
    const unsigned blocks = static_cast<unsigned>(p.tiles * p.shares * p.samples);
    grad_norm_squared_gram_kernel<Kind><<<blocks, threads_of<Kind>, Memory::BYTES, stream>>>(p);
    check(cudaGetLastError(), "grad_norm_squared (Gram)");
}

}  // namespace

void grad_norm_squared(const Map& g, const Map& x, const Sizes& sizes, Type type, bool exact, bool gram, void* parts,
                       int64_t shares, const Place& place) {
    const cudaStream_t stream = reinterpret_cast<cudaStream_t>(place.stream);
    if (gram) {
        const PairedProblem p = gram_problem_of(operands_of(g, x, sizes, exact), type, parts, shares);
        const DeviceGuard guard(place.device);
        if (type == Type::f32) return run_gram<Single>(p, stream);
        if (type == Type::f64) return run_gram<Double>(p, stream);
        if (type == Type::bf16) return run_gram<Half<true>>(p, stream);
        return run_gram<Half<false>>(p, stream);
    }
    const Problem p = problem_of(g, x, sizes, type, exact, {parts, nullptr, nullptr, shares});
    const DeviceGuard guard(place.device);
    const bool rows = rows_are_aligned(p, type);
    if (type == Type::f32) return run<Single>(p, rows, stream);
    if (type == Type::f64) return run<Double>(p, rows, stream);
    if (type == Type::bf16) return run<Half<true>>(p, rows, stream);
    return run<Half<false>>(p, rows, stream);
}

}  // namespace cuda
}  // namespace fastfip
