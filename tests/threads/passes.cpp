// Passes of the portable kernels by several callers at once, with several threads each and scratch memory that they hand
// to one another, for ThreadSanitizer. Prints the number of wrong results.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

int main() {
  constexpr int64_t N = 96, C = 3000, D = 128;  // enough for two threads of each caller
  std::vector<float> x(N * D), w(C * D);
  for (int64_t i = 0; i < N * D; ++i) x[i] = std::sin(static_cast<float>(i));
  for (int64_t i = 0; i < C * D; ++i) w[i] = std::cos(static_cast<float>(i));
  std::vector<int64_t> target(N);
  for (int64_t i = 0; i < N; ++i) target[i] = i * 7;
  const fa::Matrix embeddings{x.data(), fa::Dtype::kFloat32, N, D, D, 1};
  const fa::Matrix weight{w.data(), fa::Dtype::kFloat32, C, D, D, 1};
  const fa::Kernels& kernels = fa::portable::kKernels;

  struct Results {
    std::vector<float> maximum, sum, center_sum, gradient, cosine;
    explicit Results() : maximum(N), sum(N), center_sum(N * D), gradient(C * D), cosine(N) {}
    bool operator==(const Results& other) const {
      return maximum == other.maximum && sum == other.sum && center_sum == other.center_sum &&
             gradient == other.gradient && cosine == other.cosine;
    }
  };
  const std::vector<double> lse(N, 10.0);
  const std::vector<float> coefficient(N, 0.5f);
  const auto compute = [&](Results& r) {
    const fa::PassOptions options{2, {}};
    kernels.class_stats[0]({embeddings, weight, target.data(), 16.0, nullptr, r.maximum.data(), r.sum.data(),
                            r.center_sum.data()},
                           options);
    kernels.weight_grad[0]({embeddings, weight, target.data(), 16.0, lse.data(), coefficient.data(), coefficient.data(),
                            {r.gradient.data(), fa::Dtype::kFloat32, C, D, D, 1}},
                           options);
    kernels.target_cosine[0](embeddings, weight, target.data(), r.cosine.data(), 2);
  };

  Results right;
  compute(right);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&] {
      for (int round = 0; round < 3; ++round) {
        Results mine;
        compute(mine);
        wrong += !(mine == right);
      }
    });
  for (std::thread& caller : callers) caller.join();
  std::printf("%d wrong\n", wrong.load());
  return wrong.load();
}
