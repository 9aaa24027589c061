// The passes on the host. Plain bf16 centers take one launch a pass, and one for each two million classes forward.
// Other centers are copied to bf16 in chunks, with a launch for each.
#include "../passes.h"
#include "backward.h"
#include "forward.h"
#include "tensor_map.h"
#include "totals.h"

namespace fa::cuda {

using namespace hopper;

namespace {

// A launch of the forward pass takes so many centers as they are stored. Their norms take 12 bytes each.
constexpr int64_t kClassesAtOnce = 1 << 21;

Panel as_panel(const PreparedRows& rows) {
  return {nullptr, nullptr, rows.inverse, rows.reciprocal, rows.rows, kColumns};
}

PreparedRows take_rows(Arena& arena, int64_t count, bool copied, int* odd) {
  const int64_t rows = round_up(std::max<int64_t>(count, 1), kRows);
  return {copied ? arena.take<BFloat16>(rows * kColumns) : nullptr,
          arena.take<float>(rows),
          arena.take<float>(rows),
          arena.take<float>(rows),
          odd,
          rows};
}

void prepare(const Matrix& m, const RowSelection& selection, PreparedRows rows, const Stream& stream) {
  // The last chunk may have fewer rows.
  rows.rows = std::min(rows.rows, round_up(std::max<int64_t>(selection.count, 1), kRows));
  const auto start = [&](auto* data, auto* kernel) {
    launch("prepare_rows", kernel, {ceil_div(rows.rows, kRowThreads / kWarp)}, kRowThreads, 0, stream, data,
           m.row_stride, m.column_stride, selection, rows);
  };
  if (m.dtype == Dtype::kFloat32) start(static_cast<const float*>(m.data), prepare_rows_kernel<float>);
  if (m.dtype == Dtype::kBFloat16) start(static_cast<const BFloat16*>(m.data), prepare_rows_kernel<BFloat16>);
  if (m.dtype == Dtype::kFloat16) start(static_cast<const Float16*>(m.data), prepare_rows_kernel<Float16>);
}

// Both passes start with a copy of the batch and the terms of its rows.
struct Batch {
  const Matrix& embeddings;
  const double* device_scale;
  int* odd;  // of the classes
  PreparedRows rows;
  RowTerms terms;

  Batch(Arena& arena, const Matrix& embeddings, int multiple, const PassOptions& options)
      : embeddings(embeddings),
        device_scale(options.scale),
        odd(arena.take<int>(1)),
        rows(take_rows(arena, round_up(std::max<int64_t>(embeddings.rows, 1), kRows * multiple), true, odd)) {
    terms = {arena.take<float>(rows.rows), arena.take<float>(rows.rows), arena.take<float>(rows.rows),
             arena.take<float>(rows.rows), arena.take<int64_t>(rows.rows)};
  }

  int64_t blocks() const { return rows.rows / kRows; }
  TensorMap map() const { return make_map(rows.values, rows.rows, kColumns); }

