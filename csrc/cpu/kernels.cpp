// The passes over the classes. Compiled once per instruction set (FA_ISA names it), in fp32 and fp64.
//
// A block of classes is packed (converted, normalised) into this core's cache and multiplied with a block of rows; the
// logits of that tile live in scratch memory, become exponentials there and are consumed by the second product at once.
// The target's column is left out, or replaced by its own coefficient, in the tile. Nothing of size N x C exists.
#include "kernels.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "center_sgd.h"
#include "gemm.h"
#include "negatives.h"
#include "packing.h"
#include "parallel.h"
#include "peak.h"
#include "simd.h"

namespace fa::FA_ISA {

namespace {

// Block sizes, in rows of the operands at D = 512, chosen so that one core's working set stays in a 1 MiB L2 and mostly
// in a 512 KiB one: packed classes 96 * 2 KiB, logits 96 * 0.5 KiB, row block 128 * 2 KiB. bench/NOTES.md has the scan.
constexpr int64_t kClassBlock = 96;
constexpr int64_t kRowBlock = 128;
// Depth of one accumulation: a panel of embeddings so deep (16 KiB) stays in L1 while all classes of a block pass it.
constexpr int64_t kDepthBlock = 128;
// A block holds whole classes.
int64_t class_block(const Negatives& negatives) { return kClassBlock / negatives.sub_centres * negatives.sub_centres; }
static_assert(kMaxSubCentres <= kClassBlock);

// Below this many multiply-adds a second thread costs more than it brings.
constexpr double kWorkPerThread = 2e6;

// All slices' centre sums together, whatever the number of threads.
constexpr int64_t kCentreSumBytes = 16 << 20;
constexpr double kLog2e = 1.4426950408889634;

int useful_threads(int threads, double multiply_adds) {
  return static_cast<int>(std::clamp(multiply_adds / kWorkPerThread, 1.0, static_cast<double>(std::max(threads, 1))));
}

// The batch, normalised once per call and laid out twice: by rows, and in transposed panels (D, kColumns) of its rows.
template <typename T>
struct Batch {
  int64_t rows, padded_rows, depth, padded_depth, stride;
  Scratch<T> by_rows, transposed;
  Scratch<Index<T>> target;  // (padded_rows,)

  Batch(const Matrix& embeddings, const int64_t* targets, int threads)
      : rows(embeddings.rows),
        padded_rows(round_up(rows, kColumns<T>)),
        depth(embeddings.columns),
        padded_depth(round_up(depth, kColumns<T>)),
        stride(padded_stride<T>(padded_depth)),
        by_rows(padded_rows * stride),
        transposed(padded_rows * depth),
        target(padded_rows) {
    for (int64_t i = 0; i < padded_rows; ++i) target.get()[i] = static_cast<Index<T>>(i < rows ? targets[i] : -1);
    for_each_task(threads, padded_rows / kColumns<T>, [&](int64_t panel, int) {
      const int64_t first = panel * kColumns<T>, count = std::min<int64_t>(kColumns<T>, rows - first);
      T* packed = by_rows.get() + first * stride;
      T inverse_norm[kColumns<T>];
      pack_rows<T>(embeddings, first, count, packed, stride, padded_depth, inverse_norm);
      std::fill(packed + count * stride, packed + kColumns<T> * stride, T(0));
      T* to = transposed.get() + first * depth;
      for (int64_t d = 0; d < depth; ++d)
        for (int r = 0; r < kColumns<T>; ++r) to[d * kColumns<T> + r] = packed[r * stride + d];
    });
  }
};

// One core's scratch: a block of packed classes and the tile of cosines over it, (classes, rows).
template <typename T>
struct Workspace {
  static constexpr int64_t kTileStride = padded_stride<T>(kRowBlock);
  int64_t stride, padded_depth;
  Scratch<T> classes, inverse_norm, tile;
  Prefetch next_classes;

  explicit Workspace(const Batch<T>& batch)
      : stride(batch.stride),
        padded_depth(batch.padded_depth),
        classes(kClassBlock * stride),
        inverse_norm(kClassBlock),
        tile(kClassBlock * kTileStride) {}

