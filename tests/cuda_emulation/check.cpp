// Checks the kernels in bf16 and in fp32 against plain loops in fp64, by itself: for ThreadSanitizer, which Python
// would stand in the way of, and for mutants of the sources, which are compiled one by one. Exit status 1 and a line
// for each result that is off. With the argument "quick" the first problem alone: two chunks of classes, more stages
// than are kept in shared memory.
#include <cstdio>
#include <cstring>
#include <numeric>

#include "cuda/passes.h"
#include "plain_loops.h"

namespace {

using fa::cuda::Precision;
using namespace plain;

constexpr int kPadding = 3;  // rows past the classes, which only the device is told of; NaN

// `stride`: of the rows of the weight and of its gradient. `general`: by the kernels for negatives that are not plain,
// with thresholds that no cosine exceeds, so that the answer is the same.
template <Precision precision, typename Stored>
void check(const Problem& p, const std::vector<Stored>& x, const std::vector<Stored>& w, int64_t stride, bool chunks,
           bool general, fa::Dtype dtype, double tolerance) {
  const int N = p.N, C = p.C, D = p.D;
  using fa::cuda::Passes;
  const Answer answer(p);
  // Chunks of one tile of classes; or all at once, their second product in several splits.
  fa::cuda::PassOptions options = chunks ? fa::cuda::PassOptions{0, 0, 2} : fa::cuda::PassOptions{1 << 30, 1 << 30, 16};
  const std::vector<float> threshold(N, 2.0f);
  const double coefficients[4] = {NAN, NAN, NAN, NAN};
  if (general) options.negatives = {1, threshold.data(), coefficients};
  const fa::cuda::Stream stream{0, nullptr};
  const emulation::GuardedMemory x_memory(rows_bytes<Stored>(N, D, D));
  const emulation::GuardedMemory w_memory(rows_bytes<Stored>(C + kPadding, stride, D));
  const emulation::GuardedMemory gradient_memory(rows_bytes<float>(C, stride, D));
  const fa::Matrix x_matrix{place(x, N, D, x_memory), dtype, N, D, D, 1};
  Stored* const w_rows = place(w, C, stride, w_memory);
  for (int r = C; r < C + kPadding; ++r) std::memset(w_rows + r * stride, 0xff, D * sizeof(Stored));
  const fa::Matrix w_matrix{w_rows, dtype, C, D, stride, 1}, padded{w_rows, dtype, C + kPadding, D, stride, 1};
  const int64_t class_count = C;
  std::vector<float> got_max(N, NAN), got_sum(N, NAN), got_center_sum(N * D, NAN);
  fa::ClassStatsArgs stats{x_matrix, padded,         p.target.data(), kScale,
                           nullptr,  got_max.data(), got_sum.data(),  got_center_sum.data()};
  Workspace forward(Passes<precision>::class_stats(stats, &class_count, options, nullptr, stream));
  Passes<precision>::class_stats(stats, &class_count, options, forward.start(), stream);
  compare("negative_sum", got_sum, answer.sum, 2e-6);
  compare("negative_max", got_max, answer.largest, 1e-6);
  compare("center_sum", got_center_sum, answer.center_sum, tolerance);

  float* const gradient_rows = reinterpret_cast<float*>(gradient_memory.start());
  fa::WeightGradArgs args{x_matrix,
                          w_matrix,
                          p.target.data(),
                          kScale,
                          answer.lse.data(),
                          answer.negative.data(),
                          answer.positive.data(),
                          {gradient_rows, fa::Dtype::kFloat32, C, D, stride, 1}};
  Workspace backward(Passes<precision>::weight_grad(args, nullptr, nullptr, options, nullptr, stream));
  Passes<precision>::weight_grad(args, nullptr, nullptr, options, backward.start(), stream);
  std::vector<float> got_gradient(C * D);
  for (int j = 0; j < C; ++j) std::copy_n(gradient_rows + j * stride, D, got_gradient.data() + j * D);
  compare("weight_grad", got_gradient, answer.gradient, tolerance);

  // A step of SGD with int8 momentum, whose units are shared by the lanes of a warp.
  std::vector<int8_t> momentum(C * D, 50);
  const int blocks = (D + 63) / 64;
  std::vector<float> units(C * blocks, 1e-6f);  // a momentum no larger than gradients are
  const bool active = true;
  std::vector<int64_t> index(C + kPadding, C);
  std::iota(index.begin(), index.begin() + C, 0);
  const fa::CenterStep step{
      index.data(), C + kPadding, fa::MomentumType::kInt8, momentum.data(), units.data(), 0.5, 0.9, 0, 7, 3, nullptr};
  args.d_weight = {};
  Workspace update(Passes<precision>::weight_grad(args, &step, &active, options, nullptr, stream));
  Passes<precision>::weight_grad(args, &step, &active, options, update.start(), stream);
  std::vector<float> stored(C * D);
  std::vector<double> velocity(C * D);
  for (int j = 0; j < C; ++j)
    for (int d = 0; d < D; ++d) {
      velocity[j * D + d] = answer.gradient[j * D + d] + 0.9 * 5e-5;
      stored[j * D + d] = static_cast<float>(momentum[j * D + d]) * units[j * blocks + d / 64];
    }
  compare("momentum", stored, velocity, tolerance + 1.0 / 127);
}

void check_both(int N, int C, int D, int64_t stride, bool chunks) {
  const Problem problem(N, C, D);
  for (const bool general : {false, true}) {
    std::printf("N = %d, C = %d, D = %d%s\n", N, C, D, general ? ", general" : "");
    check<Precision::kBFloat16>(problem, to_bf16(problem.x), to_bf16(problem.w), stride, chunks, general,
                                fa::Dtype::kBFloat16, 8e-3);
    check<Precision::kFloat32>(problem, to_fp32(problem.x), to_fp32(problem.w), stride, chunks, general,
                               fa::Dtype::kFloat32, 2e-5);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
  check_both(5, 131, 136, 136, true);
  if (!quick) {
    check_both(130, 140, 200, 200, false);
    check_both(3, 12, 8, int64_t{1} << 28, true);  // offsets past 32 bits, in memory that is hardly touched
  }
  std::printf("bank conflicts: %lld\n", static_cast<long long>(emulation::bank_conflicts()));
  return failures > 0 || emulation::bank_conflicts() > 0;
}
