// The CPU kernels of fastres::batch_norm_relu and fastres::batch_norm_relu_backward;
// fastres/ops/batch_norm_relu says what they compute. Both are bound by memory: forward reads x twice and
// writes y once, backward reads dy and x twice and writes dx once (and, with a residual, reads y and, if there
// is one, a second gradient, and writes the residual's gradient dz once).

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <Python.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#ifdef __x86_64__
#define FASTRES_STREAMS
#include <immintrin.h>
#endif

namespace {

template <class T>
using Acc = at::opmath_type<T>;

template <class T>
struct Affine {
  const Acc<T>*mean, *scale, *bias;
};

enum class Mask { none, from_x, from_y };

template <class T>
struct Kernels {
  // A power of two: of every 2 * stride columns, constants and sums have first the even, then the odd ones.
  int64_t stride;
  void (*moments)(int64_t rows, int64_t columns, const Acc<T>* shift, const T* x, Acc<T>* sum,
                  Acc<T>* squares);
  // [has residual][relu]
  void (*normalize[2][2])(int64_t rows, int64_t columns, Affine<T>, const T* x, const T* residual, T* y,
                          bool streamed);
  // [mask]; the last is from y, with two gradients
  void (*reduce[4])(int64_t rows, int64_t columns, Affine<T>, const T* dy, const T* twin_dy, const T* x,
                    const T* y, T* dz, Acc<T>* sum, Acc<T>* products, bool streamed);
  // [mask], which is from x or none
  void (*input_gradient[2])(int64_t rows, int64_t columns, Affine<T>, const T* dy, const T* x,
                            const Acc<T>* slope, const Acc<T>* offset, T* dx, bool streamed);

  int64_t lane(int64_t column) const {
    const int64_t within = column & (2 * stride - 1);
    return column - within + (within & 1) * stride + (within >> 1);
  }
};

// Beside two or three streams the processor's own prefetcher falls behind: without this the large ResNet-50
// shapes take up to 1.5 times as long on a Zen 5 core.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kGroupRows = 4;

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

#define FASTRES_ISA baseline
#define FASTRES_VECTOR_BYTES 16
#include "batch_norm_relu_kernels.h"
#undef FASTRES_ISA
#undef FASTRES_VECTOR_BYTES

// Only GCC is known to apply the pragma to templates and lambdas.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTRES_X86_DISPATCH

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FASTRES_ISA avx2
#define FASTRES_VECTOR_BYTES 32
#include "batch_norm_relu_kernels.h"
#undef FASTRES_ISA
#undef FASTRES_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#define FASTRES_ISA avx512
#define FASTRES_VECTOR_BYTES 64
#include "batch_norm_relu_kernels.h"
#undef FASTRES_ISA
#undef FASTRES_VECTOR_BYTES
#pragma GCC pop_options
#endif

// The best kernels for this processor, or for what the environment variable ATEN_CPU_CAPABILITY lowers it to.
template <class T>
const Kernels<T>& kernels() {
  static const Kernels<T> chosen = [] {
#ifdef FASTRES_X86_DISPATCH
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0) return avx512::kernels<T>();
    if (capability.rfind("AVX2", 0) == 0) return avx2::kernels<T>();
#endif
    return baseline::kernels<T>();
  }();
  return chosen;
}

constexpr int64_t kLanes = 32;  // the most columns worked on together; a contiguous plane is cut into them
constexpr int64_t kBlockRows = 256;  // summed in Acc before the sum goes on in double
constexpr int64_t kShiftSamples = 8;
constexpr int64_t kElementsPerThread = 32768;
constexpr int64_t kStreamedBytes = int64_t{4} << 20;
constexpr int64_t kAlignment = 64;

// Channels-last if the channels lie side by side, else contiguous; copied if it is neither.
at::Tensor dense(const at::Tensor& tensor, bool channels_last) {
  return channels_last ? tensor.movedim(1, -1).contiguous().movedim(-1, 1) : tensor.contiguous();
}

