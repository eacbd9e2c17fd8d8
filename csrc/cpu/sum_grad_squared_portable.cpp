// What every CPU of this architecture has: 128-bit vectors.
#if defined(__aarch64__)
#define FASTFIP_VECTOR_REGISTERS 32
#else
#define FASTFIP_VECTOR_REGISTERS 16
#endif
#include "cpu/sum_grad_squared_grouped.h"
#include "cpu/sum_grad_squared_kernel.h"

namespace fastfip {
namespace {

template <class R, bool Norms>
Backend of(bool grouped) {
    constexpr int lanes = 16 / sizeof(R);
    typedef Kernel<R, lanes, Exact<R>, Norms> Features;
    typedef Grouped<R, lanes, Norms> Groups;
    if (grouped) return {Groups::scratch_bytes, Groups::run, lanes};
    return {Features::scratch_bytes, Features::run, lanes};
}

}  // namespace

Backend sum_grad_squared_portable(Kind kind) {
    if (kind.norms) return kind.is_double ? of<double, true>(kind.grouped) : of<float, true>(kind.grouped);
    return kind.is_double ? of<double, false>(kind.grouped) : of<float, false>(kind.grouped);
}

}  // namespace fastfip
