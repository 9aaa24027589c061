// The stages over the rows.
#include "margin_loss.h"
#include "targets.h"

namespace fa::cuda {

Readiness readiness(int device) {
  Readiness found{0, 0, ""};
#if defined(__CUDACC__)
  const auto note = [&](cudaError_t status) {
    if (status != cudaSuccess && found.error.empty()) found.error = cudaGetErrorString(status);
  };
  note(cudaDriverGetVersion(&found.driver));
  note(cudaRuntimeGetVersion(&found.runtime));
  try {
    const OnDevice on_device({device, nullptr});
    cudaFuncAttributes attributes;  // to ask for them loads the kernel, which a driver may have to compile first
    note(cudaFuncGetAttributes(&attributes, target_cosine_kernel));
  } catch (const std::runtime_error& error) {
    found.error = error.what();
  }
  cudaGetLastError();  // the next launch does not report it
#else
  (void)device;
#endif
  return found;
}

void target_cosine(const Matrix& embeddings, const Matrix& weight, const int64_t* target, float* cosine,
                   const Stream& stream) {
  const OnDevice device(stream);
  launch("target_cosine", target_cosine_kernel, {row_blocks(embeddings.rows)}, kRowThreads, 0, stream, embeddings,
         weight, target, cosine);
}

void unit_embedding_grad(const Matrix& weight, const int64_t* target, const float* mean_center,
                         const float* negative_coefficient, const float* target_coefficient, int64_t rows, float* out,
                         const Stream& stream) {
  const OnDevice device(stream);
  launch("unit_embedding_grad", unit_embedding_grad_kernel, {row_blocks(rows)}, kRowThreads, 0, stream, weight, target,
         mean_center, negative_coefficient, target_coefficient, rows, out);
}

void embedding_grad(const float* d_unit, const Matrix& embeddings, const Matrix& d_embeddings, const Stream& stream) {
  const OnDevice device(stream);
  launch("embedding_grad", embedding_grad_kernel, {row_blocks(embeddings.rows)}, kRowThreads, 0, stream, d_unit,
         embeddings, d_embeddings);
}

void margin_loss(const float* negative_lse, const float* target_cosine, int64_t rows, double scale,
                 const Margin<float>& margin, float* loss, float* lse, float* d_lse, float* d_cosine,
                 const Stream& stream) {
  const OnDevice device(stream);
  launch("margin_loss", margin_loss_kernel, {ceil_div(rows, kMarginThreads)}, kMarginThreads, 0, stream, negative_lse,
         target_cosine, rows, static_cast<float>(scale), margin, loss, lse, d_lse, d_cosine);
}

}  // namespace fa::cuda
