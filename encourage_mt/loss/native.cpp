// Compute the encouraging loss and its gradient on a CPU: one parallel loop over the rows of the logits.
//
// The definition is in reference.py. With q_k = s + h [k = target] and a(p) = 1 - w p b'(p), w the bonus weight,
//
//     L = sum_k q_k (-log p_k + w b(p_k)),    dL/dz_i = p_i sum_k q_k a(p_k) - q_i a(p_i)
//
// Each row takes at most four passes, all but the first within the cache: the highest logit; exponentials and their sum;
// sums of b and a over the types (only if both smoothing and a bonus ask for them); the gradient.
//
// The top type is the only one whose p can exceed 1/2. It is kept out of every sum: 1 - p of it is the sum of the
// other types' exponentials over the total, exact however near p is to 1, and for all others the difference 1 - p is.
// As those p are at most 1/2 and add up to at most 1, the product of all their (1 - p) is at least 1/4: one product per
// row replaces the sum of V logarithms. The top type and the target are done in float64, one by one.
//
// setup.py compiles this file once for each instruction set; native.py loads the one that fits the processor.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "native_vectors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr double FLOOR = 1e-5;  // LOG_BONUS_FLOOR in bonuses.py
constexpr double PI = 3.14159265358979323846;

enum Bonus { NONE, LOG, POWER, COSINE };  // the order of BONUSES in native.py

struct Options {
  double target_weight;  // h
  double type_weight;    // s
  double bonus_weight;   // w
  double least;          // of 1 - p, before the log bonus turns into its tangent or meets its floor
  bool floored;          // log_end 1
  double exponent;
  double start;  // p below which there is no bonus
};

// b(p) and -p b'(p) of one type, like bonus_of and scaled_slope in bonuses.py.
template <Bonus bonus>
void bonus_and_slope(double p, double rest, const Options& options, double& b, double& slope) {
  b = slope = 0;
  if constexpr (bonus == LOG) {
    const double held = rest < options.least ? options.least : rest;
    b = std::log(held) - (options.floored ? 0 : (held - rest) / options.least);
    slope = options.floored && rest < FLOOR ? 0 : p / held;
  } else if constexpr (bonus == POWER) {
    b = -std::pow(p, options.exponent);
    slope = -options.exponent * b;
  } else if constexpr (bonus == COSINE) {
    const double sine = std::sin(PI / 2 * p);
    b = -2 * sine * sine;
    slope = PI * p * std::sin(PI * p);
  }
}

// The same less the bonus at its start, and 0 below it.
template <Bonus bonus>
void started_bonus_and_slope(double p, double rest, const Options& options, double& b, double& slope) {
  bonus_and_slope<bonus>(p, rest, options, b, slope);
  if (options.start > 0) {
    double b_start, unused;
    bonus_and_slope<bonus>(options.start, 1 - options.start, options, b_start, unused);
    b = p >= options.start ? b - b_start : 0;
    slope = p >= options.start ? slope : 0;
  }
}