// What is worked on as a whole, from the statistics to the result: a channels-last tensor with all threads,
// or one channel of a contiguous tensor with one thread, which finds the channel in its own cache again in
// the second pass. Constants and sums have an entry per lane: a channel (channels-last), or one of the kLanes
// columns (contiguous).
struct Slab {
  bool channels_last;
  int64_t images, all_channels, plane;
  int64_t first_channel, channels;
  int64_t threads;

  int64_t rows() const { return images * plane; }
  int64_t lanes() const { return (channels_last ? channels + kLanes - 1 : kLanes) / kLanes * kLanes; }

  int64_t offset(int64_t row, int64_t channel) const {
    if (channels_last) return row * all_channels + channel;
    return (row / plane * all_channels + channel) * plane + row % plane;
  }

  // Calls body(thread, offset, rows, columns) for each block. The second pass goes backwards, to start with
  // what the first one left in the cache.
  template <class Body>
  void for_blocks(bool backwards, const Body& body) const {
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        if (channels_last) {
          const int64_t first = rows() * thread / threads, last = rows() * (thread + 1) / threads;
          in_order(backwards, first, last, kBlockRows,
                   [&](int64_t row, int64_t count) { body(thread, row * channels, count, channels); });
        } else {
          in_order(backwards, 0, images, 1, [&](int64_t image, int64_t) {
            const int64_t start = (image * all_channels + first_channel) * plane;
            in_order(backwards, 0, plane / kLanes, kBlockRows,
                     [&](int64_t row, int64_t count) { body(thread, start + row * kLanes, count, kLanes); });
            if (const int64_t rest = plane % kLanes) body(thread, start + plane - rest, int64_t{1}, rest);
          });
        }
      }
    });
  }

 private:
  template <class Body>
  static void in_order(bool backwards, int64_t begin, int64_t end, int64_t step, const Body& body) {
    const int64_t steps = (end - begin + step - 1) / step;
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t at = begin + (backwards ? steps - 1 - i : i) * step;
      body(at, std::min(step, end - at));
    }
  }
};

template <class Body>
void for_slabs(const at::Tensor& x, bool channels_last, const Body& body) {
  const int64_t images = x.size(0), channels = x.size(1), plane = x.numel() / (images * channels);
  const int64_t threads = std::clamp<int64_t>(x.numel() / kElementsPerThread, 1, at::get_num_threads());
  if (channels_last) return body(Slab{true, images, channels, plane, 0, channels, threads});
  at::parallel_for(0, channels, (channels + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) body(Slab{false, images, channels, plane, c, 1, 1});
  });
}

// Two sums per lane: a block's in Acc, those of all blocks in double.
template <class T>
class Sums {
 public:
  explicit Sums(const Slab& slab)
      : slab_(slab), block_(slab.threads * 2 * slab.lanes()), total_(slab.threads * 2 * slab.lanes()) {}

  // Runs kernel(sum, other sum) on a block and adds its sums.
  template <class Kernel>
  void add(int64_t thread, int64_t columns, const Kernel& kernel) {
    const int64_t lanes = slab_.lanes();
    Acc<T>* const block = block_.data() + thread * 2 * lanes;
    double* const total = total_.data() + thread * 2 * lanes;
    kernel(block, block + lanes);
    if (columns == lanes) {
      for (int64_t i = 0; i < 2 * lanes; ++i) total[i] += block[i];
    } else {
      for (int64_t column = 0; column < columns; ++column)
        for (int64_t i : {kernels<T>().lane(column), kernels<T>().lane(column) + lanes}) total[i] += block[i];
    }
  }

  // The two sums of a channel, counted from the slab's first.
  std::array<double, 2> of(int64_t channel) const {
    const int64_t lanes = slab_.lanes();
    const int64_t begin = slab_.channels_last ? kernels<T>().lane(channel) : 0;
    const int64_t end = slab_.channels_last ? begin + 1 : lanes;
    std::array<double, 2> result{};
    for (int64_t thread = 0; thread < slab_.threads; ++thread)
      for (int64_t i : {0, 1})
        for (int64_t lane = begin; lane < end; ++lane) result[i] += total_[(thread * 2 + i) * lanes + lane];
    return result;
  }

