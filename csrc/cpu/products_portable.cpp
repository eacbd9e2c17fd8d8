// What every CPU of this architecture has: 128-bit vectors.
#if defined(__aarch64__)
#define FASTFIP_VECTOR_REGISTERS 32
#else
#define FASTFIP_VECTOR_REGISTERS 16
#endif
#include "cpu/products_instances.h"

namespace fastfip {

Backend products_portable(Kind kind) { return instance<16>(kind); }

}  // namespace fastfip
