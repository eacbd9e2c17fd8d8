// The op grad_norm_squared: each sample's squares are summed to one number, and its product is stored where it is wanted.
#include "cpu/products.h"

namespace fastfip {

void grad_norm_squared(const Matrix& g, const Matrix& a, int64_t samples, int64_t positions, int64_t outputs, int64_t inputs,
                       double* norms, void* product, const Options& options) {
    Problem p = {};
    p.norms = norms;
    p.out = product;
    run_dense(p, g, a, samples, positions, outputs, inputs, options);
}

void grad_norm_squared_windows(const Matrix& g, const Windows& a, int64_t samples, int64_t outputs, int64_t groups,
                               double* norms, void* product, const Options& options) {
    Problem p = {};
    p.norms = norms;
    p.out = product;
    run_windows(p, g, a, samples, outputs, groups, options);
}

}  // namespace fastfip
