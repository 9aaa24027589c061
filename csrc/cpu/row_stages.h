// The stages over the rows, O(N D) and O(N): target cosines, each row's loss and its derivatives, and the two halves of
// the embedding gradient. kernels.cpp alone includes this file.
#pragma once

#include "kernels.h"
#include "margin.h"
#include "packing.h"
#include "parallel.h"

namespace fa::FA_ISA {

// Rows of one task.
constexpr int64_t kRowsPerTask = 64;

// Room for a row in the compute type, and how to normalize into it.
template <typename T>
struct UnitRow {
  T* values;  // (padded,)
  int64_t padded;
  InverseNorm<T> inverse_norm;

  const T* read(const Matrix& m, int64_t row) {
    T unused;
    pack_rows(Full<T>(), m, row, 1, values, padded, padded, {&inverse_norm, &unused}, static_cast<T*>(nullptr));
    return values;
  }
};

// fn(row, room for it, room for another) for every row, some of them at a time on each thread.
template <typename T, typename Fn>
void for_each_row(int threads, int64_t rows, int64_t columns, const Fn& fn) {
  const FlushSubnormals flush;
  const int64_t useful = std::clamp<int64_t>(rows * columns / kNumbersPerThread, 1, std::max(threads, 1));
  const int64_t padded = round_up(columns, kColumns<T>);
  const Scratch<T> room(2 * useful * padded);
  for_each_task(static_cast<int>(useful), (rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int worker) {
    const FlushSubnormals flush_here;
    UnitRow<T> first{room.get() + 2 * worker * padded, padded, {}}, second{first.values + padded, padded, {}};
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t i = task * kRowsPerTask; i < end; ++i) fn(i, first, second);
  });
}

// cosine_i of row i with its target's center; 0 where the target is -1 (not here), NaN where it is below (no class).
template <typename T>
void target_cosine(const Matrix& embeddings, const Matrix& weight, const int64_t* target, void* cosine, int threads) {
  T* const out = static_cast<T*>(cosine);
  for_each_row<T>(threads, embeddings.rows, embeddings.columns, [&](int64_t i, UnitRow<T>& x, UnitRow<T>& w) {
    if (target[i] < 0) {
      out[i] = target[i] < -1 ? std::numeric_limits<T>::quiet_NaN() : T(0);
    } else {
      const T product = dot(x.read(embeddings, i), w.read(weight, target[i]), x.padded);
      out[i] = product > 1 ? T(1) : product < -1 ? T(-1) : product;  // NaN stays
    }
  });
}

template <typename T>
void finish_negatives(const FinishArgs& args) {
  for (int64_t i = 0; i < args.rows; ++i) {
    const T sum = static_cast<const T*>(args.negative_sum)[i];
    args.lse[i] = std::log(static_cast<double>(sum)) + (args.shift != nullptr ? args.shift[i] : 0);
    const T* const from = static_cast<const T*>(args.center_sum) + i * args.columns;
    T* const to = static_cast<T*>(args.mean_center) + i * args.columns;
    const T divisor = sum == 0 ? T(1) : sum;
    for (int64_t d = 0; d < args.columns; ++d) to[d] = from[d] / divisor;
  }
}

// d_unit_i = negative_coefficient_i * mean_center_i + target_coefficient_i * (unit center of the target), (N, D).
template <typename T>
void unit_embedding_grad(const Matrix& weight, const int64_t* target, const UnitGradArgs& args, int threads) {
  const int64_t D = weight.columns;
  for_each_row<T>(threads, args.rows, D, [&](int64_t i, UnitRow<T>& w, UnitRow<T>&) {
    const T negative = static_cast<const T*>(args.negative_coefficient)[i];
    const T positive = static_cast<const T*>(args.target_coefficient)[i];
    const T* const mean = static_cast<const T*>(args.mean_center) + i * D;
    T* const out = static_cast<T*>(args.d_unit) + i * D;
    if (target[i] < 0) {
      for (int64_t d = 0; d < D; ++d) out[d] = negative * mean[d];
    } else {
      const T* const unit = w.read(weight, target[i]);
      for (int64_t d = 0; d < D; ++d) out[d] = negative * mean[d] + positive * unit[d];
    }
  });
}

// d_embeddings from d_unit (N, D), the gradient by the unit embeddings.
template <typename T>
void embedding_grad(const void* d_unit, const Matrix& embeddings, const Matrix& d_embeddings, int threads) {
  const int64_t D = embeddings.columns;
  for_each_row<T>(threads, embeddings.rows, D, [&](int64_t i, UnitRow<T>& x, UnitRow<T>& gradient) {
    const T* const from = static_cast<const T*>(d_unit) + i * D;
    T* const row = gradient.values;
    std::copy(from, from + D, row);
    std::fill(row + D, row + gradient.padded, T(0));
    const T* const unit = x.read(embeddings, i);
    project(row, unit, x.inverse_norm, x.padded);
    if (x.inverse_norm.is_short()) saturate(d_embeddings, row);
    write_row(d_embeddings, i, row);
  });
}

template <typename T>
void margin_loss(const MarginLossArgs& args) {
  const auto margin = make_margin<T>(args.m1, args.m2, args.m3, args.boundary, args.straight_through);
  const T scale = static_cast<T>(args.scale);
  const T *const negative_lse = static_cast<const T*>(args.negative_lse), *const cosine =
                                                                              static_cast<const T*>(args.target_cosine);
  T *const loss = static_cast<T*>(args.loss), *const lse = static_cast<T*>(args.lse);
  T *const d_lse = static_cast<T*>(args.d_lse), *const d_cosine = static_cast<T*>(args.d_cosine);
  for (int64_t i = 0; i < args.rows; ++i) {
    const RowLoss<T> row = row_loss(negative_lse[i], cosine[i], scale, margin);
    loss[i] = row.loss, lse[i] = row.lse, d_lse[i] = row.d_lse, d_cosine[i] = row.d_cosine;
  }
}

}  // namespace fa::FA_ISA
