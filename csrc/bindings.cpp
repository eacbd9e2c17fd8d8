// The only file that knows Python. Tensors arrive as addresses (integers); their owners live in the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "fastfip.h"

namespace py = pybind11;

namespace {

typedef std::array<int64_t, 3> Three;

// (address, type, strides of n, t and f)
typedef std::tuple<uintptr_t, int, Three> MatrixArgument;

template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

fastfip::Type type_of(int type) {
    if (type < 0 || type > 3) throw std::invalid_argument("unknown type");
    return static_cast<fastfip::Type>(type);
}

fastfip::Matrix matrix_of(const MatrixArgument& x) {
    const Three& stride = std::get<2>(x);
    return {pointer<const void>(std::get<0>(x)), type_of(std::get<1>(x)), stride[0], stride[1], stride[2]};
}

fastfip::Options options_of(bool is_double, bool bf16, int threads, int isa) {
    if (isa < 0 || isa > static_cast<int>(fastfip::Isa::avx512_bf16)) throw std::invalid_argument("unknown instruction set");
    if (is_double && bf16) throw std::invalid_argument("bfloat16 products are summed in float32");
    return {is_double, bf16, threads < 1 ? 1 : threads, static_cast<fastfip::Isa>(isa)};
}

void sum_grad_squared(const MatrixArgument& g, const MatrixArgument& a, int64_t samples, int64_t positions, int64_t outputs,
                      int64_t inputs, uintptr_t out, uintptr_t grad, bool is_double, bool bf16, int threads, int isa) {
    const auto options = options_of(is_double, bf16, threads, isa);
    const auto g_matrix = matrix_of(g), a_matrix = matrix_of(a);
    py::gil_scoped_release release;
    fastfip::sum_grad_squared(g_matrix, a_matrix, samples, positions, outputs, inputs, pointer(out), pointer(grad), options);
}

void grad_norm_squared(const MatrixArgument& g, const MatrixArgument& a, int64_t samples, int64_t positions, int64_t outputs,
                       int64_t inputs, uintptr_t norms, uintptr_t product, bool is_double, int threads, int isa) {
    const auto options = options_of(is_double, false, threads, isa);
    const auto g_matrix = matrix_of(g), a_matrix = matrix_of(a);
    py::gil_scoped_release release;
    fastfip::grad_norm_squared(g_matrix, a_matrix, samples, positions, outputs, inputs, pointer<double>(norms), pointer(product),
                               options);
}

// (address or 0, type, strides of group, feature and direction)
fastfip::Directions directions_of(const MatrixArgument& x) {
    const Three& stride = std::get<2>(x);
    return {pointer<const void>(std::get<0>(x)), type_of(std::get<1>(x)), stride[0], stride[1], stride[2]};
}

void spectral_grad(const MatrixArgument& g, const MatrixArgument& u, const MatrixArgument& a, const MatrixArgument& v,
                   int64_t samples, int64_t positions, int64_t outputs, int64_t inputs, int64_t directions, int64_t groups,
                   uintptr_t each, bool is_double, int threads, int isa) {
    const auto options = options_of(is_double, false, threads, isa);
    const auto g_matrix = matrix_of(g), a_matrix = matrix_of(a);
    const auto left = directions_of(u), right = directions_of(v);
    py::gil_scoped_release release;
    fastfip::spectral_grad(g_matrix, left, a_matrix, right, samples, positions, outputs, inputs, directions, groups, pointer(each),
                           options);
}

// address, type, strides of n, c, z, y and x; channels of a group; source; kernel, step, dilation, positions
typedef std::tuple<uintptr_t, int, std::array<int64_t, 5>, int64_t, std::array<std::vector<int64_t>, 3>, Three, Three, Three, Three>
    WindowsArgument;

fastfip::Windows windows_of(const WindowsArgument& x, int64_t outputs, int64_t groups) {
    if (groups < 1 || outputs % groups != 0) throw std::invalid_argument("groups must divide outputs");
    const auto& [map, type, stride, channels, source, kernel, step, dilation, positions] = x;
    fastfip::Windows w = {};
    w.data = pointer<const void>(map);
    w.type = type_of(type);
    w.stride_n = stride[0];
    w.stride_c = stride[1];
    w.channels = channels;
    for (size_t d = 0; d < 3; ++d) {
        w.stride[d] = stride[d + 2];
        w.source[d] = source[d].data();
        w.padded[d] = static_cast<int64_t>(source[d].size());
        w.kernel[d] = kernel[d];
        w.step[d] = step[d];
        w.dilation[d] = dilation[d];
        w.positions[d] = positions[d];
        if (positions[d] > 0 && (positions[d] - 1) * step[d] + (kernel[d] - 1) * dilation[d] >= w.padded[d])
            throw std::invalid_argument("a window reaches beyond the padded map");
    }
    return w;
}

void sum_grad_squared_windows(const MatrixArgument& g, const WindowsArgument& a, int64_t samples, int64_t outputs, int64_t groups,
                              uintptr_t out, uintptr_t grad, bool is_double, bool bf16, int threads, int isa) {
    const auto options = options_of(is_double, bf16, threads, isa);
    const auto g_matrix = matrix_of(g);
    const auto w = windows_of(a, outputs, groups);
    py::gil_scoped_release release;
    fastfip::sum_grad_squared_windows(g_matrix, w, samples, outputs, groups, pointer(out), pointer(grad), options);
}

void grad_norm_squared_windows(const MatrixArgument& g, const WindowsArgument& a, int64_t samples, int64_t outputs,
                               int64_t groups, uintptr_t norms, uintptr_t product, bool is_double, int threads, int isa) {
    const auto options = options_of(is_double, false, threads, isa);
    const auto g_matrix = matrix_of(g);
    const auto w = windows_of(a, outputs, groups);
    py::gil_scoped_release release;
    fastfip::grad_norm_squared_windows(g_matrix, w, samples, outputs, groups, pointer<double>(norms), pointer(product), options);
}

void spectral_grad_windows(const MatrixArgument& g, const MatrixArgument& u, const WindowsArgument& a, const MatrixArgument& v,
                           int64_t samples, int64_t outputs, int64_t directions, int64_t groups, uintptr_t each, bool is_double,
                           int threads, int isa) {
    const auto options = options_of(is_double, false, threads, isa);
    const auto g_matrix = matrix_of(g);
    const auto w = windows_of(a, outputs * groups, groups);
    const auto left = directions_of(u), right = directions_of(v);
    if (!right.data) throw std::invalid_argument("windows need directions");
    py::gil_scoped_release release;
    fastfip::spectral_grad_windows(g_matrix, left, w, right, samples, outputs, directions, groups, pointer(each), options);
}

#ifdef FASTFIP_CUDA
// (address, strides of sample, frame, feature, z, y and x)
typedef std::tuple<uintptr_t, std::array<int64_t, 6>> MapArgument;

fastfip::cuda::Map map_of(const MapArgument& x) {
    const auto& s = std::get<1>(x);
    return {pointer<const void>(std::get<0>(x)), s[0], s[1], s[2], {s[3], s[4], s[5]}};
}

// sizes: samples, frames, outputs, channels, groups; axes: positions, kernel, step, dilation, padding, size
fastfip::cuda::Sizes sizes_of(const std::array<int64_t, 5>& n, const std::array<Three, 6>& axes) {
    if (n[4] < 1 || n[2] % n[4] != 0 || n[3] % n[4] != 0) throw std::invalid_argument("groups must divide outputs and channels");
    fastfip::cuda::Sizes sizes = {n[0], n[1], n[2], n[3], n[4], {}, {}, {}, {}, {}, {}};
    for (size_t d = 0; d < 3; ++d) {
        sizes.positions[d] = axes[0][d], sizes.kernel[d] = axes[1][d], sizes.step[d] = axes[2][d];
        sizes.dilation[d] = axes[3][d], sizes.padding[d] = axes[4][d], sizes.size[d] = axes[5][d];
    }
    return sizes;
}

void cuda_sum_grad_squared(const MapArgument& g, const MapArgument& x, const std::array<int64_t, 5>& sizes,
                           const std::array<Three, 6>& axes, int type, bool exact, uintptr_t out, uintptr_t grad, uintptr_t room,
                           int64_t shares, int device, uintptr_t stream) {
    const auto all = sizes_of(sizes, axes);
    const auto g_map = map_of(g), x_map = map_of(x);
    const fastfip::cuda::Results results = {pointer(out), pointer(grad), pointer(room), shares};
    py::gil_scoped_release release;
    fastfip::cuda::sum_grad_squared(g_map, x_map, all, type_of(type), exact, results, {device, stream});
}

void cuda_grad_norm_squared(const MapArgument& g, const MapArgument& x, const std::array<int64_t, 5>& sizes,
                            const std::array<Three, 6>& axes, int type, bool exact, bool gram, uintptr_t parts, int64_t shares,
                            int device, uintptr_t stream) {
    const auto all = sizes_of(sizes, axes);
    const auto g_map = map_of(g), x_map = map_of(x);
    py::gil_scoped_release release;
    fastfip::cuda::grad_norm_squared(g_map, x_map, all, type_of(type), exact, gram, pointer(parts), shares, {device, stream});
}

// (address or 0, strides of sample, group and line)
typedef std::tuple<uintptr_t, Three> LinesArgument;

fastfip::cuda::Lines lines_of(const LinesArgument& x) {
    const Three& s = std::get<1>(x);
    return {pointer<const void>(std::get<0>(x)), s[0], s[1], s[2]};
}

void cuda_gram_apply(const LinesArgument& q, const LinesArgument& k, const LinesArgument& v, const std::array<int64_t, 5>& sizes,
                     int type, bool exact, uintptr_t out, int device, uintptr_t stream) {
    const auto q_lines = lines_of(q), k_lines = lines_of(k), v_lines = lines_of(v);
    const fastfip::cuda::GramSizes all = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    py::gil_scoped_release release;
    fastfip::cuda::gram_apply(q_lines, k_lines, v_lines, all, type_of(type), exact, pointer(out), {device, stream});
}

void cuda_spectral_grad(const MapArgument& g, const LinesArgument& u, const MapArgument& x, const LinesArgument& v,
                        const std::array<int64_t, 5>& sizes, const std::array<Three, 6>& axes, int64_t directions, int type,
                        bool exact, uintptr_t parts, int64_t shares, int device, uintptr_t stream) {
    const auto all = sizes_of(sizes, axes);
    const auto g_map = map_of(g), x_map = map_of(x);
    const auto left = lines_of(u), right = lines_of(v);
    py::gil_scoped_release release;
    fastfip::cuda::spectral_grad(g_map, left, x_map, right, all, directions, type_of(type), exact, pointer(parts), shares,
                                 {device, stream});
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of fastfip: addresses and sizes in, nothing about torch.";

    py::enum_<fastfip::Isa>(m, "Isa")
        .value("portable", fastfip::Isa::portable)
        .value("avx2", fastfip::Isa::avx2)
        .value("avx512", fastfip::Isa::avx512)
        .value("avx512_bf16", fastfip::Isa::avx512_bf16);

#ifdef FASTFIP_BF16
    m.attr("has_bf16") = fastfip::best_isa() >= fastfip::Isa::avx512_bf16;
#else
    m.attr("has_bf16") = false;
#endif
    m.def("best_isa", &fastfip::best_isa, "Best instruction set of this CPU.");

    m.def("sum_grad_squared", &sum_grad_squared, py::arg("g"), py::arg("a"), py::arg("samples"), py::arg("positions"),
          py::arg("outputs"), py::arg("inputs"), py::arg("out"), py::arg("grad"), py::arg("is_double"), py::arg("bf16"),
          py::arg("threads"), py::arg("isa"), "Add to out (and grad, unless 0); see fastfip.h.");
    m.def("sum_grad_squared_windows", &sum_grad_squared_windows, py::arg("g"), py::arg("windows"), py::arg("samples"),
          py::arg("outputs"), py::arg("groups"), py::arg("out"), py::arg("grad"), py::arg("is_double"), py::arg("bf16"),
          py::arg("threads"), py::arg("isa"), "The same for a convolution's feature map; see fastfip.h.");
    m.def("grad_norm_squared", &grad_norm_squared, py::arg("g"), py::arg("a"), py::arg("samples"), py::arg("positions"),
          py::arg("outputs"), py::arg("inputs"), py::arg("norms"), py::arg("product"), py::arg("is_double"),
          py::arg("threads"), py::arg("isa"), "Add to norms, write to product (unless 0); see fastfip.h.");
    m.def("grad_norm_squared_windows", &grad_norm_squared_windows, py::arg("g"), py::arg("windows"), py::arg("samples"),
          py::arg("outputs"), py::arg("groups"), py::arg("norms"), py::arg("product"), py::arg("is_double"),
          py::arg("threads"), py::arg("isa"), "The same for a convolution's feature map; see fastfip.h.");

    m.def("spectral_grad", &spectral_grad, py::arg("g"), py::arg("u"), py::arg("a"), py::arg("v"), py::arg("samples"),
          py::arg("positions"), py::arg("outputs"), py::arg("inputs"), py::arg("directions"), py::arg("groups"), py::arg("each"),
          py::arg("is_double"), py::arg("threads"), py::arg("isa"), "Add to each; see fastfip.h.");
    m.def("spectral_grad_windows", &spectral_grad_windows, py::arg("g"), py::arg("u"), py::arg("windows"), py::arg("v"),
          py::arg("samples"), py::arg("outputs"), py::arg("directions"), py::arg("groups"), py::arg("each"), py::arg("is_double"),
          py::arg("threads"), py::arg("isa"), "The same for a convolution's feature map; see fastfip.h.");

#ifdef FASTFIP_CUDA
    m.attr("cuda_compiled") = FASTFIP_CUDA;
    m.attr("cuda_missing") = "";
    m.def("cuda_driver_reason", &fastfip::cuda::driver_reason, "Why the driver cannot run CUDA kernels, or \"\"; starts CUDA.");
    m.def(
        "cuda_sum_grad_squared_shares",
        [](const std::array<int64_t, 5>& sizes, const std::array<Three, 6>& axes, int type, int multiprocessors) {
            return fastfip::cuda::sum_grad_squared_shares(sizes_of(sizes, axes), type_of(type), multiprocessors);
        },
        py::arg("sizes"), py::arg("axes"), py::arg("type"), py::arg("multiprocessors"));
    m.def("cuda_sum_grad_squared", &cuda_sum_grad_squared, py::arg("g"), py::arg("x"), py::arg("sizes"), py::arg("axes"),
          py::arg("type"), py::arg("exact"), py::arg("out"), py::arg("grad"), py::arg("room"), py::arg("shares"),
          py::arg("device"), py::arg("stream"), "Launch it on a stream; see fastfip.h.");
    m.def(
        "cuda_grad_norm_squared_plan",
        [](const std::array<int64_t, 5>& sizes, const std::array<Three, 6>& axes, int type, bool gram, int multiprocessors) {
            const auto plan = fastfip::cuda::grad_norm_squared_plan(sizes_of(sizes, axes), type_of(type), gram, multiprocessors);
            return std::make_tuple(plan.shares, plan.parts);
        },
        py::arg("sizes"), py::arg("axes"), py::arg("type"), py::arg("gram"), py::arg("multiprocessors"));
    m.def("cuda_grad_norm_squared", &cuda_grad_norm_squared, py::arg("g"), py::arg("x"), py::arg("sizes"), py::arg("axes"),
          py::arg("type"), py::arg("exact"), py::arg("gram"), py::arg("parts"), py::arg("shares"), py::arg("device"),
          py::arg("stream"), "Launch it on a stream; see fastfip.h.");
    m.def("cuda_gram_apply", &cuda_gram_apply, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("sizes"), py::arg("type"),
          py::arg("exact"), py::arg("out"), py::arg("device"), py::arg("stream"), "Launch it on a stream; see fastfip.h.");
    m.def(
        "cuda_spectral_grad_shares",
        [](const std::array<int64_t, 5>& sizes, const std::array<Three, 6>& axes, int64_t directions, int type, int multiprocessors) {
            return fastfip::cuda::spectral_grad_shares(sizes_of(sizes, axes), directions, type_of(type), multiprocessors);
        },
        py::arg("sizes"), py::arg("axes"), py::arg("directions"), py::arg("type"), py::arg("multiprocessors"));
    m.def("cuda_spectral_grad", &cuda_spectral_grad, py::arg("g"), py::arg("u"), py::arg("x"), py::arg("v"), py::arg("sizes"),
          py::arg("axes"), py::arg("directions"), py::arg("type"), py::arg("exact"), py::arg("parts"), py::arg("shares"),
          py::arg("device"), py::arg("stream"), "Launch it on a stream; see fastfip.h.");
#else
    m.attr("cuda_compiled") = "";
    m.attr("cuda_missing") = FASTFIP_CUDA_MISSING;
#endif
}
