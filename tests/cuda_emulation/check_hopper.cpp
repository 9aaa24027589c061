// Checks the passes of csrc/cuda/hopper against plain loops in fp64, by itself, under every schedule of what happens
// beside the threads. Exit status 1 and a line for each result that is off. Arguments: none, "quick" (five runs),
// "long" (one slice of more classes than a block's accumulators may keep).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>

#include "cuda/kernels.h"
#include "hopper.h"
#include "plain_loops.h"

namespace {

using fa::cuda::HopperPasses;
using namespace plain;

constexpr int D = 512;
constexpr fa::cuda::Stream kStream{0, nullptr};
constexpr double kTolerance = 8e-3;  // of the second products' bf16 operands
constexpr int kPadding = 70;         // rows past the classes, which only the device is told of; NaN

struct Setting {
  int N, C, multiprocessors, cluster;
  bool ordered, odd_rows;
};

// Rows far from 1, which bf16 holds as exactly: their units stay, their gradients are as much smaller or larger.
Problem make_problem(const Setting& s) {
  Problem p(s.N, s.C, D);
  if (s.odd_rows)
    for (int j = 0; j < s.C; j += 17) {
      const double factor = j % 3 == 0 ? 0x1p60 : j % 3 == 1 ? 0x1p-60 : 0x1p45;
      for (int d = 0; d < D; ++d) p.w[j * D + d] *= j == 34 ? 0 : factor;
    }
  return p;
}

template <typename T>
fa::Matrix matrix(T* data, fa::Dtype dtype, int64_t rows, int64_t stride) {
  return {data, dtype, rows, D, stride, 1};
}

// By the stored type: bf16 rows are used where they lie, fp32 rows are copied in chunks.
template <typename Stored>
void check(const Setting& s, const Problem& p, const Answer& answer, const std::vector<Stored>& w, fa::Dtype dtype) {
  const int N = s.N, C = s.C;
  const int64_t stride = D + 8;
  // Chunks of two rounds of blocks and less, where rows are copied.
  const fa::cuda::PassOptions options{0, 256 << 10, s.multiprocessors, s.cluster, s.ordered};
  const std::vector<uint16_t> x = to_bf16(p.x);
  const emulation::GuardedMemory x_memory(rows_bytes<uint16_t>(N, D, D));
  const emulation::GuardedMemory w_memory(rows_bytes<Stored>(C + kPadding, stride, D));
  const emulation::GuardedMemory gradient_memory(rows_bytes<Stored>(C, stride, D));
  uint16_t* const x_rows = place(x, N, D, x_memory);
  Stored* const w_rows = place(w, C, stride, w_memory);
  for (int r = C; r < C + kPadding; ++r) std::memset(w_rows + r * stride, 0xff, D * sizeof(Stored));
  const fa::Matrix embeddings = matrix(x_rows, fa::Dtype::kBFloat16, N, D);
  const int64_t class_count = C;

  std::vector<float> largest(N, NAN), sum(N, NAN), center_sum(N * D, NAN);
  const fa::ClassStatsArgs stats{embeddings,      matrix(w_rows, dtype, C + kPadding, stride),
                                 p.target.data(), kScale,
                                 nullptr,         largest.data(),
                                 sum.data(),      center_sum.data()};
  Workspace forward(HopperPasses::class_stats(stats, &class_count, options, nullptr, kStream));
  HopperPasses::class_stats(stats, &class_count, options, forward.start(), kStream);
  compare("negative_sum", sum, answer.sum, 2e-6);
  compare("negative_max", largest, answer.largest, 1e-6);
  compare("center_sum", center_sum, answer.center_sum, kTolerance, D);

  // Without the centers' sum, and without any sum.
  for (const bool with_sum : {true, false}) {
    fa::ClassStatsArgs totals = stats;
    largest.assign(N, NAN), sum.assign(N, NAN);
    totals.center_sum = nullptr;
    if (!with_sum) totals.negative_sum = nullptr;
    Workspace alone(HopperPasses::class_stats(totals, &class_count, options, nullptr, kStream));
    HopperPasses::class_stats(totals, &class_count, options, alone.start(), kStream);
    if (with_sum) compare("negative_sum alone", sum, answer.sum, 2e-6);
    compare("negative_max alone", largest, answer.largest, 1e-6);
  }

  Stored* const gradient_rows = reinterpret_cast<Stored*>(gradient_memory.start());
  fa::WeightGradArgs args{embeddings,
                          matrix(w_rows, dtype, C, stride),
                          p.target.data(),
                          kScale,
                          answer.lse.data(),
                          answer.negative.data(),
                          answer.positive.data(),
                          matrix(gradient_rows, dtype, C, stride)};
  Workspace backward(HopperPasses::weight_grad(args, nullptr, nullptr, options, nullptr, kStream));
  HopperPasses::weight_grad(args, nullptr, nullptr, options, backward.start(), kStream);
  std::vector<float> gradient;
  for (int j = 0; j < C; ++j)
    for (int d = 0; d < D; ++d) {
      if constexpr (sizeof(Stored) == 2)
        gradient.push_back(__uint_as_float(static_cast<uint32_t>(gradient_rows[j * stride + d]) << 16));
      else
        gradient.push_back(gradient_rows[j * stride + d]);
    }
  compare("weight_grad", gradient, answer.gradient, kTolerance, D, 1e-30);
  if (s.odd_rows) return;

  // A step of SGD with int8 momentum, on the last two thirds of the classes and padding.
  std::vector<int64_t> index(C - C / 3 + kPadding, C), in_index(N);
  std::iota(index.begin(), index.end() - kPadding, C / 3);
  for (int i = 0; i < N; ++i) in_index[i] = p.target[i] >= C / 3 ? p.target[i] - C / 3 : -1;
  std::vector<int8_t> momentum(C * D, 50);
  std::vector<float> units(C * D / 64, 1e-6f);  // a momentum no larger than gradients are
  bool active = true;
  const fa::CenterStep step{index.data(),
                            static_cast<int64_t>(index.size()),
                            fa::MomentumType::kInt8,
                            momentum.data(),
                            units.data(),
                            0.5,
                            0.9,
                            0,
                            7,
                            3,
                            nullptr};
  args.d_weight = {};
  args.target = in_index.data();
  Workspace update(HopperPasses::weight_grad(args, &step, &active, options, nullptr, kStream));
  HopperPasses::weight_grad(args, &step, &active, options, update.start(), kStream);
  std::vector<float> stored(C * D);
  std::vector<double> velocity(C * D);
  for (int j = 0; j < C; ++j)
    for (int d = 0; d < D; ++d) {
      velocity[j * D + d] = j < C / 3 ? 5e-5 : answer.gradient[j * D + d] + 0.9 * 5e-5;
      stored[j * D + d] = static_cast<float>(momentum[j * D + d]) * units[(j * D + d) / 64];
    }
  compare("momentum", stored, velocity, kTolerance + 1.0 / 127, D);
}

void check_all(const Setting& s, int first_schedule, int step) {
  const Problem p = make_problem(s);
  const Answer answer(p);
  for (int schedule = first_schedule; schedule < emulation::kScheduleCount; schedule += step) {
    emulation::use_schedule(schedule);
    std::printf("N = %d, C = %d, %d multiprocessors, cluster %d, %s, schedule %d\n", s.N, s.C, s.multiprocessors,
                s.cluster, s.ordered ? "ordered" : "not ordered", schedule);
    std::fflush(stdout);
    check(s, p, answer, to_bf16(p.w), fa::Dtype::kBFloat16);
    if (!s.odd_rows) check(s, p, answer, to_fp32(p.w), fa::Dtype::kFloat32);
    if (failures > 0) std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string which = argc > 1 ? argv[1] : "";
  if (which == "long") {
    check_all({3, 66 * 512, 1, 1, true, false}, 0, 100);
  } else {
    const bool quick = which == "quick";
    // One slice and several tiles of rows; then slices, the last one short, and chunks.
    check_all({70, 330, 2, 2, true, false}, quick ? 2 : 0, quick ? 3 : 1);
    check_all({130, 265, 6, 1, true, true}, quick ? 1 : 0, quick ? 3 : 1);
    if (!quick) check_all({5, 263, 2, 1, false, false}, 0, 1);
    if (!quick) check_all({66, 400, 6, 2, false, true}, 0, 1);
  }
  std::printf("bank conflicts: %lld\n", static_cast<long long>(emulation::bank_conflicts()));
  return failures > 0 || emulation::bank_conflicts() > 0;
}
