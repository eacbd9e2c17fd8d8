// The whole native API of fastfip: raw pointers, int64 sizes, strides counted in elements. No Python, no torch.
#pragma once

#include <cstdint>

namespace fastfip {

// Instruction sets that kernels are compiled for, in rising order; which one runs is decided at run time.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best instruction set that this CPU and its operating system offer.
Isa best_isa();

}  // namespace fastfip
