// The float32 numbers y of a row that are to be quantised, a run of them at a time.
//
//   h = x, or round_to(x's dtype, x + residual)
//   n = (h - mean) * (1 / sqrt(mean((h - mean)^2) + eps)) * weight + bias,   mean 0 in an rms norm
//   y = n, or activation(x) * up;  y * (1 / smooth);  rotated (see rotate.hpp)
//
// each operation rounded, and only those that the problem has.
//
// Compiled once per instruction set (see float_rows.hpp).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/problem.hpp"
#include "cpu/activation.hpp"
#include "cpu/float_rows.hpp"
#include "cpu/quantize/moments.hpp"
#include "cpu/quantize/rotate.hpp"

namespace fastq::cpu {
namespace {

constexpr int64_t kQuantizeRun = 512;     // elements that are worked on at a time
constexpr int64_t kQuantizeHeld = 16384;  // a row up to here is computed once and held
constexpr int kActivationBlock = 32;
static_assert(kQuantizeRun % kRotateBlock == 0 && kQuantizeRun % kActivationBlock == 0 &&
              kQuantizeRun % kMomentLanes == 0 && kQuantizeHeld % kQuantizeRun == 0);

template <class Visit>  // void visit(int64_t column, int64_t count)
inline void for_each_run(int64_t cols, const Visit& visit) {
  for (int64_t c = 0; c < cols; c += kQuantizeRun) {
    visit(c, cols - c < kQuantizeRun ? cols - c : kQuantizeRun);
  }
}

// x as it is: in place where it is float32 already, else converted for each look at it.
class PlainValues {
 public:
  explicit PlainValues(const QuantizeProblem& p)
      : p_(p), in_place_(p.x_dtype == DType::kFloat32 && p.stride_xc == 1) {}

  static bool suffice(const QuantizeProblem& p) {
    return p.norm == Norm::kNone && p.activation == Activation::kNone && p.up.data == nullptr &&
           p.smooth.data == nullptr && p.rotation == 0;
  }

  void begin(int64_t row) { row_ = row; }

  const float* first_look(int64_t column, int64_t count) {
    const int64_t offset = row_ * p_.stride_xr + column * p_.stride_xc;
    if (in_place_) return static_cast<const float*>(p_.x) + offset;
    load_floats(p_.x, p_.x_dtype, offset, p_.stride_xc, count, run_);
    return run_;
  }
  const float* next_look(int64_t column, int64_t count) { return first_look(column, count); }

 private:
  const QuantizeProblem& p_;
  const bool in_place_;
  int64_t row_ = 0;
  alignas(64) float run_[kQuantizeRun];
};

// x as it is, with zeros for its outliers.
class InlierValues {
 public:
  explicit InlierValues(const QuantizeProblem& p) : p_(p) {}

  void begin(int64_t row) { row_ = row; }

  const float* first_look(int64_t column, int64_t count) {
    load_floats(p_.x, p_.x_dtype, row_ * p_.stride_xr + column * p_.stride_xc, p_.stride_xc, count,
                run_);
    const float threshold = p_.threshold;  // a NaN is below any
    for (int64_t i = 0; i < count; ++i) {
      run_[i] = __builtin_fabsf(run_[i]) >= threshold ? 0.0f : run_[i];
    }
    return run_;
  }
  const float* next_look(int64_t column, int64_t count) { return first_look(column, count); }

 private:
  const QuantizeProblem& p_;
  int64_t row_ = 0;
  alignas(64) float run_[kQuantizeRun];
};

// y of every other problem.
class ComputedValues {
 public:
  explicit ComputedValues(const QuantizeProblem& p)
      : p_(p),
        fits_(p.cols <= kQuantizeHeld),
        holds_(fits_ && (!p.is_static || p.norm != Norm::kNone)) {
    if (p.smooth.data == nullptr || !fits_) return;
    for_each_run(p.cols, [&](int64_t c, int64_t count) {
      load_reciprocals(p.smooth, c, count, reciprocals_ + c);
    });
  }

  void begin(int64_t row) {
    row_ = row;
    if (p_.norm != Norm::kNone) measure();
  }

  const float* first_look(int64_t column, int64_t count) {
    float* y = place(column);
    if (p_.norm != Norm::kNone) {
      if (!holds_) load_again(column, count, y);
      normalize(column, count, y);
    } else {
      load_x(column, count, y);
      activate_run(column, count, y);
    }
    if (p_.smooth.data != nullptr) smooth(column, count, y);
    if (p_.rotation != 0) rotate(y, count, p_.rotation);
    return y;
  }
  const float* next_look(int64_t column, int64_t count) {
    return holds_ ? held_ + column : first_look(column, count);
  }

 private:
  float* place(int64_t column) { return holds_ ? held_ + column : held_; }

