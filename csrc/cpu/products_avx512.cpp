// AVX-512 (F, VL, BW, DQ): CMakeLists.txt compiles this file, and no other, with them.
#define FASTFIP_VECTOR_REGISTERS 32
#include "cpu/products_instances.h"

namespace fastfip {

Backend products_avx512(Kind kind) { return instance<64>(kind); }

}  // namespace fastfip