 private:
  const Slab& slab_;
  std::vector<Acc<T>> block_;
  std::vector<double> total_;
};

// A constant per lane.
template <class T>
class Constants {
 public:
  template <class Value>
  Constants(const Slab& slab, const Value& value)
      : channels_last_(slab.channels_last), values_(slab.lanes()) {
    for (int64_t i = 0; i < slab.channels; ++i) {
      const Acc<T> constant = static_cast<Acc<T>>(value(slab.first_channel + i));
      // The NaN that survives rounding to bfloat16.
      const Acc<T> plain = std::isnan(constant) ? std::numeric_limits<Acc<T>>::quiet_NaN() : constant;
      if (channels_last_)
        values_[kernels<T>().lane(i)] = plain;
      else
        std::fill(values_.begin(), values_.end(), plain);
    }
  }
  operator const Acc<T>*() const { return values_.data(); }
  Acc<T> of(int64_t channel) const { return values_[channels_last_ ? kernels<T>().lane(channel) : 0]; }

 private:
  bool channels_last_;
  std::vector<Acc<T>> values_;
};

// The mean of a few values of a channel: subtracted before squaring, it keeps the variance exact when the
// mean is large beside it. Were it infinite or NaN, it would turn infinities into NaN.
template <class T>
double shift(const Slab& slab, const T* x, int64_t channel) {
  const int64_t samples = std::min(kShiftSamples, slab.rows());
  double sum = 0;
  for (int64_t i = 0; i < samples; ++i)
    sum += static_cast<double>(x[slab.offset(slab.rows() * i / samples, channel)]);
  return std::isfinite(sum) ? sum / samples : 0;
}

template <class T>
void compute_statistics(const Slab& slab, const T* x, Acc<T>* mean, Acc<T>* var) {
  const Constants<T> shifts(slab, [&](int64_t c) { return shift(slab, x, c); });
  Sums<T> sums(slab);
  slab.for_blocks(false, [&](int64_t thread, int64_t offset, int64_t rows, int64_t columns) {
    sums.add(thread, columns, [&](Acc<T>* sum, Acc<T>* squares) {
      kernels<T>().moments(rows, columns, shifts, x + offset, sum, squares);
    });
  });
  const double count = slab.rows();
  for (int64_t c = 0; c < slab.channels; ++c) {
    const auto [sum, squares] = sums.of(c);
    const double deviations = squares - sum * sum / count;
    mean[slab.first_channel + c] = shifts.of(c) + sum / count;
    var[slab.first_channel + c] = (deviations < 0 ? 0 : deviations) / count;  // NaN stays NaN
  }
}

// Whether the results are streamed: they are too large to stay in the caches until somebody reads them, and
// each row of a slab begins at a multiple of the largest vector's size.
bool streamed(std::initializer_list<at::Tensor> results, bool channels_last) {
  const at::Tensor& first = *results.begin();
  const int64_t channels = first.size(1), plane = first.numel() / (first.size(0) * channels);
  const int64_t row_bytes = (channels_last ? channels : plane) * first.element_size();
  if (static_cast<int64_t>(first.nbytes()) < kStreamedBytes || row_bytes % kAlignment) return false;
  return std::all_of(results.begin(), results.end(), [](const at::Tensor& result) {
    return reinterpret_cast<uintptr_t>(result.const_data_ptr()) % kAlignment == 0;
  });
}

template <class T>
const T* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

std::optional<at::Tensor> in_type(const std::optional<at::Tensor>& tensor, const at::TensorOptions& options) {
  return tensor ? std::optional(tensor->to(options.dtype()).contiguous()) : std::nullopt;
}

template <class T>
double value_or(const T* values, int64_t i, double otherwise) {
  return values ? values[i] : otherwise;
}