  void load_x(int64_t column, int64_t count, float* to) const {
    load_floats(p_.x, p_.x_dtype, row_ * p_.stride_xr + column * p_.stride_xc, p_.stride_xc, count,
                to);
  }
  void load_matrix(const MatrixView& from, int64_t column, int64_t count, float* to) const {
    load_floats(from.data, from.dtype, row_ * from.stride_m + column * from.stride_n, from.stride_n,
                count, to);
  }

  // h for the first time. residual_out may be residual's own memory, so that is read only here.
  void load_sum(int64_t column, int64_t count, float* h) {
    load_x(column, count, h);
    if (p_.residual.data == nullptr) return;
    load_matrix(p_.residual, column, count, operand_);
    for (int64_t i = 0; i < count; ++i) h[i] += operand_[i];
    store_floats(h, count, p_.residual_out, p_.x_dtype, row_ * p_.stride_or + column * p_.stride_oc,
                 p_.stride_oc);
    if (p_.x_dtype != DType::kFloat32) load_again(column, count, h);  // rounded
  }
  void load_again(int64_t column, int64_t count, float* h) const {
    if (p_.residual.data == nullptr) return load_x(column, count, h);
    load_matrix({p_.residual_out, p_.x_dtype, p_.stride_or, p_.stride_oc}, column, count, h);
  }

  // The row's mean and 1 / deviation; h is held where it fits.
  void measure() {
    const auto cols = static_cast<double>(p_.cols);
    const bool centers = p_.norm == Norm::kLayer;
    mean_ = 0.0f;
    if (centers) {
      Moment<false> sum(0.0f);
      for_each_run(p_.cols, [&](int64_t c, int64_t count) {
        load_sum(c, count, place(c));
        sum.add(place(c), count);
      });
      mean_ = static_cast<float>(sum.total() / cols);
    }
    Moment<true> squares(mean_);
    for_each_run(p_.cols, [&](int64_t c, int64_t count) {
      if (!centers) {
        load_sum(c, count, place(c));
      } else if (!holds_) {
        load_again(c, count, place(c));
      }
      squares.add(place(c), count);
    });
    factor_ = 1.0f / ::sqrtf(static_cast<float>(squares.total() / cols) + p_.eps);
  }

  void normalize(int64_t column, int64_t count, float* y) {
    const float mean = mean_, factor = factor_;
    for (int64_t i = 0; i < count; ++i) y[i] = (y[i] - mean) * factor;
    if (p_.weight.data != nullptr) {
      const float* weight = load_vector(p_.weight, column, count);
      for (int64_t i = 0; i < count; ++i) y[i] *= weight[i];
    }
    if (p_.bias.data != nullptr) {
      const float* bias = load_vector(p_.bias, column, count);
      for (int64_t i = 0; i < count; ++i) y[i] += bias[i];
    }
  }

  void activate_run(int64_t column, int64_t count, float* y) {
    if (p_.activation != Activation::kNone) {
      for (int64_t i = count; i % kActivationBlock != 0; ++i) y[i] = 0.0f;
      for (int64_t i = 0; i < count; i += kActivationBlock) {
        activate<kActivationBlock>(p_.activation, y + i);
      }
    }
    if (p_.up.data == nullptr) return;
    load_matrix(p_.up, column, count, operand_);
    for (int64_t i = 0; i < count; ++i) y[i] *= operand_[i];
  }

  void smooth(int64_t column, int64_t count, float* y) {
    const float* factors = reciprocals_ + column;
    if (!fits_) {
      load_reciprocals(p_.smooth, column, count, operand_);
      factors = operand_;
    }
    for (int64_t i = 0; i < count; ++i) y[i] *= factors[i];
  }

  static void load_reciprocals(const VectorView& v, int64_t column, int64_t count, float* to) {
    load_floats(v.data, v.dtype, column * v.stride, v.stride, count, to);
    for (int64_t i = 0; i < count; ++i) to[i] = 1.0f / to[i];
  }

  // In place where it is float32 already.
  const float* load_vector(const VectorView& v, int64_t column, int64_t count) {
    if (v.dtype == DType::kFloat32 && v.stride == 1) {
      return static_cast<const float*>(v.data) + column;
    }
    load_floats(v.data, v.dtype, column * v.stride, v.stride, count, operand_);
    return operand_;
  }

  const QuantizeProblem& p_;
  const bool fits_, holds_;
  int64_t row_ = 0;
  float mean_ = 0, factor_ = 1;
  alignas(64) float operand_[kQuantizeRun];
  alignas(64) float held_[kQuantizeHeld];  // the row, or one run of it
  alignas(64) float reciprocals_[kQuantizeHeld];
};

}  // namespace
}  // namespace fastq::cpu
