// The kernels for vectors of one width. Like the kernels, it is included once by the file of each instruction set, which defines
// FASTFIP_VECTOR_REGISTERS first.
#pragma once

#include "cpu/products_grouped.h"
#include "cpu/products_kernel.h"

namespace fastfip {
namespace {

template <class R, int Bytes, bool Norms>
Backend instance(bool grouped) {
    constexpr int lanes = Bytes / sizeof(R);
    typedef Kernel<R, lanes, Exact<R>, Norms> Features;
    typedef Grouped<R, lanes, Norms> Groups;
    if (grouped) return {Groups::scratch_bytes, Groups::run, lanes};
    return {Features::scratch_bytes, Features::run, lanes};
}

template <int Bytes, bool Norms>
Backend instance(Kind kind) {
    return kind.is_double ? instance<double, Bytes, Norms>(kind.grouped) : instance<float, Bytes, Norms>(kind.grouped);
}

template <int Bytes>
Backend instance(Kind kind) {
    return kind.norms ? instance<Bytes, true>(kind) : instance<Bytes, false>(kind);
}

}  // namespace
}  // namespace fastfip
