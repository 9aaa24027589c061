// Prints what waves.h chooses: splits of so many tiles, or tiles of a chunk. Arguments: splits TILES MOST PLACES/2, or
// tiles BLOCKS NEEDED MOST PLACES/2.
#include "cuda/waves.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

int main(int argc, char** argv) {
  const auto number = [&](int i) { return std::atoll(argv[i]); };
  const bool splits = argc == 5 && std::strcmp(argv[1], "splits") == 0;
  if (!splits && argc != 6) return 2;
  const long long chosen = splits
                               ? fa::cuda::fullest_splits(number(2), number(3), static_cast<int>(number(4)))
                               : fa::cuda::fullest_tiles(number(2), number(3), number(4), static_cast<int>(number(5)));
  std::printf("%lld\n", chosen);
}
