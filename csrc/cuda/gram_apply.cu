// Instances and launches of the CUDA gram_apply; see gram_apply_kernel.h for how it works, fastfip.h for the contract.
#include "device.h"

#include "gram_apply_kernel.h"

#include "device_guard.h"

namespace fastfip {
namespace cuda {
namespace {

// Sums of the result and of the Gram matrix fill the registers of one large block, or of two small ones.
template <class Kind>
__global__ void __launch_bounds__(threads_of<Kind>, 256 / threads_of<Kind>) gram_apply_kernel(const __grid_constant__ GramProblem p) {
    gram_apply_block<Kind>(p);
}

template <class Kind>
void run(const GramProblem& p, cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(p.tiles_t * p.tiles_e * p.samples);
    gram_apply_kernel<Kind><<<blocks, threads_of<Kind>, GramLayout<Kind>::BYTES, stream>>>(p);
    check(cudaGetLastError(), "gram_apply");
}

}  // namespace

void gram_apply(const Lines& q, const Lines& k, const Lines& v, const GramSizes& sizes, Type type, bool exact, void* out,
                const Place& place) {
    const GramProblem p = gram_apply_problem_of(q, k, v, sizes, type, exact, out);
    const DeviceGuard guard(place.device);
    const cudaStream_t stream = reinterpret_cast<cudaStream_t>(place.stream);
    if (type == Type::f32) return run<Single>(p, stream);
    if (type == Type::f64) return run<Double>(p, stream);
    if (type == Type::bf16) return run<Half<true>>(p, stream);
    return run<Half<false>>(p, stream);
}

}  // namespace cuda
}  // namespace fastfip
