// The passes over the classes. Compiled once per instruction set (FA_ISA names it), in fp32 and fp64.
//
// A block of classes is packed (converted, normalized) into this core's cache and multiplied with a block of rows; the
// logits of that tile live in scratch memory, become exponentials there and are consumed by the second product at once.
// The target's column is left out, or replaced by its own coefficient, in the tile. Nothing of size N x C exists.
#include "kernels.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "center_sgd.h"
#include "negatives.h"
#include "operands.h"
#include "parallel.h"
#include "peak.h"
#include "row_stages.h"
#include "simd.h"
#include "tile.h"

namespace fa::FA_ISA {

namespace {

// Below this many multiply-adds of each product a second thread costs more than it brings: starting one takes 20 to 50
// microseconds, and as much again where the other core sleeps (bench/NOTES.md).
constexpr double kWorkPerThread = 16e6;

// All slices' center sums together, whatever the number of threads.
constexpr int64_t kCenterSumBytes = 16 << 20;

int useful_threads(int threads, double multiply_adds) {
  return static_cast<int>(std::clamp(multiply_adds / kWorkPerThread, 1.0, static_cast<double>(std::max(threads, 1))));
}

// Slices of the classes, one for each thread if there is room for their sums of `sum_size` numbers.
template <typename T>
int64_t affordable_slices(int threads, int64_t class_blocks, int64_t sum_size) {
  const int64_t affordable = kCenterSumBytes / static_cast<int64_t>(sizeof(T)) / (sum_size + 1);
  return std::min({static_cast<int64_t>(threads), class_blocks, std::max<int64_t>(1, affordable)});
}

// fn for every task, as soon as the batch is packed.
template <typename P, typename Fn>
void for_each_task_of(const Batch<P>& batch, int threads, int64_t tasks, const Fn& fn) {
  const auto pack = [&](int64_t panel, int worker) {
    const FlushSubnormals flush_here;
    batch.pack(panel, worker);
  };
  for_each_task_in_turn(threads, batch.panels(), pack, tasks, fn);
}

// Row i of the sum of `slices` matrices (N, stride) that follow each other every `sum_size` numbers, times a factor.
template <typename T>
void sum_slices(const T* sums, int64_t slices, int64_t sum_size, int64_t columns, T factor, T* out) {
  std::copy(sums, sums + columns, out);
  for (int64_t s = 1; s < slices; ++s)
    for (int64_t d = 0; d < columns; ++d) out[d] += sums[s * sum_size + d];
  for (int64_t d = 0; d < columns; ++d) out[d] *= factor;
}

template <typename P>
void class_stats(const ClassStatsArgs& args, const PassOptions& options) {
  using T = typename P::Sum;
  const FlushSubnormals flush;
  const int64_t N = args.embeddings.rows, D = args.embeddings.columns, C = args.weight.rows;
  const int threads = useful_threads(options.threads, static_cast<double>(N) * C * D);
  const Batch<P> batch(args.embeddings, args.target, threads);
  const Offsets<T> shift(args.shift, N, batch.padded_rows);
  const T log2_scale = static_cast<T>(args.scale * kLog2e);
  const Blocks blocks = fitting(options.negatives, C, N, threads);
  const bool plain = options.negatives.plain();
  const GeneralNegatives<T> negatives(options.negatives, N, plain ? 0 : batch.padded_rows);

  // A task is a group of rows against a slice of the classes. Slices come first, since each class is then read and
  // packed by one core; their number is bounded by the memory of their center sums, rows are split for the cores left
  // over. Each slice has statistics of its own, added up in order: the same result whoever computed them.
  const int64_t sum_size = args.center_sum != nullptr ? batch.padded_rows * batch.stride : 0;
  const int64_t class_blocks = (C + blocks.classes - 1) / blocks.classes;
  const int64_t slices = affordable_slices<T>(threads, class_blocks, sum_size);
  const int64_t group = round_up((N * slices + threads - 1) / threads, kColumns<T>);
  const int64_t groups = (N + group - 1) / group;

  std::vector<RowStats> stats(slices * batch.padded_rows);
  std::vector<double> moments(options.moments != nullptr ? slices * batch.padded_rows * kMoments : 0);
  const Scratch<T> center_sums(slices * sum_size);
  const auto workspaces = make_workspaces(threads, batch, blocks);

  const auto group_pass = [&](int64_t task, int worker) {
    const FlushSubnormals flush_here;
    const int64_t slice = task / groups, begin = task % groups * group, end = std::min(begin + group, N);
    Workspace<P>& work = *workspaces[worker];
    T* center_sum = center_sums.get() + slice * sum_size;
    if (sum_size > 0) std::fill(center_sum + begin * batch.stride, center_sum + end * batch.stride, T(0));

    const int64_t last_class = std::min(class_blocks * (slice + 1) / slices * blocks.classes, C);
    for (int64_t first_class = class_blocks * slice / slices * blocks.classes; first_class < last_class;
         first_class += blocks.classes) {
      const int64_t count = std::min(blocks.classes, last_class - first_class);
      work.pack(args.weight, first_class, count, last_class, end - begin, sum_size > 0);
      for (int64_t row = begin; row < end; row += blocks.rows) {
        const int64_t rows = std::min(blocks.rows, end - row), lanes = round_up(rows, kColumns<T>);
        work.first_product(batch, count, row, lanes);
        RowStats* const row_stats = stats.data() + slice * batch.padded_rows + row;
        if (options.moments != nullptr)
          sum_moments<T>(work.tile.get(), work.tile_stride, count, lanes, first_class, batch.target.get() + row,
                         shift.log2.get() + row, log2_scale, row_stats,
                         moments.data() + (slice * batch.padded_rows + row) * kMoments);
        else if (plain)
          exponentiate<T>(work.tile.get(), work.tile_stride, count, lanes, first_class, batch.target.get() + row,
                          shift.log2.get() + row, log2_scale, args.negative_sum != nullptr, row_stats);
        else
          exponentiate_general<T>(negatives, work.tile.get(), work.tile_stride, count, lanes, first_class,
                                  batch.target.get() + row, negatives.threshold.get() + row, shift.log2.get() + row,
                                  log2_scale, args.negative_sum != nullptr, row_stats);
        if (sum_size > 0)
          work.second_product_over_classes(count, rows, lanes, center_sum + row * batch.stride, batch.stride);
      }
    }
  };
  for_each_task_of(batch, threads, groups * slices, group_pass);

  for (int64_t i = 0; i < N; ++i) {
    RowStats total;
    for (int64_t s = 0; s < slices; ++s) {
      const RowStats& part = stats[s * batch.padded_rows + i];
      total.sum += part.sum;
      total.max = std::max(total.max, part.max);
    }
    for (int k = 0; options.moments != nullptr && k < kMoments; ++k) {
      double sum = 0;
      for (int64_t s = 0; s < slices; ++s) sum += moments[(s * batch.padded_rows + i) * kMoments + k];
      options.moments[i * kMoments + k] = sum * shift.correction[i];
    }
    static_cast<T*>(args.negative_max)[i] = static_cast<T>(total.max);
    if (args.negative_sum != nullptr)
      static_cast<T*>(args.negative_sum)[i] = static_cast<T>(total.sum * shift.correction[i]);
    if (sum_size > 0)
      sum_slices(center_sums.get() + i * batch.stride, slices, sum_size, D, static_cast<T>(shift.correction[i]),
                 static_cast<T*>(args.center_sum) + i * D);
  }
}

// receive(j, gradient, is_short) for each of the C classes that args.weight or, through an index, some of its rows
// stand for: the gradient (D,) by that row, which is no one else's then, and whether the row is shorter than epsilon.
template <typename P, typename Receive>
void weight_pass(const WeightGradArgs& args, const PassOptions& options, const int64_t* index, int64_t C,
                 const Receive& receive) {
  using T = typename P::Sum;
  const FlushSubnormals flush;
  const int64_t N = args.embeddings.rows, D = args.embeddings.columns;
  const int threads = useful_threads(options.threads, static_cast<double>(N) * C * D);
  const Batch<P> batch(args.embeddings, args.target, threads);
  const Offsets<T> lse(args.lse, N, batch.padded_rows);
  const T log2_scale = static_cast<T>(args.scale * kLog2e);
  const Scratch<T> negative(batch.padded_rows), positive(batch.padded_rows);
  for (int64_t i = 0; i < batch.padded_rows; ++i) {
    negative.get()[i] =
        i < N ? static_cast<T>(static_cast<const T*>(args.negative_coefficient)[i] * lse.correction[i]) : 0;
    positive.get()[i] = i < N ? static_cast<const T*>(args.target_coefficient)[i] : 0;
  }

  const Blocks blocks = fitting(options.negatives, C, N, threads);
  const bool plain = options.negatives.plain();
  const GeneralNegatives<T> negatives(options.negatives, N, plain ? 0 : batch.padded_rows);

  const auto workspaces = make_workspaces(threads, batch, blocks);
  const Scratch<T> gradients(threads * blocks.classes * batch.stride);

  // A task is a block of classes. With the rows' gradient it is as many as make a slice, for sums that are added up in
  // order.
  const bool by_rows = options.negative_grad != nullptr;
  const int64_t class_blocks = (C + blocks.classes - 1) / blocks.classes, sum_size = batch.padded_rows * batch.stride;
  const int64_t slices = by_rows ? affordable_slices<T>(threads, class_blocks, sum_size) : class_blocks;
  const Scratch<T> row_sums(by_rows ? slices * sum_size : 0);
  if (by_rows) std::fill(row_sums.get(), row_sums.get() + slices * sum_size, T(0));

  const auto block_pass = [&](int64_t block, int64_t slice, int worker) {
    const int64_t first_class = block * blocks.classes, count = std::min(blocks.classes, C - first_class);
    Workspace<P>& work = *workspaces[worker];
    T* gradient = gradients.get() + worker * blocks.classes * batch.stride;
    work.pack(args.weight, first_class, count, C, std::max<int64_t>(N, 1), by_rows, index);
    if (N == 0) std::fill(gradient, gradient + count * batch.stride, T(0));  // no block of rows writes it
    for (int64_t row = 0; row < N; row += blocks.rows) {
      const int64_t rows = std::min(blocks.rows, N - row), lanes = round_up(rows, kColumns<T>);
      T* const tile = work.tile.get();
      const Index<T>* const target = batch.target.get() + row;
      work.first_product(batch, count, row, lanes);
      if (plain) {
        differentiate<T>(tile, work.tile_stride, count, lanes, lse.log2.get() + row, negative.get() + row, log2_scale);
        if (by_rows) {
          place_targets<T>(tile, work.tile_stride, count, lanes, first_class, target, nullptr);
          work.second_product_over_classes(count, rows, lanes, row_sums.get() + slice * sum_size + row * batch.stride,
                                           batch.stride);
        }
        place_targets<T>(tile, work.tile_stride, count, lanes, first_class, target, positive.get() + row);
      } else {
        differentiate_general<T>(negatives, tile, work.tile_stride, count, lanes, first_class, target,
                                 negatives.threshold.get() + row, lse.log2.get() + row, negative.get() + row,
                                 positive.get() + row, log2_scale);
      }
      // The gradient's own memory is fetched meanwhile: a core that waited for it row by row would lose 10 %.
      Prefetch written;
      if (row + rows == N) written = work.rows_to_write(args.d_weight, first_class, count);
      work.second_product_over_rows(batch, count, row, rows, lanes, gradient, written);
    }
    for (int64_t j = 0; j < count; ++j) {
      T* row = gradient + j * batch.stride;
      const InverseNorm<T> inverse_norm = work.inverse_norm.get()[j];
      const T* const unit = unit_row(P(), work.first.get() + j * work.first_stride, work.to_unit.get()[j],
                                     batch.padded_columns, work.numbers.get());
      project(row, unit, inverse_norm, batch.padded_columns);
      receive(first_class + j, row, inverse_norm.is_short());
    }
  };
  for_each_task_of(batch, threads, slices, [&](int64_t slice, int worker) {
    const FlushSubnormals flush_here;
    for (int64_t block = class_blocks * slice / slices; block < class_blocks * (slice + 1) / slices; ++block)
      block_pass(block, slice, worker);
  });

  for (int64_t i = 0; by_rows && i < N; ++i)
    sum_slices(row_sums.get() + i * batch.stride, slices, sum_size, D, T(1),
               static_cast<T*>(options.negative_grad) + i * D);
}

template <typename P>
void weight_grad(const WeightGradArgs& args, const PassOptions& options) {
  advise_huge_pages(args.d_weight);
  weight_pass<P>(args, options, nullptr, args.weight.rows, [&](int64_t j, typename P::Sum* row, bool is_short) {
    if (is_short) saturate(args.d_weight, row);
    write_row(args.d_weight, j, row);
  });
}

template <typename P>
void update_centers(const WeightGradArgs& args, const CenterStep& step, const PassOptions& options) {
  const int64_t* const rows = step.rows;
  weight_pass<P>(args, options, rows, step.classes, [&](int64_t j, const typename P::Sum* gradient, bool) {
    step_row(args.weight, step, rows != nullptr ? rows[j] : j, gradient);
  });
}

}  // namespace

#define FA_STRING(x) #x
#define FA_NAME(x) FA_STRING(x)
#if defined(__AVX512BF16__)
#define FA_BF16(pass) pass<BFloat16Pairs>
#else
#define FA_BF16(pass) nullptr
#endif
#define FA_PASSES(pass) {pass<Full<float>>, pass<Full<double>>, FA_BF16(pass), nullptr}
#define FA_STAGES(stage) {stage<float>, stage<double>, nullptr, nullptr}
extern const Kernels kKernels = {
    FA_NAME(FA_ISA),           FA_PASSES(class_stats),   FA_PASSES(weight_grad),      FA_PASSES(update_centers),
    FA_PASSES(multiply_adds),  FA_STAGES(target_cosine), FA_STAGES(finish_negatives), FA_STAGES(unit_embedding_grad),
    FA_STAGES(embedding_grad), FA_STAGES(margin_loss)};

}  // namespace fa::FA_ISA
