// The kernels of csrc/cuda over raw addresses, as a module of their own below fused_arcface._native
// (python/fused_arcface/backends/cuda.py is the only caller).
#pragma once

#include <pybind11/pybind11.h>

namespace fa::cuda {

void bind(pybind11::module_ m);

}  // namespace fa::cuda
