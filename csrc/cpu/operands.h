// Both operands of the products: the batch, packed once per call, and one core's block of classes with the tile of
// cosines between them, and the two products themselves. kernels.cpp alone includes this file.
#pragma once

#include <memory>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "packing.h"
#include "parallel.h"

namespace fa::FA_ISA {

// How many classes and rows of the batch make a tile. At D = 512 one core's working set stays in a 1 MiB L2 and mostly
// in a 512 KiB one: packed classes 96 * 2 KiB, logits 96 * 0.5 KiB, row block 128 * 2 KiB. bench/NOTES.md has the scan.
struct Blocks {
  int64_t classes = 96, rows = 128;
};
static_assert(kMaxSubCenters <= Blocks().classes);

// Depth of one accumulation: a panel of embeddings so deep (32 KiB at the most) stays in L1, or in a smaller one for
// the most part, while all classes of a block pass it. Each accumulation costs some 40 cycles, so it is not shorter.
constexpr int64_t kDepthBlock = 256;

// Of whole classes, and no larger than the problem; as many blocks for each thread, unless they became less than half
// as large: 1000 classes are then 12 blocks of 84 for two threads, not 10 of 96 and a rest.
inline Blocks fitting(const Negatives& negatives, int64_t classes, int64_t rows, int threads) {
  const Blocks largest;
  const int64_t most = largest.classes / negatives.sub_centers * negatives.sub_centers;
  const int64_t least = (classes + most - 1) / most;
  const int64_t count = std::max(least, std::min(round_up(least, threads), classes / (most / 2)));
  const int64_t each = round_up((classes + count - 1) / count, negatives.sub_centers);
  return {each, std::min(largest.rows, rows)};
}

// The batch, packed once per call and laid out twice, by the panels of `pack`.
template <typename P>
struct Batch {
  using T = typename P::Sum;
  using Element = typename P::Element;
  int64_t rows, padded_rows, depth;  // depth: elements of a row
  int64_t padded_columns;            // numbers of a row, whole tiles of columns
  int64_t stride;                    // of `second`
  Scratch<Element> first;            // transposed panels (depth, kColumns) of rows, for the first product
  Scratch<Element> second;           // (padded_rows / P::kDepth, padded_columns), for the second product of weight_pass
  Scratch<T> to_unit;                // (padded_rows,), see Norms
  Scratch<Index<T>> target;          // (padded_rows,)
  Matrix embeddings;
  // Full's rows are the second operand as they are; pairs along the columns become pairs of rows afterwards, in a room
  // of each thread.
  int64_t room;
  Scratch<Element> pairs;
  Scratch<T> numbers;

  Batch(const Matrix& embeddings, const int64_t* targets, int threads)
      : rows(embeddings.rows),
        padded_rows(round_up(rows, kColumns<T>)),
        depth((embeddings.columns + P::kDepth - 1) / P::kDepth),
        padded_columns(round_up(embeddings.columns, kColumns<T>)),
        stride(padded_stride<T>(padded_columns)),
        first(padded_rows * depth),
        second(padded_rows / P::kDepth * stride),
        to_unit(padded_rows),
        target(padded_rows),
        embeddings(embeddings),
        room(P::kDepth > 1 ? kColumns<T> * stride : 0),
        pairs(threads * room),
        numbers(P::kDepth > 1 ? threads * padded_columns : 0) {
    for (int64_t i = 0; i < padded_rows; ++i) target.get()[i] = static_cast<Index<T>>(i < rows ? targets[i] : -1);
  }

  int64_t panels() const { return padded_rows / kColumns<T>; }

