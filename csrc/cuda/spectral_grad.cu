// Instances and launches of the CUDA spectral_grad; see paired.h for how it works, fastfip.h for the contract.
#include "device.h"

#include "paired.h"

#include "device_guard.h"

namespace fastfip {
namespace cuda {
namespace {

template <class Kind, class Left, bool KNOWN>
__global__ void __launch_bounds__(threads_of<Kind>, Kind::BLOCKS[Left::DEPTH_FIRST])
    spectral_grad_kernel(const __grid_constant__ PairedProblem p) {
    paired_block<Kind, Left, KNOWN, false>(p);
}

template <class Kind, class Left>
void launch(const PairedProblem& p, cudaStream_t stream) {
    typedef PairedLayout<Kind, Left, LoadLines<Kind, false>> Memory;
    const unsigned blocks = static_cast<unsigned>(p.tiles * p.groups * p.shares * p.samples);
    if (p.left.data && p.right.data)
        spectral_grad_kernel<Kind, Left, false><<<blocks, threads_of<Kind>, Memory::BYTES, stream>>>(p);
    else
        spectral_grad_kernel<Kind, Left, true><<<blocks, threads_of<Kind>, Memory::BYTES, stream>>>(p);
    check(cudaGetLastError(), "spectral_grad");
}

template <class Kind>
void run(const PairedProblem& p, bool rows, cudaStream_t stream) {
    if (rows)
        launch<Kind, LoadPositionRows<Kind>>(p, stream);
    else
        launch<Kind, LoadPositions<Kind>>(p, stream);
}

}  // namespace

void spectral_grad(const Map& g, const Lines& u, const Map& x, const Lines& v, const Sizes& sizes, int64_t directions, Type type,
                   bool exact, void* parts, int64_t shares, const Place& place) {
    const PairedProblem p = paired_problem_of(operands_of(g, x, sizes, exact), u, v, directions, type, parts, shares);
    const DeviceGuard guard(place.device);
    const cudaStream_t stream = reinterpret_cast<cudaStream_t>(place.stream);
    const bool rows = paired_rows_are_aligned(p, type);
    if (type == Type::f32) return run<Single>(p, rows, stream);
    if (type == Type::f64) return run<Double>(p, rows, stream);
    if (type == Type::bf16) return run<Half<true>>(p, rows, stream);
    return run<Half<false>>(p, rows, stream);
}

}  // namespace cuda
}  // namespace fastfip
