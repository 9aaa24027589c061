// fused_arcface._native: the compiled kernels over raw addresses. No torch here: Python owns dtypes, shapes, checks,
// allocation and lifetimes (python/fused_arcface/backends/cpu.py and store/records.py are the only callers).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "rows_io.h"
#include "tuples.h"
#include "without_gil.h"

#if FA_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using fa::CenterStepTuple;
using fa::MatrixTuple;
using fa::pointer;
using fa::to_center_step;
using fa::to_matrix;

// (scale, exponent, angle, offset, bias, by bias)
using LogisticTuple = std::tuple<double, double, double, double, double, bool>;
// (sub-centers, address of thresholds or 0, (a, b, d, e), logistic or None)
using NegativesTuple =
    std::tuple<int64_t, uintptr_t, std::tuple<double, double, double, double>, std::optional<LogisticTuple>>;

fa::Negatives to_negatives(const NegativesTuple& n) {
  const auto& [sub_centers, threshold, coefficients, logistic] = n;
  const auto& [a, b, d, e] = coefficients;
  if (sub_centers < 1 || sub_centers > fa::kMaxSubCenters)
    throw std::invalid_argument("sub-centers out of range: " + std::to_string(sub_centers));
  fa::Negatives negatives{sub_centers, pointer<const void>(threshold), a, b, d, e, std::nullopt};
  if (logistic) {
    const auto& [scale, exponent, angle, offset, bias, by_bias] = *logistic;
    negatives.logistic = fa::Logistic{scale, exponent, angle, offset, bias, by_bias};
  }
  return negatives;
}

// Those of the instruction set that the environment's FUSED_ARCFACE_ISA names, else the best. Python holds its lock
// here, so nothing changes the environment meanwhile.
const fa::Kernels& kernels() {
  const char* const asked = std::getenv("FUSED_ARCFACE_ISA");
  const fa::Kernels* found = fa::find_kernels(asked != nullptr ? asked : "");
  if (found == nullptr)
    throw std::invalid_argument(std::string("instruction set not available on this machine: ") + asked);
  return *found;
}

// The pass of that name whose products are taken in a dtype.
template <typename Pass>
Pass* in_dtype(Pass* const (&passes)[fa::kDtypes], int product) {
  if (product < 0 || product >= fa::kDtypes || passes[product] == nullptr)
    throw std::invalid_argument("no products in the dtype of this code: " + std::to_string(product));
  return passes[product];
}

void class_stats(int product, const MatrixTuple& embeddings, const MatrixTuple& weight, uintptr_t target, double scale,
                 uintptr_t shift, uintptr_t negative_max, uintptr_t negative_sum, uintptr_t center_sum, int threads,
                 const NegativesTuple& negatives, uintptr_t moments) {
  const auto pass = in_dtype(kernels().class_stats, product);
  const fa::ClassStatsArgs args{to_matrix(embeddings),          to_matrix(weight),
                                pointer<const int64_t>(target), scale,
                                pointer<const double>(shift),   pointer<void>(negative_max),
                                pointer<void>(negative_sum),    pointer<void>(center_sum)};
  const fa::PassOptions options{threads, to_negatives(negatives), pointer<double>(moments), nullptr};
  const fa::WithoutGil without_gil;
  pass(args, options);
}

void weight_grad(int product, const MatrixTuple& embeddings, const MatrixTuple& weight, uintptr_t target, double scale,
                 uintptr_t lse, uintptr_t negative_coefficient, uintptr_t target_coefficient,
                 const MatrixTuple& d_weight, int threads, const NegativesTuple& negatives, uintptr_t negative_grad) {
  const auto pass = in_dtype(kernels().weight_grad, product);
  const fa::WeightGradArgs args{to_matrix(embeddings),
                                to_matrix(weight),
                                pointer<const int64_t>(target),
                                scale,
                                pointer<const double>(lse),
                                pointer<const void>(negative_coefficient),
                                pointer<const void>(target_coefficient),
                                to_matrix(d_weight)};
  const fa::PassOptions options{threads, to_negatives(negatives), nullptr, pointer<void>(negative_grad)};
  const fa::WithoutGil without_gil;
  pass(args, options);
}

void update_centers(int product, const MatrixTuple& embeddings, const MatrixTuple& weight, uintptr_t target,
                    double scale, uintptr_t lse, uintptr_t negative_coefficient, uintptr_t target_coefficient,
                    const CenterStepTuple& center_step, int threads, const NegativesTuple& negatives) {
  const auto pass = in_dtype(kernels().update_centers, product);
  const fa::WeightGradArgs args{to_matrix(embeddings),
                                to_matrix(weight),
                                pointer<const int64_t>(target),
                                scale,
                                pointer<const double>(lse),
                                pointer<const void>(negative_coefficient),
                                pointer<const void>(target_coefficient),
                                {}};
  const fa::PassOptions options{threads, to_negatives(negatives), nullptr, nullptr};
  const fa::CenterStep step = to_center_step(center_step);
  const fa::WithoutGil without_gil;
  pass(args, step, options);
}

void target_cosine(int compute, const MatrixTuple& embeddings, const MatrixTuple& weight, uintptr_t target,
                   uintptr_t cosine, int threads) {
  const auto stage = in_dtype(kernels().target_cosine, compute);
  const fa::WithoutGil without_gil;
  stage(to_matrix(embeddings), to_matrix(weight), pointer<const int64_t>(target), pointer<void>(cosine), threads);
}

