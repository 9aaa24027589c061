#include "bindings.h"

#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"
#include "tuples.h"
#include "without_gil.h"

namespace py = pybind11;

namespace fa::cuda {
namespace {

// (sub-centers, thresholds or 0, coefficients or 0)
using NegativesTuple = std::tuple<int, uintptr_t, uintptr_t>;
// (bytes of a chunk's exponentials, bytes of its centers, multiprocessors, cluster, ordered, negatives, scale on the
// device or 0), (device index, cudaStream_t)
using OptionsTuple = std::tuple<int64_t, int64_t, int, int, bool, NegativesTuple, uintptr_t>;
using StreamTuple = std::tuple<int, uintptr_t>;

PassOptions to_options(const OptionsTuple& options) {
  const auto& [exponential_bytes, center_bytes, multiprocessors, cluster, ordered, negatives, scale] = options;
  const auto& [sub_centers, threshold, coefficients] = negatives;
  const Negatives rule{sub_centers, pointer<const float>(threshold), pointer<const double>(coefficients)};
  return {exponential_bytes, center_bytes, multiprocessors, cluster, ordered, rule, pointer<const double>(scale)};
}
Stream to_stream(const StreamTuple& stream) {
  const auto& [device, handle] = stream;
  return {device, pointer<void>(handle)};
}

// fn(Passes<precision>) of the precision by name; HopperPasses are one.
template <typename Fn>
int64_t visit_precision(const std::string& name, const Fn& fn) {
  if (name == "bfloat16") return fn(Passes<Precision::kBFloat16>());
  if (name == "float16") return fn(Passes<Precision::kFloat16>());
  if (name == "tf32") return fn(Passes<Precision::kTf32>());
  if (name == "float32") return fn(Passes<Precision::kFloat32>());
#if defined(FA_HOPPER)
  if (name == "hopper") return fn(HopperPasses());
#endif
  throw std::invalid_argument("precision must be bfloat16, float16, tf32, float32 or hopper (where it is built); got " +
                              name);
}

// Both passes return the bytes of workspace that they need, and do nothing else when they are given none.
int64_t class_stats(const std::string& precision, const MatrixTuple& embeddings, const MatrixTuple& weight,
                    uintptr_t target, double scale, uintptr_t shift, uintptr_t negative_max, uintptr_t negative_sum,
                    uintptr_t center_sum, uintptr_t class_count, const OptionsTuple& options, uintptr_t workspace,
                    const StreamTuple& stream) {
  const ClassStatsArgs args{to_matrix(embeddings),          to_matrix(weight),
                            pointer<const int64_t>(target), scale,
                            pointer<const double>(shift),   pointer<void>(negative_max),
                            pointer<void>(negative_sum),    pointer<void>(center_sum)};
  const fa::WithoutGil without_gil;
  return visit_precision(precision, [&](auto passes) {
    return passes.class_stats(args, pointer<const int64_t>(class_count), to_options(options), pointer<void>(workspace),
                              to_stream(stream));
  });
}

int64_t weight_grad(const std::string& precision, const MatrixTuple& embeddings, const MatrixTuple& weight,
                    uintptr_t target, double scale, uintptr_t lse, uintptr_t negative_coefficient,
                    uintptr_t target_coefficient, const MatrixTuple& d_weight, const OptionsTuple& options,
                    uintptr_t workspace, const StreamTuple& stream) {
  const WeightGradArgs args{to_matrix(embeddings),
                            to_matrix(weight),
                            pointer<const int64_t>(target),
                            scale,
                            pointer<const double>(lse),
                            pointer<const void>(negative_coefficient),
                            pointer<const void>(target_coefficient),
                            to_matrix(d_weight)};
  const fa::WithoutGil without_gil;
  return visit_precision(precision, [&](auto passes) {
    return passes.weight_grad(args, nullptr, nullptr, to_options(options), pointer<void>(workspace), to_stream(stream));
  });
}

int64_t update_centers(const std::string& precision, const MatrixTuple& embeddings, const MatrixTuple& weight,
                       uintptr_t target, double scale, uintptr_t lse, uintptr_t negative_coefficient,
                       uintptr_t target_coefficient, const CenterStepTuple& center_step, uintptr_t active,
                       const OptionsTuple& options, uintptr_t workspace, const StreamTuple& stream) {
  const WeightGradArgs args{to_matrix(embeddings),
                            to_matrix(weight),
                            pointer<const int64_t>(target),
                            scale,
                            pointer<const double>(lse),
                            pointer<const void>(negative_coefficient),
                            pointer<const void>(target_coefficient),
                            {}};
  const CenterStep step = to_center_step(center_step);
  const fa::WithoutGil without_gil;
  return visit_precision(precision, [&](auto passes) {
    return passes.weight_grad(args, &step, pointer<const bool>(active), to_options(options), pointer<void>(workspace),
                              to_stream(stream));
  });
}

}  // namespace

void bind(py::module_ m) {
  m.doc() = "CUDA kernels of fused_arcface over raw addresses; see fused_arcface.backends.cuda.";
#if defined(FA_HOPPER)
  m.attr("HOPPER") = true;
#else
  m.attr("HOPPER") = false;
#endif
  m.def("readiness", [](int device) {
    const Readiness found = readiness(device);
    return std::make_tuple(found.driver, found.runtime, found.error);
  });
  m.def("class_stats", &class_stats);
  m.def("weight_grad", &weight_grad);
  m.def("update_centers", &update_centers);
  m.def("target_cosine", [](const MatrixTuple& embeddings, const MatrixTuple& weight, uintptr_t target,
                            uintptr_t cosine, const StreamTuple& stream) {
    target_cosine(to_matrix(embeddings), to_matrix(weight), pointer<const int64_t>(target), pointer<float>(cosine),
                  to_stream(stream));
  });
  m.def("unit_embedding_grad",
        [](const MatrixTuple& weight, uintptr_t target, uintptr_t mean_center, uintptr_t negative_coefficient,
           uintptr_t target_coefficient, int64_t rows, uintptr_t out, const StreamTuple& stream) {
          unit_embedding_grad(to_matrix(weight), pointer<const int64_t>(target), pointer<const float>(mean_center),
                              pointer<const float>(negative_coefficient), pointer<const float>(target_coefficient),
                              rows, pointer<float>(out), to_stream(stream));
        });
  m.def("embedding_grad", [](uintptr_t d_unit, const MatrixTuple& embeddings, const MatrixTuple& d_embeddings,
                             const StreamTuple& stream) {
    embedding_grad(pointer<const float>(d_unit), to_matrix(embeddings), to_matrix(d_embeddings), to_stream(stream));
  });
  m.def("margin_loss",
        [](uintptr_t negative_lse, uintptr_t target_cosine, int64_t rows, double scale,
           const std::tuple<double, double, double>& factors, const std::string& boundary, bool straight_through,
           const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>& out, const StreamTuple& stream) {
          const auto& [m1, m2, m3] = factors;
          const auto& [loss, lse, d_lse, d_cosine] = out;
          const auto margin = make_margin<float>(m1, m2, m3, boundary, straight_through);
          margin_loss(pointer<const float>(negative_lse), pointer<const float>(target_cosine), rows, scale, margin,
                      pointer<float>(loss), pointer<float>(lse), pointer<float>(d_lse), pointer<float>(d_cosine),
                      to_stream(stream));
        });
}

}  // namespace fa::cuda
