// The passes over the classes, on the host: a chunk of classes at a time is packed, multiplied with the batch and,
// while its exponentials are still in L2, consumed by the second product. Everything is launches on one stream; every
// sum has an order that depends on the sizes alone.
#pragma once

#include <algorithm>

#include "negatives.h"
#include "products.h"
#include "waves.h"

namespace fa::cuda {

// Pieces of the caller's workspace; without one it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    char* const at = base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }
  bool counting() const { return base_ == nullptr; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <Precision precision>
struct Pass {
  using First = typename Operands<precision>::First;
  using Second = typename Operands<precision>::Second;

  const Matrix& embeddings;
  const Matrix& weight;
  RowSelection classes;  // rows of weight that take part
  const Negatives& negatives;
  const double* device_scale;
  const Stream& stream;
  Arena arena;
  Panel x, w;
  RowTerms terms;

  // What a pass does with a chunk's exponentials.
  enum class Kind { kSummed, kStored, kGradient };

  Pass(const Matrix& embeddings, const Matrix& weight, const RowSelection& classes, Kind kind,
       const PassOptions& options, void* workspace, const Stream& stream)
      : embeddings(embeddings),
        weight(weight),
        classes(classes),
        negatives(options.negatives),
        device_scale(options.scale),
        stream(stream),
        arena(workspace) {
    this->classes.per_tile = kTile / negatives.sub_centers * negatives.sub_centers;
    const int64_t width = round_up(embeddings.columns, kTile);
    // One tile where there are no rows: a step of the centers has momentum and weight decay even so.
    x = take_panel(round_up(std::max<int64_t>(embeddings.rows, 1), kTile), width);
    // As many classes as the budgets allow and fill the multiprocessors, at least one tile of them, at most all.
    int64_t chunk = options.center_bytes / (width * static_cast<int64_t>(sizeof(First)));
    if (kind != Kind::kSummed)
      chunk = std::min(chunk, options.exponential_bytes / (x.rows * static_cast<int64_t>(sizeof(Second))));
    const int64_t most = std::max<int64_t>(chunk / kTile, 1), needed = tiles_of(classes.count);
    const ChunkProduct first{x.rows / kTile, width}, second{width / kTile, x.rows};
    // The second product of a forward pass is split, whatever the chunk.
    const int64_t tiles = kind == Kind::kGradient ? best_tiles({first, second}, needed, most, options.multiprocessors)
                                                  : best_tiles({first}, needed, most, options.multiprocessors);
    w = take_panel(tiles * kTile, width);
    terms = {arena.take<float>(x.rows), arena.take<float>(x.rows),   arena.take<float>(x.rows),
             arena.take<float>(x.rows), arena.take<int64_t>(x.rows), !negatives.plain()};
  }

  // Tiles of a panel for so many rows of weight.
  int64_t tiles_of(int64_t count) const { return ceil_div(count, classes.per_tile); }
  // Partial results of a tile's columns: one for each half of it, or one.
  int64_t slots() const { return negatives.plain() ? 2 : 1; }

  Panel take_panel(int64_t rows, int64_t width) {
    char* const values = reinterpret_cast<char*>(arena.take<First>(rows * width));
    char* const second =
        precision == Precision::kFloat16 ? reinterpret_cast<char*>(arena.take<Second>(rows * width)) : values;
    return {values, second, arena.take<float>(rows), arena.take<float>(rows), rows, width};
  }

  void pack(const Matrix& m, const RowSelection& rows, const Panel& panel) const {
    if (m.dtype == Dtype::kFloat32) pack_from<float>(m, rows, panel);
    if (m.dtype == Dtype::kBFloat16) pack_from<BFloat16>(m, rows, panel);
    if (m.dtype == Dtype::kFloat16) pack_from<Float16>(m, rows, panel);
  }
  template <typename Source>
  void pack_from(const Matrix& m, const RowSelection& rows, const Panel& panel) const {
    launch("pack_rows", pack_rows_kernel<Source, precision>, {ceil_div(panel.rows, kRowThreads / kWarp)}, kRowThreads,
           0, stream, static_cast<const Source*>(m.data), m.row_stride, m.column_stride, rows,
           static_cast<int>(m.columns), panel);
  }

  void start(double scale, const double* shift, const int64_t* target, const float* negative_coefficient,
             const float* target_coefficient) const {
    pack(embeddings, {0, embeddings.rows, nullptr, nullptr, embeddings.rows}, x);
    launch("row_terms", row_terms_kernel, {ceil_div(x.rows, kRowThreads)}, kRowThreads, 0, stream, x, embeddings.rows,
           scale, device_scale, shift, target, negative_coefficient, target_coefficient, terms);
  }

  // fn(chunk, grid of its tiles) for each chunk, packed.
  template <typename Fn>
  void for_each_chunk(const Fn& fn) const {
    Chunk chunk{w, classes};
    const int64_t step = w.rows / kTile * classes.per_tile;
    for (int64_t first = 0; first < classes.count; first += step) {
      chunk.classes.first = first;
      chunk.classes.count = std::min(step, classes.count - first);
      pack(weight, chunk.classes, w);
      fn(chunk, Grid{x.rows / kTile, tiles_of(chunk.classes.count)});
    }
  }
};

template <Precision precision>
int64_t Passes<precision>::class_stats(const ClassStatsArgs& args, const int64_t* class_count,
                                       const PassOptions& options, void* workspace, const Stream& stream) {
  using Second = typename Operands<precision>::Second;
  const bool stored = args.center_sum != nullptr;
  const int64_t N = args.embeddings.rows, D = args.embeddings.columns, C = args.weight.rows;
  using Kind = typename Pass<precision>::Kind;
  Pass<precision> pass(args.embeddings, args.weight, {0, C, nullptr, class_count, C},
                       stored ? Kind::kStored : Kind::kSummed, options, workspace, stream);
  const Panel& x = pass.x;
  const int64_t slots = pass.slots() * pass.w.rows / kTile;
  float* const sums = pass.arena.template take<float>(slots * x.rows);
  float* const maxima = pass.arena.template take<float>(slots * x.rows);
  Second* const exponentials = stored ? pass.arena.template take<Second>(x.rows * pass.w.rows) : nullptr;
  // Splits of the classes: each at least a tile of them deep, and their partial sums within 64 MiB.
  const int64_t within = (int64_t{64} << 20) / (x.rows * x.width * static_cast<int64_t>(sizeof(float)));
  const int64_t most = std::clamp<int64_t>(within, 1, pass.w.rows / kTile);
  const int64_t splits = best_splits(x.rows / kTile * (x.width / kTile), most, options.multiprocessors);
  float* const partial = stored ? pass.arena.template take<float>(splits * x.rows * x.width) : nullptr;
  if (pass.arena.counting()) return pass.arena.used();

  const OnDevice device(stream);
  pass.start(args.scale, args.shift, args.target, nullptr, nullptr);
  pass.for_each_chunk([&](const Chunk& chunk, const Grid& grid) {
    const bool accumulate = chunk.classes.first > 0;
    const RowStats stats{sums, maxima, accumulate};
    if (pass.negatives.plain())
      launch("class_stats", class_stats_kernel<precision>, grid, kThreads, kSharedBytes, stream, x, chunk,
             static_cast<int>(D), pass.terms, stats, exponentials);
    else
      launch("general_stats", general_stats_kernel<precision>, grid, kThreads, kSharedBytes, stream, x, chunk,
             static_cast<int>(D), pass.terms, pass.negatives, N, stats, args.negative_sum == nullptr, exponentials);
    if (stored)
      launch("center_sum", center_sum_kernel<precision>, {x.width / kTile, x.rows / kTile, splits}, kThreads,
             kSharedBytes, stream, exponentials, chunk, x.rows, accumulate, partial);
  });
  const float* const inverse = pass.negatives.plain() ? x.inverse : nullptr;
  launch("finish_row_stats", finish_row_stats_kernel, {ceil_div(N, kWarp)}, kRowThreads, kFinishSharedBytes, stream,
         sums, maxima, static_cast<int>(slots), x.rows, N, pass.terms, inverse, static_cast<float*>(args.negative_sum),
         static_cast<float*>(args.negative_max));
  if (stored)
    launch("finish_center_sum", finish_center_sum_kernel, {ceil_div(N, kRowThreads / kWarp)}, kRowThreads, 0, stream,
           partial, static_cast<int>(splits), x.rows, x.width, N, static_cast<int>(D), pass.terms,
           static_cast<float*>(args.center_sum));
  return pass.arena.used();
}

template <Precision precision>
int64_t Passes<precision>::weight_grad(const WeightGradArgs& args, const CenterStep* step, const bool* active,
                                       const PassOptions& options, void* workspace, const Stream& stream) {
  using Second = typename Operands<precision>::Second;
  const int64_t N = args.embeddings.rows, D = args.embeddings.columns;
  RowSelection classes{0, args.weight.rows, nullptr, nullptr, args.weight.rows};
  if (step != nullptr) classes.index = step->rows, classes.count = step->classes;
  Pass<precision> pass(args.embeddings, args.weight, classes, Pass<precision>::Kind::kGradient, options, workspace,
                       stream);
  const Panel& x = pass.x;
  const int64_t slots = pass.slots() * x.rows / kTile;
  float* const along = pass.arena.template take<float>(slots * pass.w.rows);
  Second* const gradient = pass.arena.template take<Second>(x.rows * pass.w.rows);
  if (pass.arena.counting()) return pass.arena.used();

  const OnDevice device(stream);
  const CenterGradient out{args.d_weight, args.weight, step != nullptr ? *step : CenterStep{}, active};
  pass.start(args.scale, args.lse, args.target, static_cast<const float*>(args.negative_coefficient),
             static_cast<const float*>(args.target_coefficient));
  pass.for_each_chunk([&](const Chunk& chunk, const Grid& grid) {
    if (pass.negatives.plain())
      launch("class_gradient", class_gradient_kernel<precision>, grid, kThreads, kSharedBytes, stream, x, chunk,
             static_cast<int>(D), pass.terms, along, gradient);
    else
      launch("general_gradient", general_gradient_kernel<precision>, grid, kThreads, kSharedBytes, stream, x, chunk,
             static_cast<int>(D), pass.terms, pass.negatives, N, along, gradient);
    launch("center_gradient", center_gradient_kernel<precision>, {x.width / kTile, grid.y}, kThreads, kSharedBytes,
           stream, gradient, x, N, chunk, along, static_cast<int>(slots), out);
  });
  return pass.arena.used();
}

}  // namespace fa::cuda