void check(const at::Tensor& x, const std::optional<at::Tensor>& like_x,
           std::initializer_list<std::optional<at::Tensor>> per_channel) {
  TORCH_CHECK(x.dim() >= 2, "expected an input of shape [N, C, ...], got ", x.sizes());
  TORCH_CHECK(!like_x || (like_x->sizes() == x.sizes() && like_x->dtype() == x.dtype()));
  for (const auto& tensor : per_channel) TORCH_CHECK(!tensor || tensor->numel() == x.size(1));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& input, const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
    const std::optional<at::Tensor>& running_var, const std::optional<at::Tensor>& num_batches_tracked,
    bool training, double momentum, double eps, bool relu) {
  check(input, residual, {weight, bias, running_mean, running_var});
  TORCH_CHECK(training || (running_mean && running_var), "evaluation needs running_mean and running_var");
  const bool channels_last = input.stride(1) == 1;
  const auto x = dense(input, channels_last);
  const auto other = residual ? std::optional(dense(*residual, channels_last)) : std::nullopt;
  const auto options = x.options().dtype(at::toOpMathType(x.scalar_type()));
  const auto w = in_type(weight, options), b = in_type(bias, options);
  const auto y = at::empty_like(x);
  const auto mean = at::empty({training ? x.size(1) : 0}, options), var = at::empty_like(mean);
  if (training && num_batches_tracked) num_batches_tracked->add_(1);
  const auto mask = at::empty({0}, x.options().dtype(at::kInt));  // y is read instead
  if (x.numel() == 0) return {y, mean.zero_(), var.zero_(), mask};
  const auto used_mean = training ? mean : *in_type(running_mean, options);
  const auto used_var = training ? var : *in_type(running_var, options);

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm_relu", [&] {
    using T = scalar_t;
    auto* const new_means = mean.mutable_data_ptr<Acc<T>>();
    auto* const new_vars = var.mutable_data_ptr<Acc<T>>();
    const auto* const means = used_mean.const_data_ptr<Acc<T>>();
    const auto* const vars = used_var.const_data_ptr<Acc<T>>();
    const auto* const weights = data_or_null<Acc<T>>(w);
    const auto* const biases = data_or_null<Acc<T>>(b);
    const T* const xs = x.const_data_ptr<T>();
    const T* const residuals = data_or_null<T>(other);
    T* const ys = y.mutable_data_ptr<T>();
    const bool past_cache = streamed({y}, channels_last);
    for_slabs(x, channels_last, [&](const Slab& slab) {
      if (training) compute_statistics<T>(slab, xs, new_means, new_vars);
      const Constants<T> center(slab, [&](int64_t c) { return means[c]; });
      const Constants<T> scale(slab,
                               [&](int64_t c) { return value_or(weights, c, 1) / std::sqrt(vars[c] + eps); });
      const Constants<T> offset(slab, [&](int64_t c) { return value_or(biases, c, 0); });
      const auto normalize = kernels<T>().normalize[residuals != nullptr][relu];
      slab.for_blocks(training, [&](int64_t, int64_t at, int64_t rows, int64_t columns) {
        normalize(rows, columns, {center, scale, offset}, xs + at, residuals ? residuals + at : nullptr,
                  ys + at, past_cache);
      });
    });
  });
  if (training) {
    const double count = x.numel() / x.size(1);
    if (running_mean) running_mean->mul_(1 - momentum).add_(mean, momentum);
    if (running_var) running_var->mul_(1 - momentum).add_(var, momentum * count / (count - 1));
  }
  return {y, mean, var, mask};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& twin_grad, const at::Tensor& input,
    const std::optional<at::Tensor>& output, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const at::Tensor& mean, const at::Tensor& var, bool training,
    double eps, bool relu) {
  check(input, output, {weight, bias, mean, var});
  check(input, grad, {});
  check(input, twin_grad, {});
  TORCH_CHECK(!twin_grad || (output && relu), "a second gradient needs a residual and ReLU");
  const bool channels_last = input.stride(1) == 1;
  const auto x = dense(input, channels_last), dy = dense(grad, channels_last);
  const auto twin_dy = twin_grad ? std::optional(dense(*twin_grad, channels_last)) : std::nullopt;
  const auto y = output ? std::optional(dense(*output, channels_last)) : std::nullopt;
  const auto options = x.options().dtype(at::toOpMathType(x.scalar_type()));
  const auto w = in_type(weight, options), b = in_type(bias, options);
  const auto used_mean = *in_type(mean, options), used_var = *in_type(var, options);
  const auto dx = at::empty_like(x);
  const auto dz = y ? at::empty_like(x) : at::empty({0}, x.options());
  const auto dweight = at::zeros({x.size(1)}, options), dbias = at::zeros({x.size(1)}, options);
  if (x.numel() == 0) return {dx, dz, dweight, dbias};

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "batch_norm_relu_backward", [&] {
    using T = scalar_t;
    const auto* const means = used_mean.const_data_ptr<Acc<T>>();
    const auto* const vars = used_var.const_data_ptr<Acc<T>>();
    const auto* const weights = data_or_null<Acc<T>>(w);
    const auto* const biases = data_or_null<Acc<T>>(b);
    auto* const dweights = dweight.mutable_data_ptr<Acc<T>>();
    auto* const dbiases = dbias.mutable_data_ptr<Acc<T>>();
    const T* const dys = dy.const_data_ptr<T>();
    const T* const twin_dys = data_or_null<T>(twin_dy);
    const T* const xs = x.const_data_ptr<T>();
    const T* const ys = data_or_null<T>(y);
    T* const dzs = dz.mutable_data_ptr<T>();
    T* const dxs = dx.mutable_data_ptr<T>();
    const Mask mask = !relu ? Mask::none : ys ? Mask::from_y : Mask::from_x;
    const auto reduce = kernels<T>().reduce[twin_dys ? 3 : static_cast<int>(mask)];
    const auto input_gradient = kernels<T>().input_gradient[mask == Mask::from_x];
    const T* const gradients = mask == Mask::from_y ? dzs : dys;
    const bool past_cache = streamed({dx, dz}, channels_last);
    for_slabs(x, channels_last, [&](const Slab& slab) {
      const Constants<T> center(slab, [&](int64_t c) { return means[c]; });
      const Constants<T> scale(slab,
                               [&](int64_t c) { return value_or(weights, c, 1) / std::sqrt(vars[c] + eps); });
      const Constants<T> offset(slab, [&](int64_t c) { return value_or(biases, c, 0); });
      Sums<T> sums(slab);
      slab.for_blocks(false, [&](int64_t thread, int64_t at, int64_t rows, int64_t columns) {
        sums.add(thread, columns, [&](Acc<T>* sum, Acc<T>* products) {
          reduce(rows, columns, {center, scale, offset}, dys + at, twin_dys ? twin_dys + at : nullptr, xs + at,
                 ys ? ys + at : nullptr, dzs + at, sum, products, past_cache);
        });
      });
      const double count = slab.rows();
      for (int64_t i = 0; i < slab.channels; ++i) {
        const int64_t c = slab.first_channel + i;
        const auto [sum, products] = sums.of(i);
        dweights[c] = products / std::sqrt(vars[c] + eps);
        dbiases[c] = sum;
      }
      // dx = scale * (dz - mean(dz) - (x - mean) * mean(dz * (x - mean)) / (var + eps)); evaluation has the
      // first term.
      const Constants<T> slope(slab, [&](int64_t c) {
        return training ? -value_or(weights, c, 1) * dweights[c] / (count * (vars[c] + eps)) : 0;
      });
      const Constants<T> shift(slab, [&](int64_t c) {
        return training ? -value_or(weights, c, 1) * dbiases[c] / (count * std::sqrt(vars[c] + eps)) : 0;
      });
      slab.for_blocks(true, [&](int64_t, int64_t at, int64_t rows, int64_t columns) {
        input_gradient(rows, columns, {center, scale, offset}, gradients + at, xs + at, slope, shift,
                       dxs + at, past_cache);
      });
    });
  });
  return {dx, dz, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastres, CPU, library) {
  library.impl("batch_norm_relu", forward);
  library.impl("batch_norm_relu_backward", backward);
}

// Importing fastres._C loads the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