  // Packs classes [first, first + count), and has those after them, up to `last`, fetched while the next `rows` rows
  // are multiplied: a core that waited for memory at each block would lose 8 % (bench/NOTES.md).
  // With an index, class j is row index[j]; those are not fetched ahead.
  void pack(const Matrix& weight, int64_t first, int64_t count, int64_t last, int64_t rows,
            const int64_t* index = nullptr) {
    pack_rows<T>(weight, first, count, classes.get(), stride, padded_depth, inverse_norm.get(), index);
    const int64_t row_bytes = weight.row_stride * element_size(weight.dtype);
    const int64_t next = first + count, next_count = std::min(kClassBlock, last - next);
    if (weight.column_stride != 1 || weight.row_stride != weight.columns || next_count <= 0 || index != nullptr) return;
    const int64_t panels = (rows + kColumns<T> - 1) / kColumns<T> * ((weight.columns + kDepthBlock - 1) / kDepthBlock);
    next_classes = Prefetch(static_cast<const char*>(weight.data) + next * row_bytes, next_count * row_bytes,
                            panels * std::max<int64_t>(1, count / kRows));
  }

  // tile = cosines of the packed classes [0, count) with the batch's rows [first_row, first_row + lanes)
  void cosines(const Batch<T>& batch, int64_t count, int64_t first_row, int64_t lanes) {
    for (int64_t k = 0; k < batch.depth; k += kDepthBlock) {
      const int64_t depth = std::min(kDepthBlock, batch.depth - k);
      for (int64_t r = 0; r < lanes; r += kColumns<T>)
        multiply_panel<T, Layout::kRowMajor>(count, depth, classes.get() + k, stride,
                                             batch.transposed.get() + (first_row + r) * batch.depth + k * kColumns<T>,
                                             kColumns<T>, tile.get() + r, kTileStride, k > 0, next_classes);
    }
  }
};

template <typename T>
std::vector<std::unique_ptr<Workspace<T>>> make_workspaces(int threads, const Batch<T>& batch) {
  std::vector<std::unique_ptr<Workspace<T>>> all;
  for (int t = 0; t < threads; ++t) all.push_back(std::make_unique<Workspace<T>>(batch));
  return all;
}

// Rows of logits' offsets in base 2: shift * log2(e) is rounded to T, which at a scale of 1000 would cost 3e-5 of every
// exponential; `correction` is what the rounding took, 2^(rounded - exact).
template <typename T>
struct Offsets {
  Scratch<T> log2;                 // (padded_rows,)
  std::vector<double> correction;  // (padded_rows,)
  Offsets(const double* offset, int64_t rows, int64_t padded_rows) : log2(padded_rows), correction(padded_rows, 1.0) {
    for (int64_t i = 0; i < padded_rows; ++i) {
      const double exact = offset != nullptr && i < rows ? offset[i] * kLog2e : 0;
      log2.get()[i] = static_cast<T>(exact);
      if (std::isfinite(exact)) correction[i] = std::exp2(log2.get()[i] - exact);
    }
  }
};

// Running statistics of the rows, kept in fp64: a million fp32 terms added one by one would lose four digits.
struct RowStats {
  double sum = 0, max = -std::numeric_limits<double>::infinity();
};

// The cosines of one tile become exp(scale * cos - shift), 0 in the target's place, and count in the rows' statistics.
template <typename T>
void exponentiate(T* tile, int64_t stride, int64_t count, int64_t lanes, int64_t first_class, const Index<T>* target,
                  const T* log2_shift, T log2_scale, bool want_sum, RowStats* stats) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < lanes; i += kLanes<T>) {
    const Mask<T> own = load_index<T>(target + i) - static_cast<Index<T>>(first_class);
    const Vec<T> row_shift = load(log2_shift + i);
    Vec<T> sum = {}, max = broadcast(-kInfinity);
    for (int64_t j = 0; j < count; ++j) {
      T* at = tile + j * stride + i;
      const Vec<T> cosine = load(at);
      const Mask<T> is_target = own == static_cast<Index<T>>(j);
      const Vec<T> negative = is_target ? broadcast(-kInfinity) : cosine;
      max = negative > max ? negative : max;
      if (want_sum) {
        const Vec<T> e = is_target ? Vec<T>{} : exp2<T>(cosine * log2_scale - row_shift);
        sum += e;
        store<T>(at, e);
      }
    }
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      stats[i + lane].sum += sum[lane];
      stats[i + lane].max = std::max<double>(stats[i + lane].max, max[lane]);
    }
  }
}

