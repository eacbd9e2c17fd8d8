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

template <class R>
Backend of(bool grouped) {
    typedef Kernel<R, 16 / sizeof(R)> Features;
    typedef Grouped<R, 16 / sizeof(R)> Groups;
    if (grouped) return {Groups::scratch_bytes, Groups::run, 16 / sizeof(R)};
    return {Features::scratch_bytes, Features::run, 16 / sizeof(R)};
}

}  // namespace

Backend sum_grad_squared_portable(bool is_double, bool grouped) { return is_double ? of<double>(grouped) : of<float>(grouped); }

}  // namespace fastfip
