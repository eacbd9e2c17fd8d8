// AVX-512 (F, VL, BW, DQ): CMakeLists.txt compiles this file, and no other, with them.
#define FASTFIP_VECTOR_REGISTERS 32
#include "cpu/products_instances.h"
#include "cpu/spectral_grad_kernel.h"

namespace fastfip {

Backend products_avx512(Kind kind) { return instance<64>(kind); }

SpectralBackend spectral_avx512(bool is_double, bool lanes_are_positions) {
    return spectral_instance<64>(is_double, lanes_are_positions);
}

}  // namespace fastfip
