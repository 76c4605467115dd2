// The inner loops of batch_norm_relu.cpp, which includes this file once per instruction set. The includer defines
// FASTRES_ISA (a namespace) and FASTRES_VECTOR_BYTES, and selects the instruction set with a pragma around the include;
// so no header may be included here.
//
// Every loop sees a dense matrix [rows, columns] with constants per column. A channels-last tensor is such a matrix as
// it is; a plane of one channel of a contiguous tensor becomes one by giving every column that channel's constants.

namespace FASTRES_ISA {

// A vector of storage type T, and the wider vector it is computed in.
template <class T>
struct Simd {
  using Acc = T;
  typedef T Packed __attribute__((vector_size(FASTRES_VECTOR_BYTES)));
  typedef Packed Vec;
  static INLINE Vec widen(Packed packed) { return packed; }
  static INLINE Packed narrow(Vec vec) { return vec; }
};

template <>
struct Simd<c10::BFloat16> {
  using Acc = float;
  typedef uint16_t Packed __attribute__((vector_size(FASTRES_VECTOR_BYTES / 2)));
  typedef float Vec __attribute__((vector_size(FASTRES_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(FASTRES_VECTOR_BYTES)));
  static INLINE Vec widen(Packed packed) { return (Vec)(__builtin_convertvector(packed, Bits) << 16); }
  static INLINE Packed narrow(Vec vec) {
    const Bits bits = (Bits)vec;
    const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
    const Bits quiet_nan = bits | 0x400000;                   // rounding could carry a NaN over to infinity
    return __builtin_convertvector((vec == vec ? rounded : quiet_nan) >> 16, Packed);
  }
};

template <>
struct Simd<c10::Half> {
  using Acc = float;
  typedef _Float16 Packed __attribute__((vector_size(FASTRES_VECTOR_BYTES / 2)));
  typedef float Vec __attribute__((vector_size(FASTRES_VECTOR_BYTES)));
  static INLINE Vec widen(Packed packed) { return __builtin_convertvector(packed, Vec); }
  static INLINE Packed narrow(Vec vec) { return __builtin_convertvector(vec, Packed); }
};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
constexpr int64_t lanes = sizeof(typename Simd<T>::Packed) / sizeof(T);

// `count` is lanes<T> as a compile-time constant, or fewer in the last columns.
template <class T, class Count>
INLINE Vec<T> load(const T* from, Count count) {
  typename Simd<T>::Packed packed{};
  std::memcpy(&packed, from, count * sizeof(T));
  return Simd<T>::widen(packed);
}

template <class T, class Count>
INLINE void store(T* to, Vec<T> vec, Count count) {
  const auto packed = Simd<T>::narrow(vec);
  std::memcpy(to, &packed, count * sizeof(T));
}

// Per-column constants and sums are padded to whole vectors.
template <class T>
INLINE Vec<T> load_acc(const Acc<T>* from) {
  Vec<T> vec;
  std::memcpy(&vec, from, sizeof(vec));
  return vec;
}

template <class T>
INLINE void store_acc(Acc<T>* to, Vec<T> vec) {
  std::memcpy(to, &vec, sizeof(vec));
}

// Calls body(first column, number of columns) for each vector of columns.
template <class T, class Body>
INLINE void for_columns(int64_t columns, Body body) {
  int64_t column = 0;
  for (; column + lanes<T> <= columns; column += lanes<T>)
    body(column, std::integral_constant<int64_t, lanes<T>>{});
  if (column < columns) body(column, columns - column);
}

// Calls body(first row, number of rows as a compile-time constant): rows of one column vector share the constants and
// sums, which stay in registers meanwhile.
template <class Body>
INLINE void for_rows(int64_t rows, Body body) {
  constexpr int64_t group = 8;
  int64_t row = 0;
  for (; row + group <= rows; row += group) body(row, std::integral_constant<int64_t, group>{});
  for (; row < rows; ++row) body(row, std::integral_constant<int64_t, 1>{});
}

template <class T>
INLINE void clear(int64_t columns, Acc<T>* sum, Acc<T>* squares) {
  for_columns<T>(columns, [&](int64_t c, auto) INLINE_LAMBDA {
    store_acc<T>(sum + c, Vec<T>{});
    store_acc<T>(squares + c, Vec<T>{});
  });
}

// NaN stays NaN, as in torch.relu.
template <class V>
INLINE V zero_where_not_positive(V value, V tested) {
  return tested <= 0 ? V{} : value;
}

// Sums of (x - shift) and (x - shift)^2; the shift is passed as the mean.
template <class T>
void moments(Matrix<T> m, const T* x, Acc<T>* sum, Acc<T>* squares) {
  clear<T>(m.columns, sum, squares);
  for_rows(m.rows, [&](int64_t row, auto group) INLINE_LAMBDA {
    for_columns<T>(m.columns, [&](int64_t c, auto count) INLINE_LAMBDA {
      const auto shift = load_acc<T>(m.mean + c);
      auto sum_c = load_acc<T>(sum + c);
      auto squares_c = load_acc<T>(squares + c);
      for (int64_t i = 0; i < group; ++i) {
        const auto shifted = load(x + (row + i) * m.columns + c, count) - shift;
        sum_c += shifted;
        squares_c += shifted * shifted;
      }
      store_acc<T>(sum + c, sum_c);
      store_acc<T>(squares + c, squares_c);
    });
  });
}

// y = relu((x - mean) * scale + bias + residual)
template <class T, bool has_residual, bool relu>
void normalize(Matrix<T> m, const T* x, const T* residual, T* y) {
  for_rows(m.rows, [&](int64_t row, auto group) INLINE_LAMBDA {
    for_columns<T>(m.columns, [&](int64_t c, auto count) INLINE_LAMBDA {
      const auto mean = load_acc<T>(m.mean + c);
      const auto scale = load_acc<T>(m.scale + c);
      const auto bias = load_acc<T>(m.bias + c);
      for (int64_t i = 0; i < group; ++i) {
        const int64_t at = (row + i) * m.columns + c;
        auto z = (load(x + at, count) - mean) * scale + bias;
        if constexpr (has_residual) z += load(residual + at, count);
        if constexpr (relu) z = zero_where_not_positive<Vec<T>>(z, z);
        store(y + at, z, count);
      }
    });
  });
}

// The gradient of what ReLU was applied to. Without a residual its sign is recomputed from x, which is read anyway.
template <class T, Mask mask, class Count>
INLINE Vec<T> masked(Vec<T> dy, Vec<T> centered, Vec<T> scale, Vec<T> bias, const T* y, Count count) {
  if constexpr (mask == Mask::from_x) return zero_where_not_positive<Vec<T>>(dy, centered * scale + bias);
  if constexpr (mask == Mask::from_y) return zero_where_not_positive<Vec<T>>(dy, load(y, count));
  return dy;
}

// dz = dy where y > 0, and the sums of dz and dz * (x - mean). A mask from y goes with a residual, whose gradient dz is.
template <class T, Mask mask>
void reduce(Matrix<T> m, const T* dy, const T* x, const T* y, T* dz, Acc<T>* sum, Acc<T>* products) {
  clear<T>(m.columns, sum, products);
  for_rows(m.rows, [&](int64_t row, auto group) INLINE_LAMBDA {
    for_columns<T>(m.columns, [&](int64_t c, auto count) INLINE_LAMBDA {
      const auto mean = load_acc<T>(m.mean + c);
      const auto scale = load_acc<T>(m.scale + c);
      const auto bias = load_acc<T>(m.bias + c);
      auto sum_c = load_acc<T>(sum + c);
      auto products_c = load_acc<T>(products + c);
      for (int64_t i = 0; i < group; ++i) {
        const int64_t at = (row + i) * m.columns + c;
        const auto centered = load(x + at, count) - mean;
        const auto gradient = masked<T, mask>(load(dy + at, count), centered, scale, bias, y + at, count);
        if constexpr (mask == Mask::from_y) store(dz + at, gradient, count);
        sum_c += gradient;
        products_c += gradient * centered;
      }
      store_acc<T>(sum + c, sum_c);
      store_acc<T>(products + c, products_c);
    });
  });
}

// dx = dz * scale + (x - mean) * slope + offset
template <class T, Mask mask>
void input_gradient(Matrix<T> m, const T* dy, const T* x, const Acc<T>* slope, const Acc<T>* offset, T* dx) {
  for_rows(m.rows, [&](int64_t row, auto group) INLINE_LAMBDA {
    for_columns<T>(m.columns, [&](int64_t c, auto count) INLINE_LAMBDA {
      const auto mean = load_acc<T>(m.mean + c);
      const auto scale = load_acc<T>(m.scale + c);
      const auto bias = load_acc<T>(m.bias + c);
      const auto slope_c = load_acc<T>(slope + c);
      const auto offset_c = load_acc<T>(offset + c);
      for (int64_t i = 0; i < group; ++i) {
        const int64_t at = (row + i) * m.columns + c;
        const auto centered = load(x + at, count) - mean;
        const auto gradient = masked<T, mask, decltype(count)>(load(dy + at, count), centered, scale, bias, nullptr, count);
        store(dx + at, gradient * scale + centered * slope_c + offset_c, count);
      }
    });
  });
}

template <class T>
Kernels<T> kernels() {
  return {moments<T>,
          {{normalize<T, false, false>, normalize<T, false, true>}, {normalize<T, true, false>, normalize<T, true, true>}},
          {reduce<T, Mask::none>, reduce<T, Mask::from_x>, reduce<T, Mask::from_y>},
          {input_gradient<T, Mask::none>, input_gradient<T, Mask::from_x>}};
}

}  // namespace FASTRES_ISA