// One row.
//
// z [V]: the logits. exponentials [V]: working memory. gradient [V]: null or where to write the gradient times `scale`;
// may be z or `exponentials`. next: the following row or null; it and the gradient's row are fetched into the cache
// meanwhile. Writes loss, nll and bonus to `terms`.
template <typename T, Bonus bonus>
void one_row(const T* z, T* exponentials, T* gradient, const T* next, int64_t vocabulary, int64_t target, double scale,
             const Options& options, double* terms) {
  using S = Simd<T>;
  using Vector = typename S::Vector;
  using Doubles = typename S::Doubles;

  // The highest logit and the first type that has it
  T highest = -std::numeric_limits<T>::infinity();
  int64_t top_chunk = 0;
  Vector highest_of_chunk = S::fill(highest);
  each_chunk<T>(
      0, vocabulary,
      [&](int64_t i, int64_t count) {
        const Vector x = S::load(z + i, count, -std::numeric_limits<T>::infinity());
        highest_of_chunk = x > highest_of_chunk ? x : highest_of_chunk;
      },
      [&](int64_t begin) {
        T best = highest;
        for (int64_t lane = 0; lane < S::width; ++lane) best = std::max(best, T(highest_of_chunk[lane]));
        if (best > highest) {
          highest = best;
          top_chunk = begin;
        }
      });
  int64_t top = top_chunk;
  while (z[top] != highest && top + 1 < std::min(top_chunk + CHUNK, vocabulary)) ++top;
  // +inf leaves no finite differences, and a row of -inf or NaN has no highest logit: all its figures become NaN
  if (!std::isfinite(highest)) highest = std::numeric_limits<T>::quiet_NaN();

  // exp(z - highest) and its sum over all types but the top one
  Doubles rest_lanes{}, shifted_lanes{};
  Vector rest_of_chunk{}, shifted_of_chunk{};
  const auto exponentiate = [&](int64_t i, int64_t count) {
    const Vector x = S::load(z + i, count, highest) - highest;
    Vector e = exponential<T>(x);
    if (count < S::width) {
      const T ones[S::width] = {};
      e = S::load(ones, count, T(1)) == T(1) ? Vector{} : e;
    }
    if (next != nullptr) __builtin_prefetch(next + i);
    if (gradient != nullptr) __builtin_prefetch(gradient + i, 1);
    S::store(exponentials + i, count, e);
    rest_of_chunk += e;
    shifted_of_chunk += x;
  };
  const auto add_chunk = [&](int64_t) {
    rest_lanes += __builtin_convertvector(rest_of_chunk, Doubles);
    shifted_lanes += __builtin_convertvector(shifted_of_chunk, Doubles);
    rest_of_chunk = shifted_of_chunk = Vector{};
  };
  each_chunk<T>(0, top, exponentiate, add_chunk);
  exponentials[top] = 0;
  each_chunk<T>(top + 1, vocabulary, exponentiate, add_chunk);

  const double rest = S::sum(rest_lanes);
  const double total = 1 + rest;
  const double log_total = std::log1p(rest);
  const double p_top = 1 / total, rest_of_top = rest / total;
  const double shifted_target = double(z[target]) - double(highest);
  const double p_target = target == top ? p_top : double(exponentials[target]) / total;
  double b_top, slope_top, b_target, slope_target;
  started_bonus_and_slope<bonus>(p_top, rest_of_top, options, b_top, slope_top);
  if (target == top) {
    b_target = b_top;
    slope_target = slope_top;
  } else {
    started_bonus_and_slope<bonus>(p_target, 1 - p_target, options, b_target, slope_target);
  }

  // b and -p b'(p) of all types but the top one, whose p are at most 1/2
  const double s = options.type_weight, h = options.target_weight, w = bonus == NONE ? 0 : options.bonus_weight;
  const bool smoothed_bonus = bonus != NONE && s * w != 0 && options.start <= 0.5;
  const bool started = options.start > 0;
  const T inverse = T(p_top), log_of_total = T(log_total), least = T(options.least), start = T(options.start);
  const T exponent = T(options.exponent), per_least = T(1 / options.least);
  const bool bent = options.least > 0.5;
  double b_start = 0, unused;
  if (started) bonus_and_slope<bonus>(options.start, 1 - options.start, options, b_start, unused);
  const auto scaled_slope = [&](int64_t i, int64_t count, Vector p) {
    Vector slope{};
    if constexpr (bonus == LOG) {
      Vector held = T(1) - p;
      if (bent) held = held < least ? S::fill(least) : held;
      slope = p / held;
    } else if constexpr (bonus == POWER) {
      const Vector x = S::load(z + i, count, -std::numeric_limits<T>::infinity()) - highest;
      slope = p > T(0) ? exponent * exponential<T>(exponent * (x - log_of_total)) : Vector{};  // 0: the top type
    } else if constexpr (bonus == COSINE) {
      const Vector angle = p * T(PI / 2);
      slope = T(2 * PI) * p * trigonometric<T>(angle, 1) * trigonometric<T>(angle, 0);
    }
    return started ? (p >= start ? slope : Vector{}) : slope;
  };
  double b_sum = 0, slope_sum = 0;  // over all types but the top one
  if (smoothed_bonus) {
    Vector slopes{}, sums{}, product = S::fill(T(1));
    const T b_of_start = T(bonus == LOG ? 0 : b_start), start_factor = T(std::exp(-b_start));
    each_vector<T>(0, vocabulary, [&](int64_t i, int64_t count) {
      const Vector p = S::load(exponentials + i, count, T(0)) * inverse;
      const Vector slope = scaled_slope(i, count, p);
      Vector b{};
      if constexpr (bonus == LOG) {
        Vector held = T(1) - p;
        if (bent) {
          const Vector bound = held < least ? S::fill(least) : held;
          b = (held - bound) * per_least;
          held = bound;
        }
        if (started) held = p >= start ? held * start_factor : S::fill(T(1));
        product *= held;
      } else if constexpr (bonus == POWER) {
        b = slope / -exponent;
      } else if constexpr (bonus == COSINE) {
        const Vector sine = trigonometric<T>(p * T(PI / 2), 1);
        b = T(-2) * sine * sine;
      }
      if (started) b = p >= start ? b - b_of_start : Vector{};
      sums += b;
      slopes += slope;
    });
    double all = 1;
    for (int64_t lane = 0; lane < S::width; ++lane) {
      all *= product[lane];
      b_sum += sums[lane];
      slope_sum += slopes[lane];
    }
    b_sum += std::log(all);
  }

  const double nll = log_total - shifted_target;
  terms[1] = nll;
  terms[0] = h * nll;
  terms[2] = h * b_target;
  if (s != 0) {
    terms[0] += s * (vocabulary * log_total - S::sum(shifted_lanes));
    terms[2] += s * (b_sum + b_top);
  }
  terms[2] *= w;
  terms[0] += terms[2];
  if (gradient == nullptr) return;

  const double a_target = 1 + w * slope_target, a_top = 1 + w * slope_top;
  const double q_top = s + (target == top ? h : 0);
  const double others = s * (vocabulary - 1 + w * slope_sum) + (target == top ? 0 : h * a_target);
  const double all = others + q_top * a_top;
  // of two small terms, not of p near 1 and 1
  const double gradient_top = p_top * others - q_top * a_top * rest_of_top;
  const double gradient_target = p_target * all - (s + h) * a_target;
  const T factor = T(scale * all / total), constant = T(scale * s), slope_factor = T(scale * s * w);
  if (smoothed_bonus) {
    each_vector<T>(0, vocabulary, [&](int64_t i, int64_t count) {
      const Vector e = S::load(exponentials + i, count, T(0));
      S::store(gradient + i, count, e * factor - constant - slope_factor * scaled_slope(i, count, e * inverse));
    });
  } else {
    each_vector<T>(0, vocabulary, [&](int64_t i, int64_t count) {
      S::store(gradient + i, count, S::load(exponentials + i, count, T(0)) * factor - constant);
    });
  }
  gradient[top] = T(scale * gradient_top);
  if (target != top) gradient[target] = T(scale * gradient_target);
}

