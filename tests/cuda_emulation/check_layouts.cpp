// Checks the descriptors of csrc/cuda/hopper/wgmma.h and the emulated products against CuTe's layouts. Operands are
// placed, and results are read, by those layouts alone. Exit status 1 if a product differs from the plain one.
//
// The layouts are as CuTe of CUTLASS 4.2.0 prints them, (shape):(stride):
//
//   SM90::GMMA::ALayout_64x16      ((4,8,4),(2,2,2)):((128,1,16),(64,8,512))    (thread, value) -> row + 64 depth
//   SM90::GMMA::CLayout_64xN<N>    ((4,8,4),(2,2,N/8)):((128,1,16),(64,8,512))  (thread, value) -> row + 64 column
//   Layout_K_SW128_Atom<bfloat16_t>, tiled to 64 x 512
//       Sw<3,3,3> o ((8,8),(64,8)):((64,512),(1,4096))                          (row, column) -> offset
//
// CuTe's MN-major tile of 512 x 64 has the same offsets with its modes swapped.
#include <cstdio>

#include "cuda/hopper/block.h"

namespace {

using namespace fa::cuda;
using namespace fa::cuda::hopper;

struct Mode {
  int size, stride;
};
// CuTe's way to take an index apart: the first mode runs fastest.
template <int modes>
int offset_of(int index, const Mode (&of)[modes]) {
  int offset = 0;
  for (const Mode& mode : of) offset += index % mode.size * mode.stride, index /= mode.size;
  return offset;
}

constexpr Mode kThread[] = {{4, 128}, {8, 1}, {4, 16}}, kValue[] = {{2, 64}, {2, 8}, {32, 512}};
constexpr Mode kTileRow[] = {{8, 64}, {8, 512}}, kTileColumn[] = {{64, 1}, {8, 4096}};

int fragment(int thread, int value) { return offset_of(thread, kThread) + offset_of(value, kValue); }
int place_in_tile(int row, int column) {
  const int linear = offset_of(row, kTileRow) + offset_of(column, kTileColumn);
  return linear ^ (linear >> 3 & 7 << 3);  // Sw<3,3,3>: bits 3 to 5 with bits 6 to 8
}

// Small integers, which bf16 and the sums hold exactly.
int a_number(int row, int depth) { return (row * 5 + depth * 3) % 11 - 5; }
int weight_number(int row, int depth) { return (row * 3 + depth * 7) % 13 - 6; }
int tile_number(int row, int column) { return (row * 7 + column * 5 + row * column) % 9 - 4; }

float scores[kRows * kRows], sums[kRows * kColumns];  // by row + 64 column

void multiply() {
  const int t = threadIdx.x;
  auto* const tile = reinterpret_cast<fa::BFloat16*>(swizzled_shared());
  fa::BFloat16* const weights = tile + kRows * kColumns;
  for (int i = t; i < kRows * kColumns; i += kWarpGroup) {
    const int row = i % kRows, column = i / kRows;
    store_shared(tile + place_in_tile(row, column), to_bf16(static_cast<float>(tile_number(row, column))));
    if (column < kRows)
      store_shared(weights + place_in_tile(row, column), to_bf16(static_cast<float>(weight_number(row, column))));
  }
  fence_async();
  __syncthreads();

  const uint64_t rows = rows_of_depth(shared_address(tile));
  static uint32_t a[kWarpGroup][kSteps][4];
  Scores d = {};
  product_fence();
  for (int k = 0; k < kSteps; ++k) {
    for (int v = 0; v < 8; v += 2) {
      const auto number = [&](int value) {
        const int at = fragment(t, value);
        return static_cast<float>(a_number(at % kRows, 16 * k + at / kRows));
      };
      a[t][k][v / 2] = pack_bf16(number(v), number(v + 1));
    }
    multiply_scores(d, a[t][k], further(rows, k / 4 * kBoxBytes + k % 4 * 32), k > 0);
  }
  product_commit();
  product_wait(d);
  for (int v = 0; v < 32; ++v) scores[fragment(t, v)] = d[v];

  for (int half = 0; half < 2; ++half) {
    Sums u = {};
    const uint64_t columns = rows_of_columns(shared_address(tile) + half * (kTileBytes / 2), kBoxBytes);
    product_fence();
    for (int k = 0; k < kRows / 16; ++k)
      multiply_values(u, further(rows_of_depth(shared_address(weights)), k * 32), further(columns, k * 16 * 128));
    product_commit();
    product_wait(u);
    for (int v = 0; v < 128; ++v) sums[fragment(t, v) + half * kRows * kColumns / 2] = u[v];
  }
}

}  // namespace

int main() {
  emulation::run(dim3(1), kWarpGroup, kTileBytes + kBoxBytes, multiply);
  int wrong_scores = 0, wrong_sums = 0;
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kRows; ++j) {
      int right = 0;
      for (int k = 0; k < kColumns; ++k) right += a_number(i, k) * tile_number(j, k);
      wrong_scores += scores[i + kRows * j] != static_cast<float>(right);
    }
    for (int c = 0; c < kColumns; ++c) {
      int right = 0;
      for (int k = 0; k < kRows; ++k) right += weight_number(i, k) * tile_number(k, c);
      wrong_sums += sums[i + kRows * c] != static_cast<float>(right);
    }
  }
  std::printf("scores: %d of %d differ; sums: %d of %d\n", wrong_scores, kRows * kRows, wrong_sums, kRows * kColumns);
  return wrong_scores + wrong_sums > 0;
}