void finish_negatives(int compute, int64_t rows, int64_t columns, uintptr_t negative_sum, uintptr_t shift,
                      uintptr_t center_sum, uintptr_t lse, uintptr_t mean_center) {
  const auto stage = in_dtype(kernels().finish_negatives, compute);
  const fa::FinishArgs args{rows,
                            columns,
                            pointer<const void>(negative_sum),
                            pointer<const void>(center_sum),
                            pointer<const double>(shift),
                            pointer<double>(lse),
                            pointer<void>(mean_center)};
  const fa::WithoutGil without_gil;
  stage(args);
}

void unit_embedding_grad(int compute, const MatrixTuple& weight, uintptr_t target, uintptr_t mean_center,
                         uintptr_t negative_coefficient, uintptr_t target_coefficient, int64_t rows, uintptr_t d_unit,
                         int threads) {
  const auto stage = in_dtype(kernels().unit_embedding_grad, compute);
  const fa::UnitGradArgs args{rows, pointer<const void>(mean_center), pointer<const void>(negative_coefficient),
                              pointer<const void>(target_coefficient), pointer<void>(d_unit)};
  const fa::WithoutGil without_gil;
  stage(to_matrix(weight), pointer<const int64_t>(target), args, threads);
}

void embedding_grad(int compute, uintptr_t d_unit, const MatrixTuple& embeddings, const MatrixTuple& d_embeddings,
                    int threads) {
  const auto stage = in_dtype(kernels().embedding_grad, compute);
  const fa::WithoutGil without_gil;
  stage(pointer<const void>(d_unit), to_matrix(embeddings), to_matrix(d_embeddings), threads);
}

void margin_loss(int compute, uintptr_t negative_lse, uintptr_t target_cosine, int64_t rows, double scale,
                 const std::tuple<double, double, double>& factors, const std::string& boundary, bool straight_through,
                 const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>& out) {
  const auto& [m1, m2, m3] = factors;
  const auto& [loss, lse, d_lse, d_cosine] = out;
  in_dtype(kernels().margin_loss, compute)({rows, pointer<const void>(negative_lse), pointer<const void>(target_cosine),
                                            scale, m1, m2, m3, boundary, straight_through, pointer<void>(loss),
                                            pointer<void>(lse), pointer<void>(d_lse), pointer<void>(d_cosine)});
}

int64_t multiply_adds(int product, int64_t rounds, int threads) {
  const auto pass = in_dtype(kernels().multiply_adds, product);
  const fa::WithoutGil without_gil;
  return pass(rounds, threads);
}

// fields: (address, bytes of a row) each
int transfer_records(bool write, int file, int64_t record_bytes, uintptr_t rows, int64_t count,
                     const std::vector<std::tuple<uintptr_t, int64_t>>& fields, int threads) {
  fa::Records records{file, record_bytes, pointer<const int64_t>(rows), count, {}};
  for (const auto& [data, bytes] : fields) records.fields.push_back({pointer<char>(data), bytes});
  const fa::WithoutGil without_gil;
  return write ? fa::write_records(records, threads) : fa::read_records(records, threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of fused_arcface over raw addresses; see fused_arcface.backends.cpu.";
  m.attr("FLOAT32") = static_cast<int>(fa::Dtype::kFloat32);
  m.attr("FLOAT64") = static_cast<int>(fa::Dtype::kFloat64);
  m.attr("BFLOAT16") = static_cast<int>(fa::Dtype::kBFloat16);
  m.attr("FLOAT16") = static_cast<int>(fa::Dtype::kFloat16);
  m.def("isas", [] {
    py::list names;
    for (const char* isa : {"avx512_bf16", "avx512", "avx2", "portable"})
      if (fa::find_kernels(isa) != nullptr) names.append(isa);
    return names;
  });
  m.def("isa", [] { return kernels().isa; });
  m.def("has_products",
        [](int product) { return product >= 0 && product < fa::kDtypes && kernels().class_stats[product] != nullptr; });
  m.def("class_stats", &class_stats);
  m.def("weight_grad", &weight_grad);
  m.attr("NO_MOMENTUM") = static_cast<int>(fa::MomentumType::kNone);
  m.attr("MOMENTUM_FLOAT64") = static_cast<int>(fa::MomentumType::kFloat64);
  m.attr("MOMENTUM_FLOAT32") = static_cast<int>(fa::MomentumType::kFloat32);
  m.attr("MOMENTUM_BFLOAT16") = static_cast<int>(fa::MomentumType::kBFloat16);
  m.attr("MOMENTUM_INT8") = static_cast<int>(fa::MomentumType::kInt8);
  m.def("update_centers", &update_centers);
  m.def("target_cosine", &target_cosine);
  m.def("finish_negatives", &finish_negatives);
  m.def("unit_embedding_grad", &unit_embedding_grad);
  m.def("embedding_grad", &embedding_grad);
  m.def("margin_loss", &margin_loss);
  m.def("multiply_adds", &multiply_adds);
  m.def("transfer_records", &transfer_records);
#if FA_CUDA
  fa::cuda::bind(m.def_submodule("cuda"));
#endif
}
