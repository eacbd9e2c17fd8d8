// AVX-512 (F, VL, BW, DQ): CMakeLists.txt compiles this file, and no other, with them.
#define FASTFIP_VECTOR_REGISTERS 32
#include "cpu/sum_grad_squared_grouped.h"
#include "cpu/sum_grad_squared_kernel.h"

namespace fastfip {
namespace {

template <class R>
Backend of(bool grouped) {
    typedef Kernel<R, 64 / sizeof(R)> Features;
    typedef Grouped<R, 64 / sizeof(R)> Groups;
    if (grouped) return {Groups::scratch_bytes, Groups::run, 64 / sizeof(R)};
    return {Features::scratch_bytes, Features::run, 64 / sizeof(R)};
}

}  // namespace

Backend sum_grad_squared_avx512(bool is_double, bool grouped) { return is_double ? of<double>(grouped) : of<float>(grouped); }

}  // namespace fastfip