  void pack(int64_t panel, int worker) const {
    const int64_t begin = panel * kColumns<T>, count = std::min<int64_t>(kColumns<T>, rows - begin);
    Element* const packed = P::kDepth > 1 ? pairs.get() + worker * room : second.get() + begin * stride;
    InverseNorm<T> unused[kColumns<T>];
    std::fill(packed + count * stride, packed + kColumns<T> * stride, Element(0));
    std::fill(to_unit.get() + begin, to_unit.get() + begin + kColumns<T>, T(0));
    pack_rows(P(), embeddings, begin, count, packed, stride, padded_columns, {unused, to_unit.get() + begin},
              numbers.get() + worker * padded_columns);
    pack_depth(P(), packed, stride, kColumns<T>, padded_columns, second.get() + begin / P::kDepth * stride, stride);
    Element* to = first.get() + begin * depth;
    for (int64_t d = 0; d < depth; ++d)
      for (int r = 0; r < kColumns<T>; ++r) to[d * kColumns<T> + r] = packed[r * stride + d];
  }
};

// One core's scratch: a block of packed classes and the tile of cosines over it, (classes, rows).
template <typename P>
struct Workspace {
  using T = typename P::Sum;
  using Element = typename P::Element;
  Blocks blocks;
  int64_t first_stride, second_stride, padded_columns, tile_stride;
  Scratch<Element> first, second;  // (classes, depth) and (classes / P::kDepth, padded_columns), in Full the same
  Scratch<InverseNorm<T>> inverse_norm;
  Scratch<T> to_unit;  // (classes,)
  Scratch<T> tile, numbers;
  Scratch<Element> second_tile;  // the tile as an operand of the second product, in Full the same
  Prefetch next_classes;

  Workspace(const Batch<P>& batch, Blocks blocks)
      : blocks(blocks),
        first_stride(P::kDepth > 1 ? padded_stride<Element>(batch.padded_columns / P::kDepth) : batch.stride),
        second_stride(batch.stride),
        padded_columns(batch.padded_columns),
        tile_stride(padded_stride<T>(round_up(blocks.rows, kColumns<T>))),
        first(blocks.classes * first_stride),
        second(P::kDepth > 1 ? round_up(blocks.classes, P::kDepth) / P::kDepth * second_stride : 0),
        inverse_norm(blocks.classes),
        to_unit(blocks.classes),
        tile(blocks.classes * tile_stride),
        numbers(padded_columns),
        second_tile(P::kDepth > 1 ? blocks.classes * tile_stride : 0) {}

  // Packs classes [begin, begin + count), and has those after them, up to `last`, fetched while the next `rows` rows
  // are multiplied: a core that waited for memory at each block would lose 8 % (bench/NOTES.md).
  // With an index, class j is row index[j]; those are not fetched ahead.
  void pack(const Matrix& weight, int64_t begin, int64_t count, int64_t last, int64_t rows, bool for_second,
            const int64_t* index = nullptr) {
    pack_rows(P(), weight, begin, count, first.get(), first_stride, padded_columns, {inverse_norm.get(), to_unit.get()},
              numbers.get(), index);
    if (for_second) pack_depth(P(), first.get(), first_stride, count, padded_columns, second.get(), second_stride);
    const int64_t row_bytes = weight.row_stride * element_size(weight.dtype);
    const int64_t next = begin + count, next_count = std::min(blocks.classes, last - next);
    if (weight.column_stride != 1 || weight.row_stride != weight.columns || next_count <= 0 || index != nullptr) return;
    const int64_t depth = (weight.columns + P::kDepth - 1) / P::kDepth;
    const int64_t panels = (rows + kColumns<T> - 1) / kColumns<T> * ((depth + kDepthBlock - 1) / kDepthBlock);
    next_classes = Prefetch(static_cast<const char*>(weight.data) + next * row_bytes, next_count * row_bytes,
                            panels * std::max<int64_t>(1, count / kRows));
  }

  // tile = cosines of the packed classes [0, count) with the batch's rows [row, row + lanes)
  void first_product(const Batch<P>& batch, int64_t count, int64_t row, int64_t lanes) {
    for (int64_t k = 0; k < batch.depth; k += kDepthBlock) {
      const int64_t depth = std::min(kDepthBlock, batch.depth - k);
      for (int64_t r = 0; r < lanes; r += kColumns<T>) {
        Finish<T> finish{k > 0, nullptr, nullptr};
        if (P::kDepth > 1 && k + depth == batch.depth) {
          finish.row_factor = to_unit.get();
          finish.column_factor = batch.to_unit.get() + row + r;
        }
        multiply_panel<P, Layout::kRowMajor>(count, depth, first.get() + k, first_stride,
                                             batch.first.get() + (row + r) * batch.depth + k * kColumns<T>, kColumns<T>,
                                             tile.get() + r, tile_stride, finish, next_classes);
      }
    }
  }