// Rows of logits in the type T, computed in C.
template <typename T, typename C, Bonus bonus>
void all_rows(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& ignored, const at::Tensor* scale,
              const Options& options, at::Tensor& terms, T* gradient) {
  const int64_t tokens = logits.size(0), vocabulary = logits.size(1), stride = logits.stride(0);
  const T* const data = logits.const_data_ptr<T>();
  const int64_t* const types = target.const_data_ptr<int64_t>();
  const bool* const skip = ignored.const_data_ptr<bool>();
  const C* const scales = scale == nullptr ? nullptr : scale->const_data_ptr<C>();
  C* const out = terms.mutable_data_ptr<C>();
  at::parallel_for(0, tokens, std::max<int64_t>(1, 32768 / vocabulary), [&](int64_t begin, int64_t end) {
    std::vector<C> exponentials(vocabulary), raised(std::is_same_v<T, C> ? 0 : vocabulary);
    for (int64_t row = begin; row < end; ++row) {
      const T* const z = data + row * stride;
      T* const gradient_row = gradient == nullptr ? nullptr : gradient + row * vocabulary;
      double of_row[3] = {0, 0, 0};
      if (skip[row]) {
        if (gradient_row != nullptr) std::memset(gradient_row, 0, vocabulary * sizeof(T));
      } else {
        TORCH_CHECK_INDEX(types[row] >= 0 && types[row] < vocabulary, "target ", types[row],
                          " is not one of the ", vocabulary, " types");
        const double scale_of_row = scales == nullptr ? 1 : scales[row];
        if constexpr (std::is_same_v<T, C>) {
          const C* const next = row + 1 < end ? z + stride : nullptr;
          one_row<C, bonus>(z, exponentials.data(), gradient_row, next, vocabulary, types[row], scale_of_row, options,
                            of_row);
        } else {
          for (int64_t i = 0; i < vocabulary; ++i) raised[i] = static_cast<C>(z[i]);
          C* const work = gradient_row == nullptr ? nullptr : exponentials.data();
          one_row<C, bonus>(raised.data(), exponentials.data(), work, nullptr, vocabulary, types[row], scale_of_row,
                            options, of_row);
          if (work != nullptr) {
            for (int64_t i = 0; i < vocabulary; ++i) gradient_row[i] = static_cast<T>(work[i]);
          }
        }
      }
      for (int term = 0; term < 3; ++term) out[term * tokens + row] = static_cast<C>(of_row[term]);
    }
  });
}

