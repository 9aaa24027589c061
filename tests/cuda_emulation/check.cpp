// Checks the kernels in bf16 and in fp32 against plain loops in fp64, by itself: for ThreadSanitizer, which Python
// would stand in the way of, and for mutants of the sources, which are compiled one by one. Exit status 1 and a line
// for each result that is off. With the argument "quick" the first problem alone: two chunks of classes, more stages
// than are kept in shared memory.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/passes.h"
#include "guarded.h"

namespace {

using fa::cuda::Precision;

struct Problem {
  int N, C, D;
  std::vector<double> x, w;  // (N, D), (C, D), numbers that bf16 holds
  std::vector<int64_t> target;

  Problem(int N, int C, int D) : N(N), C(C), D(D), x(N * D), w(C * D), target(N) {
    std::mt19937 random(N * 31 + C * 7 + D);
    std::uniform_int_distribution<int> digit(-40, 40);
    for (double& value : x) value = digit(random) / 16.0;
    for (double& value : w) value = digit(random) / 16.0;
    for (int i = 0; i < N; ++i) target[i] = i % 5 == 4 ? -1 : static_cast<int64_t>(i) * 37 % C;
    target[0] = C - 1;
  }

  std::vector<double> units(const std::vector<double>& rows, int count) const {
    std::vector<double> unit(rows);
    for (int r = 0; r < count; ++r) {
      double squares = 0;
      for (int d = 0; d < D; ++d) squares += rows[r * D + d] * rows[r * D + d];
      for (int d = 0; d < D; ++d) unit[r * D + d] /= std::sqrt(squares);
    }
    return unit;
  }
};

std::vector<uint16_t> to_bf16(const std::vector<double>& values) {
  std::vector<uint16_t> bits;
  for (const double value : values) bits.push_back(fa::cuda::to_bf16(static_cast<float>(value)).bits);
  return bits;
}
std::vector<float> to_fp32(const std::vector<double>& values) { return {values.begin(), values.end()}; }

int failures = 0;

void compare(const char* what, const std::vector<float>& got, const std::vector<double>& right, double tolerance) {
  double largest = 0, worst = 0;
  for (const double value : right) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < right.size(); ++i) {
    const double error = std::abs(got[i] - right[i]) / largest;
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  const bool ok = worst <= tolerance;
  std::printf("%-24s error %.1e, allowed %.1e%s\n", what, worst, tolerance, ok ? "" : "  WRONG");
  failures += !ok;
}

constexpr double kScale = 12;
constexpr int kPadding = 3;  // rows past the classes, which only the device is told of; NaN

template <typename T>
int64_t rows_bytes(int64_t rows, int64_t stride, int64_t columns) {
  return ((rows - 1) * stride + columns) * static_cast<int64_t>(sizeof(T));
}
// Rows that lie one after the other, `stride` apart in guarded memory.
template <typename T>
T* place(const std::vector<T>& values, int rows, int64_t stride, const emulation::GuardedMemory& memory) {
  T* const to = reinterpret_cast<T*>(memory.start());
  const int64_t columns = static_cast<int64_t>(values.size()) / rows;
  for (int r = 0; r < rows; ++r) std::copy_n(values.data() + r * columns, columns, to + r * stride);
  return to;
}

// `stride`: of the rows of the weight and of its gradient.
template <Precision precision, typename Stored>
void check(const Problem& p, const std::vector<Stored>& x, const std::vector<Stored>& w, int64_t stride, bool chunks,
           fa::Dtype dtype, double tolerance) {
  using fa::cuda::Passes;
  const int N = p.N, C = p.C, D = p.D;
  const auto unit_x = p.units(p.x, N), unit_w = p.units(p.w, C);
  std::vector<double> sum(N), largest(N, -2), center_sum(N * D), d_unit(C * D), gradient(C * D), lse(N);
  std::vector<float> negative(N), positive(N);
  std::vector<double> cosine(static_cast<size_t>(N) * C);
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < C; ++j) {
      double& value = cosine[static_cast<size_t>(i) * C + j];
      for (int d = 0; d < D; ++d) value += unit_x[i * D + d] * unit_w[j * D + d];
      if (j == p.target[i]) continue;
      const double e = std::exp(kScale * value);
      sum[i] += e;
      largest[i] = std::max(largest[i], value);
      for (int d = 0; d < D; ++d) center_sum[i * D + d] += e * unit_w[j * D + d];
    }
    lse[i] = std::log(sum[i]);
    negative[i] = 0.5f + static_cast<float>(i % 7) / 4;
    positive[i] = -1.5f + static_cast<float>(i % 3) / 4;
  }
  for (int j = 0; j < C; ++j) {
    double norm = 0, along = 0;
    for (int d = 0; d < D; ++d) norm += p.w[j * D + d] * p.w[j * D + d];
    for (int i = 0; i < N; ++i) {
      const double g = j == p.target[i]
                           ? static_cast<double>(positive[i])
                           : negative[i] * std::exp(kScale * cosine[static_cast<size_t>(i) * C + j] - lse[i]);
      for (int d = 0; d < D; ++d) d_unit[j * D + d] += g * unit_x[i * D + d];
    }
    for (int d = 0; d < D; ++d) along += d_unit[j * D + d] * unit_w[j * D + d];
    for (int d = 0; d < D; ++d) gradient[j * D + d] = (d_unit[j * D + d] - along * unit_w[j * D + d]) / std::sqrt(norm);
  }

  // Chunks of one tile of classes; or all at once, their second product in several splits.
  const fa::cuda::PassOptions options =
      chunks ? fa::cuda::PassOptions{0, 0, 2} : fa::cuda::PassOptions{1 << 30, 1 << 30, 16};
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
  std::vector<char> workspace(Passes<precision>::class_stats(stats, &class_count, options, nullptr, stream) + 256,
                              '\xff');
  const auto aligned = [&] {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256);
  };
  Passes<precision>::class_stats(stats, &class_count, options, aligned(), stream);
  compare("negative_sum", got_sum, sum, 2e-6);
  compare("negative_max", got_max, largest, 1e-6);
  compare("center_sum", got_center_sum, center_sum, tolerance);

  float* const gradient_rows = reinterpret_cast<float*>(gradient_memory.start());
  fa::WeightGradArgs args{
      x_matrix,   w_matrix,        p.target.data(), kScale,
      lse.data(), negative.data(), positive.data(), {gradient_rows, fa::Dtype::kFloat32, C, D, stride, 1}};
  workspace.assign(Passes<precision>::weight_grad(args, nullptr, nullptr, options, nullptr, stream) + 256, '\xff');
  Passes<precision>::weight_grad(args, nullptr, nullptr, options, aligned(), stream);
  std::vector<float> got_gradient(C * D);
  for (int j = 0; j < C; ++j) std::copy_n(gradient_rows + j * stride, D, got_gradient.data() + j * D);
  compare("weight_grad", got_gradient, gradient, tolerance);

  // A step of SGD with int8 momentum, whose units are shared by the lanes of a warp.
  std::vector<int8_t> momentum(C * D, 50);
  const int blocks = (D + 63) / 64;
  std::vector<float> units(C * blocks, 0.01f);
  const bool active = true;
  std::vector<int64_t> index(C + kPadding, C);
  std::iota(index.begin(), index.begin() + C, 0);
  const fa::CenterStep step{
      index.data(), C + kPadding, fa::MomentumType::kInt8, momentum.data(), units.data(), 0.5, 0.9, 0, 7, 3, nullptr};
  args.d_weight = {};
  workspace.assign(Passes<precision>::weight_grad(args, &step, &active, options, nullptr, stream) + 256, '\xff');
  Passes<precision>::weight_grad(args, &step, &active, options, aligned(), stream);
  std::vector<float> stored(C * D);
  std::vector<double> velocity(C * D);
  for (int j = 0; j < C; ++j)
    for (int d = 0; d < D; ++d) {
      velocity[j * D + d] = gradient[j * D + d] + 0.9 * 0.5;
      stored[j * D + d] = static_cast<float>(momentum[j * D + d]) * units[j * blocks + d / 64];
    }
  compare("momentum", stored, velocity, tolerance + 1.0 / 127);
}

void check_both(int N, int C, int D, int64_t stride, bool chunks) {
  const Problem problem(N, C, D);
  std::printf("N = %d, C = %d, D = %d\n", N, C, D);
  check<Precision::kBFloat16>(problem, to_bf16(problem.x), to_bf16(problem.w), stride, chunks, fa::Dtype::kBFloat16,
                              8e-3);
  check<Precision::kFloat32>(problem, to_fp32(problem.x), to_fp32(problem.w), stride, chunks, fa::Dtype::kFloat32,
                             2e-5);
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
