// The op sum_grad_squared: the squares of all samples' products are summed, and the products themselves where they are wanted.
#include "cpu/products.h"

namespace fastfip {

void sum_grad_squared(const Matrix& g, const Matrix& a, int64_t samples, int64_t positions, int64_t outputs, int64_t inputs,
                      void* out, void* grad, const Options& options) {
    Problem p = {};
    p.out = out;
    p.grad = grad;
    run_dense(p, g, a, samples, positions, outputs, inputs, options);
}

void sum_grad_squared_windows(const Matrix& g, const Windows& a, int64_t samples, int64_t outputs, int64_t groups, void* out,
                              void* grad, const Options& options) {
    Problem p = {};
    p.out = out;
    p.grad = grad;
    run_windows(p, g, a, samples, outputs, groups, options);
}

}  // namespace fastfip