  // sums (rows, columns) += tile' (rows, classes) * unit classes (classes, columns)
  void second_product_over_classes(int64_t count, int64_t rows, int64_t lanes, T* sums, int64_t sums_stride) {
    Prefetch none;
    const Element* const operand = pair_classes(count, lanes);
    const Element* const classes = P::kDepth > 1 ? second.get() : first.get();
    for (int64_t d = 0; d < padded_columns; d += kColumns<T>)
      multiply_panel<P, Layout::kTransposed>(rows, (count + P::kDepth - 1) / P::kDepth, operand, tile_stride,
                                             classes + d, second_stride, sums + d, sums_stride, {true}, none);
  }

  // Rows [begin, begin + count) of a matrix that is written next, to be fetched during one second_product_over_rows.
  Prefetch rows_to_write(const Matrix& m, int64_t begin, int64_t count) const {
    if (m.data == nullptr || m.column_stride != 1 || m.row_stride != m.columns) return {};
    const int64_t row_bytes = m.row_stride * element_size(m.dtype);
    return {static_cast<const char*>(m.data) + begin * row_bytes, count * row_bytes,
            padded_columns / kColumns<T> * std::max<int64_t>(1, count / kRows)};
  }

  // gradient (classes, columns) (+)= tile (classes, rows) * unit batch rows [row, row + rows) (rows, columns)
  void second_product_over_rows(const Batch<P>& batch, int64_t count, int64_t row, int64_t rows, int64_t lanes,
                                T* gradient, Prefetch& ahead) {
    const Element* const operand = pair_rows(batch, count, row, lanes);
    for (int64_t d = 0; d < padded_columns; d += kColumns<T>)
      multiply_panel<P, Layout::kRowMajor>(count, (rows + P::kDepth - 1) / P::kDepth, operand, tile_stride,
                                           batch.second.get() + row / P::kDepth * batch.stride + d, batch.stride,
                                           gradient + d, batch.stride, {row > 0}, ahead);
  }

 private:
  // The tile times its classes' to_unit, as elements of kDepth classes: (count / kDepth, lanes).
  const Element* pair_classes(int64_t count, int64_t lanes) {
    if constexpr (P::kDepth == 1) {
      return tile.get();
    } else {
      for (int64_t j = 0; j < count; j += 2) {
        const T low = to_unit.get()[j], high = j + 1 < count ? to_unit.get()[j + 1] : 0;
        const T* const from = tile.get() + j * tile_stride;
        const T* const below = j + 1 < count ? from + tile_stride : from;
        for (int64_t i = 0; i < lanes; i += kLanes<T>)
          _mm512_storeu_si512(second_tile.get() + j / 2 * tile_stride + i,
                              P::interleave(load(from + i) * low, j + 1 < count ? load(below + i) * high : Vec<T>{}));
      }
      return second_tile.get();
    }
  }

  // The tile times its rows' to_unit, as elements of kDepth rows: (count, lanes / kDepth).
  const Element* pair_rows(const Batch<P>& batch, int64_t count, int64_t row, int64_t lanes) {
    if constexpr (P::kDepth == 1) {
      return tile.get();
    } else {
      for (int64_t i = 0; i < lanes; i += 2 * kLanes<T>) {
        const Vec<T> low = load(batch.to_unit.get() + row + i), high = load(batch.to_unit.get() + row + i + kLanes<T>);
        for (int64_t j = 0; j < count; ++j) {
          const T* const from = tile.get() + j * tile_stride + i;
          _mm512_storeu_si512(second_tile.get() + j * tile_stride + i / 2,
                              P::concatenate(load(from) * low, load(from + kLanes<T>) * high));
        }
      }
      return second_tile.get();
    }
  }
};

template <typename P>
std::vector<std::unique_ptr<Workspace<P>>> make_workspaces(int threads, const Batch<P>& batch, Blocks blocks) {
  std::vector<std::unique_ptr<Workspace<P>>> all;
  for (int t = 0; t < threads; ++t) all.push_back(std::make_unique<Workspace<P>>(batch, blocks));
  return all;
}

}  // namespace fa::FA_ISA
