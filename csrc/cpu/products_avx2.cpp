// AVX2 and FMA: CMakeLists.txt compiles this file, and no other, with them.
#define FASTFIP_VECTOR_REGISTERS 16
#include "cpu/products_instances.h"

namespace fastfip {

Backend products_avx2(Kind kind) { return instance<32>(kind); }

}  // namespace fastfip
