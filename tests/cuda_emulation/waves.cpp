// Prints what waves.h chooses: splits of so many tiles, or tiles of a chunk. Arguments: splits TILES MOST
// MULTIPROCESSORS; first NEEDED MOST MULTIPROCESSORS BLOCKS DEPTH, for one product; both, for two, with the second
// one's BLOCKS DEPTH.
#include "cuda/waves.h"

#include <cstdio>
#include <cstdlib>
#include <string>

int main(int argc, char** argv) {
  const auto number = [&](int i) { return std::atoll(argv[i]); };
  const std::string what = argc > 1 ? argv[1] : "";
  const auto chosen = [&]() -> long long {
    const int multiprocessors = static_cast<int>(number(4));
    if (what == "splits") return fa::cuda::best_splits(number(2), number(3), multiprocessors);
    const fa::cuda::ChunkProduct first{number(5), number(6)};
    if (what == "first") return fa::cuda::best_tiles({first}, number(2), number(3), multiprocessors);
    return fa::cuda::best_tiles({first, {number(7), number(8)}}, number(2), number(3), multiprocessors);
  };
  if (argc != (what == "splits" ? 5 : what == "first" ? 7 : 9)) return 2;
  std::printf("%lld\n", chosen());
}
