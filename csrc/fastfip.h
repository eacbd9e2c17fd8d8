// The whole native API of fastfip: raw pointers, int64 sizes, strides counted in elements. No Python, no torch.
#pragma once

#include <stdint.h>

namespace fastfip {

// Instruction sets that kernels are compiled for, in rising order; which one runs is decided at run time.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best instruction set that this CPU and its operating system offer.
Isa best_isa();

enum class Type : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// x[n, t, f] as it lies in memory; any strides.
struct Matrix {
    const void* data;
    Type type;
    int64_t stride_n, stride_t, stride_f;
};

// A feature map [N, C, D, H, W] read through the windows of a convolution (axes that a 1-d or 2-d one lacks have size 1):
// a[n, t, i] with t the output position (z, y, x) and i the channel and the position in the kernel (c, z, y, x).
struct Windows {
    const void* data;
    Type type;
    int64_t stride_n, stride_c, stride[3];
    int64_t channels;         // of one group
    int64_t padded[3];        // size of each axis with its padding
    const int64_t* source[3]; // for each padded index the index in the map, or -1 for a zero: any padding mode
    int64_t kernel[3], step[3], dilation[3], positions[3];
};

// Sum of the squared per-sample weight gradients, and the weight gradient itself:
//     out[o,i] += sum_n (sum_t g[n,t,o] a[n,t,i])^2        grad[o,i] += sum_n sum_t g[n,t,o] a[n,t,i]   (grad may be null)
// out and grad are contiguous, double when `is_double` and float otherwise; the sums are of that type. `isa` must not be above
// best_isa(). Threads split the result, so the numbers do not depend on how many there are.
struct Options {
    bool is_double;
    bool bf16;  // round the operands to bfloat16 (AVX512_BF16 only; not where groups are lanes); sums and squares stay float
    int threads;
    Isa isa;
};

void sum_grad_squared(const Matrix& g, const Matrix& a, int64_t samples, int64_t positions, int64_t outputs, int64_t inputs,
                      void* out, void* grad, const Options& options);

// The same for a convolution; `outputs` counts all groups, out is [outputs, channels of a group * kernel size].
void sum_grad_squared_windows(const Matrix& g, const Windows& a, int64_t samples, int64_t outputs, int64_t groups, void* out,
                              void* grad, const Options& options);

// The squared norm of each sample's weight gradient, and that gradient itself:
//     norms[n] += sum_oi (G_n[o,i])^2        product[n,o,i] = G_n[o,i] = sum_t g[n,t,o] a[n,t,i]   (product may be null)
// product is of the type of the sums, contiguous; nothing is written where there are no positions.
void grad_norm_squared(const Matrix& g, const Matrix& a, int64_t samples, int64_t positions, int64_t outputs, int64_t inputs,
                       double* norms, void* product, const Options& options);

void grad_norm_squared_windows(const Matrix& g, const Windows& a, int64_t samples, int64_t outputs, int64_t groups,
                               double* norms, void* product, const Options& options);

// Directions of the features of each group, [group, feature, direction]; `data` is null where the operand is multiplied by them
// already, and its features are the directions themselves.
struct Directions {
    const void* data;
    Type type;
    int64_t stride_group, stride_f, stride_k;
};

// The gradient of each sample's singular values, of `groups` groups of `directions` of them:
//     each[n,group,k] += sum_t (sum_o g[n,t,o] u[group,o,k]) (sum_i a[n,t,i] v[group,i,k])
// `outputs` and `inputs` are the features of one group; those of the groups follow each other. each is contiguous, of the type of
// the sums. Threads split the result: the numbers do not depend on how many there are.
void spectral_grad(const Matrix& g, const Directions& u, const Matrix& a, const Directions& v, int64_t samples,
                   int64_t positions, int64_t outputs, int64_t inputs, int64_t directions, int64_t groups, void* each,
                   const Options& options);

// The same for the windows of a convolution's map; v has directions.
void spectral_grad_windows(const Matrix& g, const Directions& u, const Windows& a, const Directions& v, int64_t samples,
                           int64_t outputs, int64_t directions, int64_t groups, void* each, const Options& options);

// Kernels for CUDA devices (compiled where nvcc is found). Addresses are the device's, launches go to a stream and return at once.
namespace cuda {

// x[sample, frame, feature, z, y, x] as it lies in the device's memory.
struct Map {
    const void* data;
    int64_t stride_n, stride_frame, stride_f, stride[3];
};

// A convolution whose padding is zeros. `outputs` and `channels` count all groups; several frames of a sample have one weight
// gradient together. A dense layer is one of T positions and sizes along the last axis and ones everywhere else.
struct Sizes {
    int64_t samples, frames, outputs, channels, groups;
    int64_t positions[3], kernel[3], step[3], dilation[3], padding[3], size[3];
};

struct Results {
    void *out, *grad;  // [outputs, channels of a group * kernel size], added to; grad may be null
    void* room;        // shares times the size of out (twice that with grad), where shares > 1
    int64_t shares;
};

struct Place {
    int device;
    uintptr_t stream;
};

// Into how many shares, summed one after the other in a second pass, the samples should be cut on such a device.
int64_t sum_grad_squared_shares(const Sizes& sizes, Type type, int multiprocessors);

// The sums of sum_grad_squared above. Both operands are of `type`; sums are double for f64 and float otherwise. `exact`: float32
// products are made of three TF32 ones (as good as float32), otherwise of one. Throws std::runtime_error with CUDA's message and
// std::invalid_argument for sizes beyond 2^30 on one axis.
void sum_grad_squared(const Map& g, const Map& x, const Sizes& sizes, Type type, bool exact, const Results& results,
                      const Place& place);

// Lines of numbers that follow each other, their address and strides multiples of 16 bytes.
struct Lines {
    const void* data;
    int64_t stride_n, stride_group, stride_line;
};

// The sums of spectral_grad above, in parts: parts[n,share,group,k], to be added over shares. u and v are [group, feature, k] (lines
// of k, stride_n 0); where one of them is null, the map it belongs to has k features in each group and one tap. Both maps and
// directions are of `type`, with one frame a sample; errors as above.
void spectral_grad(const Map& g, const Lines& u, const Map& x, const Lines& v, const Sizes& sizes, int64_t directions, Type type,
                   bool exact, void* parts, int64_t shares, const Place& place);

// Into how many shares the positions of a sample should be cut.
int64_t spectral_grad_shares(const Sizes& sizes, int64_t directions, Type type, int multiprocessors);

// The norms of grad_norm_squared above, in parts[n,part], to be added over `parts` of them.
struct NormPlan {
    int64_t shares, parts;
};

// How to cut the call: by G_n of each sample, or (`gram`) by the Gram matrices over positions of g and x.
NormPlan grad_norm_squared_plan(const Sizes& sizes, Type type, bool gram, int multiprocessors);

// `shares` and the number of parts are those of the plan. With `gram` the maps are matrices of one group whose rows are aligned to
// 16 bytes.
void grad_norm_squared(const Map& g, const Map& x, const Sizes& sizes, Type type, bool exact, bool gram, void* parts,
                       int64_t shares, const Place& place);

// out[n,t,e] = sum_u (sum_d q[n,t,d] k[n,u,d]) v[n,u,e], contiguous and of the type of the sums. Lines are positions.
struct GramSizes {
    int64_t samples, t, u, d, e;
};

void gram_apply(const Lines& q, const Lines& k, const Lines& v, const GramSizes& sizes, Type type, bool exact, void* out,
                const Place& place);

// Why the driver of this machine cannot run these kernels; empty when it can. Initialises CUDA.
const char* driver_reason();

}  // namespace cuda

}  // namespace fastfip
