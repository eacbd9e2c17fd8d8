// What every CPU of this architecture has: 128-bit vectors.
#if defined(__aarch64__)
#define FASTFIP_VECTOR_REGISTERS 32
#else
#define FASTFIP_VECTOR_REGISTERS 16
#endif
#include "cpu/products_instances.h"
#include "cpu/spectral_grad_kernel.h"

namespace fastfip {

Backend products_portable(Kind kind) { return instance<16>(kind); }

SpectralBackend spectral_portable(bool is_double, bool lanes_are_positions) {
    return spectral_instance<16>(is_double, lanes_are_positions);
}

}  // namespace fastfip
