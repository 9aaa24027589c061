// What the bindings call: the stages on a GPU, launched on the caller's stream. Nothing here allocates or waits.
#pragma once

#include <string>

#include "arguments.h"
#include "margin.h"

namespace fa::cuda {

// How products are taken. tf32 keeps 11 bits of fp32 operands; kFloat32 makes up for the other 13 with two more
// products.
enum class Precision : int { kBFloat16, kFloat16, kTf32, kFloat32 };

// The device and the caller's stream on it.
struct Stream {
  int device;
  void* handle;
};

// Whether kernels can start on a device. Versions are those of CUDA, 1000 * major + 10 * minor.
struct Readiness {
  int driver, runtime;  // what the driver knows, and what this build was made with
  std::string error;    // why they cannot, or empty
};
Readiness readiness(int device);

// How the negatives enter the sums, where it is not by the cosines of weight's rows as they are. Class c has the rows
// [c * sub_centers, (c + 1) * sub_centers), and its cosine is the greatest of theirs: that row alone enters the sums
// and has a gradient. With f(c) = c up to the row's threshold and a * c^2 + b * c + d + e * sqrt(1 - c^2) above it, an
// exponential is exp(scale * f(cos_ij) - shift_i), and center_sum and G_ij have the factor f'(cos_ij).
struct Negatives {
  int sub_centers = 1;
  const float* threshold = nullptr;      // (N,) or null: no cosine is changed
  const double* coefficients = nullptr;  // (4,) a, b, d, e: known to the device alone

  bool plain() const { return sub_centers == 1 && threshold == nullptr; }
};

// What Python chooses for a pass over the classes.
struct PassOptions {
  int64_t exponential_bytes;  // of one chunk's exponentials or of their gradient, (N, classes)
  int64_t center_bytes;       // of one chunk's packed centers; of Hopper's passes also of an fp32 gradient to be cast
  int multiprocessors;
  int cluster = 1;                // of Hopper's passes: blocks that fetch for each other, 1 or 2
  bool ordered = true;            // and whether a tile's second product waits for the next one's first
  Negatives negatives = {};       // Hopper's passes take plain ones alone
  const double* scale = nullptr;  // or null; in place of the arguments' scale, known to the device alone
};

// The passes in one precision. `workspace` has the bytes that a call without one returns, aligned to 256.
template <Precision precision>
struct Passes {
  // class_count: how many of weight's rows are classes, the others padding; null: all.
  static int64_t class_stats(const ClassStatsArgs& args, const int64_t* class_count, const PassOptions& options,
                             void* workspace, const Stream& stream);
  // args.d_weight is written; with a step, the weight is updated instead where *active is true.
  static int64_t weight_grad(const WeightGradArgs& args, const CenterStep* step, const bool* active,
                             const PassOptions& options, void* workspace, const Stream& stream);
};

// The same on compute capability 9.0 alone (hopper/): embeddings of bf16 and 512 columns; centers of any dtype, which
// are rounded to bf16.
struct HopperPasses {
  static int64_t class_stats(const ClassStatsArgs& args, const int64_t* class_count, const PassOptions& options,
                             void* workspace, const Stream& stream);
  static int64_t weight_grad(const WeightGradArgs& args, const CenterStep* step, const bool* active,
                             const PassOptions& options, void* workspace, const Stream& stream);
};

void target_cosine(const Matrix& embeddings, const Matrix& weight, const int64_t* target, float* cosine,
                   const Stream& stream);
void unit_embedding_grad(const Matrix& weight, const int64_t* target, const float* mean_center,
                         const float* negative_coefficient, const float* target_coefficient, int64_t rows, float* out,
                         const Stream& stream);
void embedding_grad(const float* d_unit, const Matrix& embeddings, const Matrix& d_embeddings, const Stream& stream);
void margin_loss(const float* negative_lse, const float* target_cosine, int64_t rows, double scale,
                 const Margin<float>& margin, float* loss, float* lse, float* d_lse, float* d_cosine,
                 const Stream& stream);

}  // namespace fa::cuda