template <typename T>
void class_stats(const ClassStatsArgs& args, const PassOptions& options) {
  const FlushSubnormals flush;
  const int64_t N = args.embeddings.rows, D = args.embeddings.columns, C = args.weight.rows;
  const int threads = useful_threads(options.threads, static_cast<double>(N) * C * D);
  const Batch<T> batch(args.embeddings, args.target, threads);
  const Offsets<T> shift(args.shift, N, batch.padded_rows);
  const T log2_scale = static_cast<T>(args.scale * kLog2e);
  const int64_t block_size = class_block(options.negatives);
  const bool plain = options.negatives.plain();
  const GeneralNegatives<T> negatives(options.negatives, N, plain ? 0 : batch.padded_rows);

  // A task is a group of rows against a slice of the classes. Slices come first, since each class is then read and
  // packed by one core; their number is bounded by the memory of their centre sums, rows are split for the cores left
  // over. Each slice has statistics of its own, added up in order: the same result whoever computed them.
  const int64_t sum_size = args.centre_sum != nullptr ? batch.padded_rows * batch.stride : 0;
  const int64_t class_blocks = (C + block_size - 1) / block_size;
  const int64_t affordable = std::max<int64_t>(1, kCentreSumBytes / static_cast<int64_t>(sizeof(T)) / (sum_size + 1));
  const int64_t slices = std::min({static_cast<int64_t>(threads), class_blocks, affordable});
  const int64_t group = round_up((N * slices + threads - 1) / threads, kColumns<T>);
  const int64_t groups = (N + group - 1) / group;

  std::vector<RowStats> stats(slices * batch.padded_rows);
  const Scratch<T> centre_sums(slices * sum_size);
  const auto workspaces = make_workspaces(threads, batch);

  for_each_task(threads, groups * slices, [&](int64_t task, int worker) {
    const FlushSubnormals flush_here;
    const int64_t slice = task / groups, begin = task % groups * group, end = std::min(begin + group, N);
    Workspace<T>& work = *workspaces[worker];
    Prefetch none;
    T* centre_sum = centre_sums.get() + slice * sum_size;
    if (sum_size > 0) std::fill(centre_sum + begin * batch.stride, centre_sum + end * batch.stride, T(0));

    const int64_t last_class = std::min(class_blocks * (slice + 1) / slices * block_size, C);
    for (int64_t first_class = class_blocks * slice / slices * block_size; first_class < last_class;
         first_class += block_size) {
      const int64_t count = std::min(block_size, last_class - first_class);
      work.pack(args.weight, first_class, count, last_class, end - begin);
      for (int64_t row = begin; row < end; row += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, end - row), lanes = round_up(rows, kColumns<T>);
        work.cosines(batch, count, row, lanes);
        RowStats* const row_stats = stats.data() + slice * batch.padded_rows + row;
        if (plain)
          exponentiate<T>(work.tile.get(), work.kTileStride, count, lanes, first_class, batch.target.get() + row,
                          shift.log2.get() + row, log2_scale, args.negative_sum != nullptr, row_stats);
        else
          exponentiate_general<T>(negatives, work.tile.get(), work.kTileStride, count, lanes, first_class,
                                  batch.target.get() + row, negatives.threshold.get() + row, shift.log2.get() + row,
                                  log2_scale, args.negative_sum != nullptr, row_stats);
        if (sum_size > 0)
          for (int64_t d = 0; d < batch.padded_depth; d += kColumns<T>)
            multiply_panel<T, Layout::kTransposed>(rows, count, work.tile.get(), work.kTileStride,
                                                   work.classes.get() + d, batch.stride,
                                                   centre_sum + row * batch.stride + d, batch.stride, true, none);
      }
    }
  });

  for (int64_t i = 0; i < N; ++i) {
    RowStats total;
    for (int64_t s = 0; s < slices; ++s) {
      const RowStats& part = stats[s * batch.padded_rows + i];
      total.sum += part.sum;
      total.max = std::max(total.max, part.max);
    }
    static_cast<T*>(args.negative_max)[i] = static_cast<T>(total.max);
    if (args.negative_sum != nullptr)
      static_cast<T*>(args.negative_sum)[i] = static_cast<T>(total.sum * shift.correction[i]);
    if (sum_size > 0) {
      T* out = static_cast<T*>(args.centre_sum) + i * D;
      const T correction = static_cast<T>(shift.correction[i]);
      for (int64_t d = 0; d < D; ++d) {
        T sum = 0;
        for (int64_t s = 0; s < slices; ++s) sum += centre_sums.get()[s * sum_size + i * batch.stride + d];
        out[d] = sum * correction;
      }
    }
  }
}

// The cosines of one tile become the gradient by them: G of WeightGradArgs.
template <typename T>
void differentiate(T* tile, int64_t stride, int64_t count, int64_t lanes, int64_t first_class, const Index<T>* target,
                   const T* log2_lse, const T* negative_coefficient, const T* target_coefficient, T log2_scale) {
  for (int64_t i = 0; i < lanes; i += kLanes<T>) {
    const Mask<T> own = load_index<T>(target + i) - static_cast<Index<T>>(first_class);
    const Vec<T> lse = load(log2_lse + i), negative = load(negative_coefficient + i);
    const Vec<T> positive = load(target_coefficient + i);
    for (int64_t j = 0; j < count; ++j) {
      T* at = tile + j * stride + i;
      const Vec<T> probability = exp2<T>(load(at) * log2_scale - lse);
      store<T>(at, own == static_cast<Index<T>>(j) ? positive : negative * probability);
    }
  }
}

