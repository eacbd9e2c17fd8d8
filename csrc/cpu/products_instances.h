// The kernels for vectors of one width. Like the kernels, it is included once by the file of each instruction set, which defines
// FASTFIP_VECTOR_REGISTERS first.
#pragma once

#include "cpu/products_grouped.h"
#include "cpu/products_kernel.h"

namespace fastfip {
namespace {

template <class R, int Bytes>
Backend instance(bool grouped) {
    constexpr int lanes = Bytes / sizeof(R);
    typedef Kernel<R, lanes> Features;
    typedef Grouped<R, lanes> Groups;
    if (grouped) return {Groups::scratch_bytes, Groups::run, lanes};
    return {Features::scratch_bytes, Features::run, lanes};
}

template <int Bytes>
Backend instance(Kind kind) {
    return kind.is_double ? instance<double, Bytes>(kind.grouped) : instance<float, Bytes>(kind.grouped);
}

}  // namespace
}  // namespace fastfip
