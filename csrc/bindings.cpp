// The only file that knows Python. Tensors arrive as addresses (integers); their owners live in the caller.
#include <pybind11/pybind11.h>

#include "fastfip.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of fastfip: addresses and sizes in, nothing about torch.";

    py::enum_<fastfip::Isa>(m, "Isa")
        .value("portable", fastfip::Isa::portable)
        .value("avx2", fastfip::Isa::avx2)
        .value("avx512", fastfip::Isa::avx512)
        .value("avx512_bf16", fastfip::Isa::avx512_bf16);

    m.def("best_isa", &fastfip::best_isa, "Best instruction set of this CPU.");
}