// finish(j, gradient) for each of the C classes that args.weight or, through an index, some of its rows stand for: the
// gradient (D,) by that row, which is no one else's then.
template <typename T, typename Finish>
void weight_pass(const WeightGradArgs& args, const PassOptions& options, const int64_t* index, int64_t C,
                 const Finish& finish) {
  const FlushSubnormals flush;
  const int64_t N = args.embeddings.rows, D = args.embeddings.columns;
  const int threads = useful_threads(options.threads, static_cast<double>(N) * C * D);
  const Batch<T> batch(args.embeddings, args.target, threads);
  const Offsets<T> lse(args.lse, N, batch.padded_rows);
  const T log2_scale = static_cast<T>(args.scale * kLog2e);
  const Scratch<T> negative(batch.padded_rows), positive(batch.padded_rows);
  for (int64_t i = 0; i < batch.padded_rows; ++i) {
    negative.get()[i] =
        i < N ? static_cast<T>(static_cast<const T*>(args.negative_coefficient)[i] * lse.correction[i]) : 0;
    positive.get()[i] = i < N ? static_cast<const T*>(args.target_coefficient)[i] : 0;
  }

  const int64_t block_size = class_block(options.negatives);
  const bool plain = options.negatives.plain();
  const GeneralNegatives<T> negatives(options.negatives, N, plain ? 0 : batch.padded_rows);

  const auto workspaces = make_workspaces(threads, batch);
  const Scratch<T> gradients(threads * kClassBlock * batch.stride);

  for_each_task(threads, (C + block_size - 1) / block_size, [&](int64_t block, int worker) {
    const FlushSubnormals flush_here;
    const int64_t first_class = block * block_size, count = std::min(block_size, C - first_class);
    Workspace<T>& work = *workspaces[worker];
    Prefetch none;
    T* gradient = gradients.get() + worker * kClassBlock * batch.stride;
    work.pack(args.weight, first_class, count, C, N, index);
    for (int64_t row = 0; row < N; row += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, N - row), lanes = round_up(rows, kColumns<T>);
      work.cosines(batch, count, row, lanes);
      if (plain)
        differentiate<T>(work.tile.get(), work.kTileStride, count, lanes, first_class, batch.target.get() + row,
                         lse.log2.get() + row, negative.get() + row, positive.get() + row, log2_scale);
      else
        differentiate_general<T>(negatives, work.tile.get(), work.kTileStride, count, lanes, first_class,
                                 batch.target.get() + row, negatives.threshold.get() + row, lse.log2.get() + row,
                                 negative.get() + row, positive.get() + row, log2_scale);
      for (int64_t d = 0; d < batch.padded_depth; d += kColumns<T>)
        multiply_panel<T, Layout::kRowMajor>(count, rows, work.tile.get(), work.kTileStride,
                                             batch.by_rows.get() + row * batch.stride + d, batch.stride, gradient + d,
                                             batch.stride, row > 0, none);
    }
    for (int64_t j = 0; j < count; ++j) {
      T* row = gradient + j * batch.stride;
      project(row, work.classes.get() + j * batch.stride, work.inverse_norm.get()[j], batch.padded_depth);
      finish(first_class + j, row);
    }
  });
}

template <typename T>
void weight_grad(const WeightGradArgs& args, const PassOptions& options) {
  advise_huge_pages(args.d_weight);
  weight_pass<T>(args, options, nullptr, args.weight.rows,
                 [&](int64_t j, const T* row) { write_row(args.d_weight, j, row); });
}

template <typename T>
void update_centres(const WeightGradArgs& args, const CentreStep& step, const PassOptions& options) {
  const int64_t* const rows = step.rows;
  weight_pass<T>(args, options, rows, step.classes, [&](int64_t j, const T* gradient) {
    step_row(args.weight, step, rows != nullptr ? rows[j] : j, gradient);
  });
}

}  // namespace

#define FA_STRING(x) #x
#define FA_NAME(x) FA_STRING(x)
extern const Kernels kKernels = {FA_NAME(FA_ISA),        class_stats<float>,  class_stats<double>,
                                 weight_grad<float>,     weight_grad<double>, update_centres<float>,
                                 update_centres<double>, multiply_adds<float>};

}  // namespace fa::FA_ISA
