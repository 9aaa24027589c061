// csrc/cuda compiled for the CPU, as a Python module with the functions of fused_arcface._native.cuda.
#include "cuda/bindings.h"

PYBIND11_MODULE(cuda_emulated, m) { fa::cuda::bind(m); }
