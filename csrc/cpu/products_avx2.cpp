// AVX2 and FMA: CMakeLists.txt compiles this file, and no other, with them.
#define FASTFIP_VECTOR_REGISTERS 16
#include "cpu/products_instances.h"
#include "cpu/spectral_grad_kernel.h"

namespace fastfip {

Backend products_avx2(Kind kind) { return instance<32>(kind); }

SpectralBackend spectral_avx2(bool is_double, bool lanes_are_positions) {
    return spectral_instance<32>(is_double, lanes_are_positions);
}

}  // namespace fastfip