  void start(double scale, const double* shift, const int64_t* target, const float* negative_coefficient,
             const float* target_coefficient, const Stream& stream) const {
    prepare(embeddings, {0, embeddings.rows, nullptr, nullptr, embeddings.rows}, rows, stream);
    launch("row_terms", row_terms_kernel, {ceil_div(rows.rows, kRowThreads)}, kRowThreads, 0, stream, as_panel(rows),
           embeddings.rows, scale, device_scale, shift, target, negative_coefficient, target_coefficient, terms);
  }
};

// Calls fn(selection, values, stride, tensor map) for each chunk of classes, after its rows are prepared.
template <typename Fn>
void for_each_chunk(const Matrix& weight, RowSelection selection, const PreparedRows& rows, const Stream& stream,
                    const Fn& fn) {
  const int64_t all = selection.count;
  for (selection.first = 0; selection.first < all; selection.first += rows.rows) {
    selection.count = std::min(rows.rows, all - selection.first);
    if (rows.inverse != nullptr) prepare(weight, selection, rows, stream);
    const BFloat16* const values =
        rows.values != nullptr ? rows.values
                               : static_cast<const BFloat16*>(weight.data) + selection.first * weight.row_stride;
    const int64_t stride = rows.values != nullptr ? kColumns : weight.row_stride;
    fn(selection, values, stride, make_map(values, rows.values != nullptr ? rows.rows : selection.count, stride));
  }
}

// Returns the number of classes of a chunk: as many as the budget allows, in whole rounds of the multiprocessors.
int64_t chunk_of(int64_t classes, bool copied, bool with_gradient, const PassOptions& options) {
  const int64_t bytes = kColumns * (copied ? sizeof(BFloat16) : 0) + kColumns * (with_gradient ? sizeof(float) : 0);
  const int64_t round = int64_t{kRows} * options.multiprocessors;
  return std::min(std::max<int64_t>(options.center_bytes / bytes / round, 1) * round, classes);
}

// Writes projected gradients (classes of a chunk, 512) into a matrix of any dtype and strides.
__global__ void __launch_bounds__(kRowThreads)
    finish_gradient_kernel(const float* gradient, RowSelection selection, const float* reciprocal, Matrix d_weight) {
  const int lane = threadIdx.x % kWarp;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  if (j >= selection.count) return;
  const int64_t row = selection.first + j;
  const bool is_short = reciprocal != nullptr && reciprocal[j] < 0;
  for (int d = 4 * lane; d < kColumns; d += 4 * kWarp) {
    float by_row[4];
    load_four(gradient + j * kColumns + d, 1, 4, by_row);
    visit_dtype(d_weight, [&](auto* data) {
      store_four(data + row * d_weight.row_stride + d * d_weight.column_stride, d_weight.column_stride, 4, by_row,
                 [is_short](float value, auto* to, int) { convert_gradient(value, is_short, to); });
    });
  }
}

// True if the kernel itself can write the gradient, eight neighbors at a time.
template <typename Out>
bool fits(const Matrix& m, Dtype dtype) {
  constexpr int64_t kEach = 16 / sizeof(Out);
  return m.dtype == dtype && m.column_stride == 1 && m.row_stride % kEach == 0 && aligned(m.data, 16);
}

// Returns the number of blocks of the backward pass: as many as run at once, in whole clusters.
int64_t blocks_at_once(int64_t classes, const PassOptions& options) {
  const int64_t clusters = std::max(options.multiprocessors / options.cluster, 1);
  return std::min(ceil_div(ceil_div(classes, kRows), options.cluster), clusters) * options.cluster;
}

template <typename End>
void launch_weight_grad(const TensorMap& classes, const TensorMap& batch, const BackwardArgs<End>& args,
                        const PassOptions& options, const Stream& stream) {
  const Grid grid{blocks_at_once(args.selection.count, options), 1, 1, options.cluster};
  launch("weight_grad", options.cluster == 2 ? weight_grad_kernel<2, End> : weight_grad_kernel<1, End>, grid,
         kBlockThreads, sizeof(Shared<BatchTerms>), stream, classes, batch, args);
}

}  // namespace

int64_t HopperPasses::class_stats(const ClassStatsArgs& args, const int64_t* class_count, const PassOptions& options,
                                  void* workspace, const Stream& stream) {
  const int64_t N = args.embeddings.rows, C = args.weight.rows;
  const bool copied = !is_plain(args.weight), stored = args.center_sum != nullptr;
  const int per_block = stored ? 1 : kTotalGroups;  // blocks of 64 batch rows
  Arena arena(workspace);
  const Batch batch(arena, args.embeddings, options.cluster * per_block, options);
  const int64_t chunk = copied ? chunk_of(C, true, false, options) : std::min(C, kClassesAtOnce);
  const PreparedRows classes = take_rows(arena, chunk, copied, batch.odd);
  // One round of blocks; each slice of the classes at least a tile.
  const int64_t blocks = batch.blocks() / per_block;
  const int64_t slices = std::clamp<int64_t>(options.multiprocessors / blocks, 1, classes.rows / kRows);
  const int64_t sums = slices * batch.rows.rows, numbers = stored ? sums * kColumns : 0;
  const RowStats stats{arena.take<float>(sums), arena.take<float>(sums), true};
  float* const partial = arena.take<float>(numbers);
  if (arena.counting()) return arena.used();

  const bool pairs = options.cluster == 2;
  const auto kernel = stored ? (pairs ? class_sums_kernel<2> : class_sums_kernel<1>)
                             : (pairs ? class_totals_kernel<2> : class_totals_kernel<1>);
  const OnDevice device(stream);
  launch("start", start_kernel, {4 * int64_t{options.multiprocessors}}, kRowThreads, 0, stream, sums, stats, numbers,
         partial, batch.odd);
  batch.start(args.scale, args.shift, args.target, nullptr, nullptr, stream);
  const TensorMap map = batch.map();
  for_each_chunk(args.weight, {0, C, nullptr, class_count, C}, classes, stream,
                 [&](const RowSelection& selection, const BFloat16*, int64_t, const TensorMap& of_classes) {
                   const int slice = static_cast<int>(ceil_div(ceil_div(selection.count, kRows), slices));
                   const ForwardArgs forward{classes, selection, batch.terms, batch.rows.rows,
                                             slice,   stats,     partial,     options.ordered};
                   launch(stored ? "class_sums" : "class_totals", kernel, {blocks, slices, 1, options.cluster},
                          kBlockThreads, sizeof(Shared<ClassTerms>), stream, map, of_classes, forward);
                 });
  launch("finish_row_stats", finish_row_stats_kernel, {ceil_div(N, kWarp)}, kRowThreads, kFinishSharedBytes, stream,
         stats.sums, stats.maxima, static_cast<int>(slices), batch.rows.rows, N, batch.terms, batch.rows.inverse,
         static_cast<float*>(args.negative_sum), static_cast<float*>(args.negative_max));
  if (stored)
    launch("finish_center_sum", finish_center_sum_kernel, {ceil_div(N, kRowThreads / kWarp)}, kRowThreads, 0, stream,
           partial, static_cast<int>(slices), batch.rows.rows, int64_t{kColumns}, N, kColumns, batch.terms,
           static_cast<float*>(args.center_sum));
  return arena.used();
}

int64_t HopperPasses::weight_grad(const WeightGradArgs& args, const CenterStep* step, const bool* active,
                                  const PassOptions& options, void* workspace, const Stream& stream) {
  const Matrix& d_weight = args.d_weight;
  RowSelection selection{0, args.weight.rows, nullptr, nullptr, args.weight.rows};
  if (step != nullptr) selection.index = step->rows, selection.count = step->classes;
  const bool copied = !is_plain(args.weight) || selection.index != nullptr;
  const bool as_bf16 = fits<BFloat16>(d_weight, Dtype::kBFloat16), as_fp32 = fits<float>(d_weight, Dtype::kFloat32);
  const bool elsewhere = step == nullptr && !as_bf16 && !as_fp32;  // a kernel by rows writes the gradient
  Arena arena(workspace);
  const Batch batch(arena, args.embeddings, 1, options);
  const int64_t chunk = copied || elsewhere ? chunk_of(selection.count, copied, elsewhere, options) : selection.count;
  PreparedRows classes{};
  if (copied)
    classes = take_rows(arena, chunk, true, batch.odd);
  else
    classes.rows = round_up(chunk, kRows);
  BatchTerms* const batch_terms = arena.take<BatchTerms>(batch.blocks());
  const int64_t kept = step != nullptr ? blocks_at_once(chunk, options) * kRows : elsewhere ? classes.rows : 0;
  float* const gradient = kept > 0 ? arena.take<float>(kept * kColumns) : nullptr;
  if (arena.counting()) return arena.used();

  const OnDevice device(stream);
  batch.start(args.scale, args.lse, args.target, static_cast<const float*>(args.negative_coefficient),
              static_cast<const float*>(args.target_coefficient), stream);
  launch("batch_terms", batch_terms_kernel, {ceil_div(batch.rows.rows, kRowThreads)}, kRowThreads, 0, stream,
         batch.terms, batch.rows.rows, batch_terms);
  const TensorMap map = batch.map();
  for_each_chunk(
      args.weight, selection, classes, stream,
      [&](const RowSelection& selection, const BFloat16* values, int64_t stride, const TensorMap& of_classes) {
        const auto start = [&](const auto& end) {
          using End = std::decay_t<decltype(end)>;
          const BackwardArgs<End> backward{
              classes, selection, {values, stride}, batch_terms, static_cast<int>(batch.blocks()),
              end,     active,    options.ordered};
          launch_weight_grad(of_classes, map, backward, options, stream);
        };
        const int64_t to = selection.first * d_weight.row_stride;
        if (step != nullptr) return start(CenterStepOut{args.weight, *step, gradient});
        if (as_bf16)
          return start(GradientOut<BFloat16>{static_cast<BFloat16*>(d_weight.data) + to, d_weight.row_stride});
        if (as_fp32) return start(GradientOut<float>{static_cast<float*>(d_weight.data) + to, d_weight.row_stride});
        start(GradientOut<float>{gradient, kColumns});
        launch("finish_gradient", finish_gradient_kernel, {ceil_div(selection.count, kRowThreads / kWarp)}, kRowThreads,
               0, stream, gradient, selection, classes.reciprocal, d_weight);
      });
  return arena.used();
}

}  // namespace fa::cuda
