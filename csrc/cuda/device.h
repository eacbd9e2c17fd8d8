// What the kernels ask of the device, for sm_80 and later: one name for each instruction, so that the tests can run the same
// kernels on a CPU (tests/support/cuda_on_cpu.h has the same names).
#pragma once

#include <stdint.h>

namespace fastfip {
namespace cuda {

#define FASTFIP_DEVICE __device__ __forceinline__

FASTFIP_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTFIP_DEVICE int64_t block_x() { return blockIdx.x; }
FASTFIP_DEVICE int64_t block_y() { return blockIdx.y; }
FASTFIP_DEVICE void barrier() { __syncthreads(); }

FASTFIP_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

FASTFIP_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Asynchronous copy of 4, 8 or 16 bytes from global to shared memory; the last SIZE - bytes of them are zeros.
template <int SIZE>
FASTFIP_DEVICE void copy_async(void* shared, const void* global, int bytes) {
    if constexpr (SIZE == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(SIZE),
                     "r"(bytes)
                     : "memory");
}

FASTFIP_DEVICE void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of the groups of copies are still on their way.
template <int PENDING>
FASTFIP_DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8.
template <bool TRANSPOSED>
FASTFIP_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
}

// c [16, 8] += a [16, K] b [K, 8]: K = 16 for 16-bit numbers, 8 for TF32.
template <bool BFLOAT16>
FASTFIP_DEVICE void multiply_16bit(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (BFLOAT16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FASTFIP_DEVICE void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c [8, 8] += a [8, 4] b [4, 8]
FASTFIP_DEVICE void multiply_f64(double& c0, double& c1, double a, double b) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+d"(c0), "+d"(c1)
                 : "d"(a), "d"(b));
}

// The nearest number of 11 significant bits, as the tensor cores read it.
FASTFIP_DEVICE uint32_t to_tf32(float x) {
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

FASTFIP_DEVICE float as_float(uint32_t x) { return __uint_as_float(x); }

FASTFIP_DEVICE float float16_value(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// What the lane of the warp has whose number differs in the bits of `mask`.
template <class T>
FASTFIP_DEVICE T of_other_lane(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

}  // namespace cuda
}  // namespace fastfip