// See native.py for the arguments; `gradient` is null or the tensor to write to, which may be `logits`.
at::Tensor compute(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& ignored,
                   const std::optional<at::Tensor>& scale, int64_t bonus, at::ArrayRef<double> options,
                   at::Tensor* gradient) {
  TORCH_CHECK(logits.dim() == 2 && target.dim() == 1 && ignored.dim() == 1, "expected logits [tokens, V], target [tokens]");
  TORCH_CHECK(target.size(0) == logits.size(0) && ignored.size(0) == logits.size(0), "logits and target differ in tokens");
  TORCH_CHECK(options.size() == 7, "expected 7 options");
  const auto computed = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor rows = logits.stride(1) == 1 && logits.stride(0) >= 0 ? logits : logits.contiguous();
  const at::Tensor types = target.contiguous(), skip = ignored.contiguous();
  at::Tensor scales;
  if (scale.has_value()) scales = scale->to(computed).expand({logits.size(0)}).contiguous();
  at::Tensor terms = at::empty({3, logits.size(0)}, logits.options().dtype(computed));
  const Options parsed{options[0], options[1], options[2], options[3], options[4] != 0, options[5], options[6]};

  const auto run = [&](auto of_logits, auto of_computed, auto kind) {
    using T = decltype(of_logits);
    using C = decltype(of_computed);
    T* const out = gradient == nullptr ? nullptr : gradient->mutable_data_ptr<T>();
    all_rows<T, C, decltype(kind)::value>(rows, types, skip, scale.has_value() ? &scales : nullptr, parsed, terms, out);
  };
  const auto of_kind = [&](auto of_logits, auto of_computed) {
    switch (bonus) {
      case NONE: return run(of_logits, of_computed, std::integral_constant<Bonus, NONE>());
      case LOG: return run(of_logits, of_computed, std::integral_constant<Bonus, LOG>());
      case POWER: return run(of_logits, of_computed, std::integral_constant<Bonus, POWER>());
      case COSINE: return run(of_logits, of_computed, std::integral_constant<Bonus, COSINE>());
      default: TORCH_CHECK(false, "unknown bonus ", bonus);
    }
  };
  switch (logits.scalar_type()) {
    case at::kFloat: of_kind(float(), float()); break;
    case at::kDouble: of_kind(double(), double()); break;
    case at::kBFloat16: of_kind(at::BFloat16(), float()); break;
    case at::kHalf: of_kind(at::Half(), float()); break;
    default: TORCH_CHECK(false, "no native loss for logits of type ", logits.scalar_type());
  }
  return terms;
}

at::Tensor terms(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& ignored, int64_t bonus,
                 at::ArrayRef<double> options) {
  return compute(logits, target, ignored, std::nullopt, bonus, options, nullptr);
}

std::tuple<at::Tensor, at::Tensor> terms_and_gradient(const at::Tensor& logits, const at::Tensor& target,
                                                      const at::Tensor& ignored,
                                                      const std::optional<at::Tensor>& scale, int64_t bonus,
                                                      at::ArrayRef<double> options) {
  at::Tensor gradient = at::empty(logits.sizes(), logits.options());
  at::Tensor computed = compute(logits, target, ignored, scale, bonus, options, &gradient);
  return {computed, gradient};
}

at::Tensor terms_and_gradient_(at::Tensor& logits, const at::Tensor& target, const at::Tensor& ignored,
                               const std::optional<at::Tensor>& scale, int64_t bonus, at::ArrayRef<double> options) {
  TORCH_CHECK(logits.is_contiguous(), "logits to be overwritten must be contiguous");
  return compute(logits, target, ignored, scale, bonus, options, &logits);
}

}  // namespace

TORCH_LIBRARY(encourage_mt, library) {
  library.def("terms(Tensor logits, Tensor target, Tensor ignored, int bonus, float[] options) -> Tensor");
  library.def("terms_and_gradient(Tensor logits, Tensor target, Tensor ignored, Tensor? scale, int bonus, "
              "float[] options) -> (Tensor, Tensor)");
  library.def("terms_and_gradient_(Tensor(a!) logits, Tensor target, Tensor ignored, Tensor? scale, int bonus, "
              "float[] options) -> Tensor");
}

TORCH_LIBRARY_IMPL(encourage_mt, CPU, library) {
  library.impl("terms", &terms);
  library.impl("terms_and_gradient", &terms_and_gradient);
  library.impl("terms_and_gradient_", &terms_and_gradient_);
}
