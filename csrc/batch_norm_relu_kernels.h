// The inner loops of batch_norm_relu.cpp, which includes this file once per instruction set: it defines
// FASTRES_ISA (a namespace) and FASTRES_VECTOR_BYTES and has a pragma around the include. No header may be
// included here.
//
// A loop sees a dense matrix [rows, columns] with constants per column. A channels-last tensor is such a
// matrix as it is; a channel's plane of a contiguous tensor becomes one by giving every column that channel's
// constants.

namespace FASTRES_ISA {

// The columns that are worked on together: two vectors of the type that sums are made in.
template <class T>
struct Wide {
  typedef Acc<T> Vec __attribute__((vector_size(FASTRES_VECTOR_BYTES)));
  Vec first, second;

  friend INLINE Wide operator+(Wide a, Wide b) { return {a.first + b.first, a.second + b.second}; }
  friend INLINE Wide operator-(Wide a, Wide b) { return {a.first - b.first, a.second - b.second}; }
  friend INLINE Wide operator*(Wide a, Wide b) { return {a.first * b.first, a.second * b.second}; }

  // The value where `sign` is positive, else 0. Where it is NaN the value stays, as in torch.relu and its
  // gradient.
  static INLINE Wide where_positive(Wide sign, Wide value) {
    return {sign.first <= 0 ? Vec{} : value.first, sign.second <= 0 ? Vec{} : value.second};
  }
};

template <class T>
constexpr int64_t step = sizeof(Wide<T>) / sizeof(Acc<T>);

// Vectors are copied one by one: GCC copies a struct of two through the stack.
template <class Vector>
INLINE Vector load_vector(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <class Vector>
INLINE void store_vector(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// Where `streamed`, past the caches, to an address that is aligned to the vector: the processor need not read
// the line first, and nothing that is still needed leaves the caches for it.
template <class Vector>
INLINE void store_vector(void* to, Vector vector, [[maybe_unused]] bool streamed) {
#ifdef FASTRES_STREAMS
  if (streamed) {
    if constexpr (sizeof(Vector) == 64) return _mm512_stream_si512((__m512i*)to, (__m512i)vector);
    if constexpr (sizeof(Vector) == 32) return _mm256_stream_si256((__m256i*)to, (__m256i)vector);
    if constexpr (sizeof(Vector) == 16) return _mm_stream_si128((__m128i*)to, (__m128i)vector);
  }
#endif
  store_vector(to, vector);
}

// Streamed stores become visible to other threads.
INLINE void finish_stores([[maybe_unused]] bool streamed) {
#ifdef FASTRES_STREAMS
  if (streamed) _mm_sfence();
#endif
}

// How `step` numbers are stored: float and double as they are computed with.
template <class T>
struct Storage {
  static constexpr int64_t stride = 1;

  static INLINE Wide<T> load(const T* from) {
    return {load_vector<typename Wide<T>::Vec>(from), load_vector<typename Wide<T>::Vec>(from + step<T> / 2)};
  }

  static INLINE void store(T* to, Wide<T> wide, bool streamed) {
    store_vector(to, wide.first, streamed);
    store_vector(to + step<T> / 2, wide.second, streamed);
  }
};

template <>
struct Storage<c10::Half> {
  typedef _Float16 Vec __attribute__((vector_size(FASTRES_VECTOR_BYTES / 2)));
  using Floats = Wide<c10::Half>::Vec;
  static constexpr int64_t stride = 1;

  static INLINE Wide<c10::Half> load(const c10::Half* from) {
    return {__builtin_convertvector(load_vector<Vec>(from), Floats),
            __builtin_convertvector(load_vector<Vec>(from + step<c10::Half> / 2), Floats)};
  }

  static INLINE void store(c10::Half* to, Wide<c10::Half> wide, bool streamed) {
    store_vector(to, __builtin_convertvector(wide.first, Vec), streamed);
    store_vector(to + step<c10::Half> / 2, __builtin_convertvector(wide.second, Vec), streamed);
  }
};

// A bfloat16 is the upper half of a float. Two neighbours share 32 bits: the even columns are shifted up, the
// odd ones are in place already, and no number moves to another lane.
template <>
struct Storage<c10::BFloat16> {
  typedef uint32_t Bits __attribute__((vector_size(FASTRES_VECTOR_BYTES)));
  using Floats = Wide<c10::BFloat16>::Vec;
  static constexpr int64_t stride = step<c10::BFloat16> / 2;

  static INLINE Wide<c10::BFloat16> load(const c10::BFloat16* from) {
    const auto pairs = load_vector<Bits>(from);
    return {(Floats)(pairs << 16), (Floats)(pairs & 0xffff0000)};
  }

  static INLINE void store(c10::BFloat16* to, Wide<c10::BFloat16> wide, bool streamed) {
    store_vector(to, rounded(wide.first) >> 16 | (rounded(wide.second) & 0xffff0000), streamed);
  }

  // To nearest, ties to even. It would carry a NaN with all its lower bits set over to infinity or zero; but
  // bfloat16 inputs have none set and the constants' NaN is the plain one.
  static INLINE Bits rounded(Floats value) {
    const Bits bits = (Bits)value;
    return bits + 0x7fff + (bits >> 16 & 1);
  }
};

template <class T>
using Whole = std::integral_constant<int64_t, step<T>>;

// The numbers from `from` on: Whole<T>, or fewer at the end of a row. Those `ahead` of them are prefetched.
template <class T>
INLINE Wide<T> load(const T* from, Whole<T>, int64_t ahead) {
  __builtin_prefetch(from + ahead);
  return Storage<T>::load(from);
}

template <class T>
INLINE Wide<T> load(const T* from, int64_t count, int64_t) {
  alignas(T) char numbers[sizeof(T) * step<T>] = {};
  std::memcpy(numbers, from, count * sizeof(T));
  return Storage<T>::load(reinterpret_cast<const T*>(numbers));
}

template <class T>
INLINE void store(T* to, Wide<T> wide, Whole<T>, bool streamed) {
  Storage<T>::store(to, wide, streamed);
}

template <class T>
INLINE void store(T* to, Wide<T> wide, int64_t count, bool) {
  alignas(T) char numbers[sizeof(T) * step<T>];
  Storage<T>::store(reinterpret_cast<T*>(numbers), wide, false);
  std::memcpy(to, numbers, count * sizeof(T));
}

// Constants and sums: in the order of Wide<T>, padded to whole steps.
template <class T>
INLINE Wide<T> load_lanes(const Acc<T>* from) {
  using Vec = typename Wide<T>::Vec;
  return {load_vector<Vec>(from), load_vector<Vec>(from + step<T> / 2)};
}

template <class T>
INLINE void store_lanes(Acc<T>* to, Wide<T> wide) {
  store_vector(to, wide.first);
  store_vector(to + step<T> / 2, wide.second);
}

// Calls body(first column, number of columns) for each step of columns.
template <class T, class Body>
INLINE void for_columns(int64_t columns, Body body) {
  int64_t column = 0;
  for (; column + step<T> <= columns; column += step<T>) body(column, Whole<T>{});
  if (column < columns) body(column, columns - column);
}

// Calls body(first row, number of rows as a compile-time constant): for the rows of a group, the constants
// and sums of a step of columns stay in registers.
template <class Body>
INLINE void for_rows(int64_t rows, Body body) {
  int64_t row = 0;
  for (; row + kGroupRows <= rows; row += kGroupRows)
    body(row, std::integral_constant<int64_t, kGroupRows>{});
  for (; row < rows; ++row) body(row, std::integral_constant<int64_t, 1>{});
}

// In elements: past the rows of the group, which are being read together.
template <class T>
INLINE int64_t prefetch_distance(int64_t columns) {
  return std::max<int64_t>(kPrefetchBytes / sizeof(T), kGroupRows * columns);
}

template <class T>
INLINE void clear(int64_t columns, Acc<T>* sum, Acc<T>* other) {
  for_columns<T>(columns, [&](int64_t c, auto) INLINE_LAMBDA {
    store_lanes<T>(sum + c, Wide<T>{});
    store_lanes<T>(other + c, Wide<T>{});
  });
}

// The sums of (x - shift) and (x - shift)^2.
template <class T>
void moments(int64_t rows, int64_t columns, const Acc<T>* shift, const T* x, Acc<T>* sum, Acc<T>* squares) {
  const int64_t ahead = prefetch_distance<T>(columns);
  clear<T>(columns, sum, squares);
  for_rows(rows, [&](int64_t row, auto group) INLINE_LAMBDA {
    for_columns<T>(columns, [&](int64_t c, auto count) INLINE_LAMBDA {
      const auto shift_c = load_lanes<T>(shift + c);
      auto sum_c = load_lanes<T>(sum + c);
      auto squares_c = load_lanes<T>(squares + c);
      for (int64_t i = 0; i < group; ++i) {
        const auto shifted = load(x + (row + i) * columns + c, count, ahead) - shift_c;
        sum_c = sum_c + shifted;
        squares_c = squares_c + shifted * shifted;
      }
      store_lanes<T>(sum + c, sum_c);
      store_lanes<T>(squares + c, squares_c);
    });
  });
}

// y = relu((x - mean) * scale + bias + residual)
template <class T, bool has_residual, bool relu>
void normalize(int64_t rows, int64_t columns, Affine<T> affine, const T* x, const T* residual, T* y,
               bool streamed) {
  const int64_t ahead = prefetch_distance<T>(columns);
  for_rows(rows, [&](int64_t row, auto group) INLINE_LAMBDA {
    for_columns<T>(columns, [&](int64_t c, auto count) INLINE_LAMBDA {
      const auto mean = load_lanes<T>(affine.mean + c);
      const auto scale = load_lanes<T>(affine.scale + c);
      const auto bias = load_lanes<T>(affine.bias + c);
      for (int64_t i = 0; i < group; ++i) {
        const int64_t at = (row + i) * columns + c;
        auto z = (load(x + at, count, ahead) - mean) * scale + bias;
        if constexpr (has_residual) z = z + load(residual + at, count, ahead);
        if constexpr (relu) z = Wide<T>::where_positive(z, z);
        store(y + at, z, count, streamed);
      }
    });
  });
  finish_stores(streamed);
}

// dz = dy where y > 0, and the sums of dz and dz * (x - mean). With a residual the mask is y's and dz is
// stored, being the residual's gradient, and dy may be the sum of two gradients; without one y's sign is
// recomputed from x, which is read anyway.
template <class T, Mask mask, bool has_twin>
void reduce(int64_t rows, int64_t columns, Affine<T> affine, const T* dy, const T* twin_dy, const T* x,
            const T* y, T* dz, Acc<T>* sum, Acc<T>* products, bool streamed) {
  const int64_t ahead = prefetch_distance<T>(columns);
  clear<T>(columns, sum, products);
  for_rows(rows, [&](int64_t row, auto group) INLINE_LAMBDA {
    for_columns<T>(columns, [&](int64_t c, auto count) INLINE_LAMBDA {
      const auto mean = load_lanes<T>(affine.mean + c);
      const auto scale = load_lanes<T>(affine.scale + c);
      const auto bias = load_lanes<T>(affine.bias + c);
      auto sum_c = load_lanes<T>(sum + c);
      auto products_c = load_lanes<T>(products + c);
      for (int64_t i = 0; i < group; ++i) {
        const int64_t at = (row + i) * columns + c;
        const auto centered = load(x + at, count, ahead) - mean;
        auto gradient = load(dy + at, count, ahead);
        if constexpr (has_twin) gradient = gradient + load(twin_dy + at, count, ahead);
        if constexpr (mask == Mask::from_x)
          gradient = Wide<T>::where_positive(centered * scale + bias, gradient);
        if constexpr (mask == Mask::from_y) {
          gradient = Wide<T>::where_positive(load(y + at, count, ahead), gradient);
          store(dz + at, gradient, count, streamed);
        }
        sum_c = sum_c + gradient;
        products_c = products_c + gradient * centered;
      }
      store_lanes<T>(sum + c, sum_c);
      store_lanes<T>(products + c, products_c);
    });
  });
  if constexpr (mask == Mask::from_y) finish_stores(streamed);
}

// dx = dz * scale + (x - mean) * slope + offset
template <class T, Mask mask>
void input_gradient(int64_t rows, int64_t columns, Affine<T> affine, const T* dy, const T* x,
                    const Acc<T>* slope, const Acc<T>* offset, T* dx, bool streamed) {
  const int64_t ahead = prefetch_distance<T>(columns);
  for_rows(rows, [&](int64_t row, auto group) INLINE_LAMBDA {
    for_columns<T>(columns, [&](int64_t c, auto count) INLINE_LAMBDA {
      const auto mean = load_lanes<T>(affine.mean + c);
      const auto scale = load_lanes<T>(affine.scale + c);
      const auto bias = load_lanes<T>(affine.bias + c);
      const auto slope_c = load_lanes<T>(slope + c);
      const auto offset_c = load_lanes<T>(offset + c);
      for (int64_t i = 0; i < group; ++i) {
        const int64_t at = (row + i) * columns + c;
        const auto centered = load(x + at, count, ahead) - mean;
        auto gradient = load(dy + at, count, ahead);
        if constexpr (mask == Mask::from_x)
          gradient = Wide<T>::where_positive(centered * scale + bias, gradient);
        store(dx + at, gradient * scale + centered * slope_c + offset_c, count, streamed);
      }
    });
  });
  finish_stores(streamed);
}

template <class T>
Kernels<T> kernels() {
  return {Storage<T>::stride,
          moments<T>,
          {{normalize<T, false, false>, normalize<T, false, true>},
           {normalize<T, true, false>, normalize<T, true, true>}},
          {reduce<T, Mask::none, false>, reduce<T, Mask::from_x, false>, reduce<T, Mask::from_y, false>,
           reduce<T, Mask::from_y, true>},
          {input_gradient<T, Mask::none>, input_gradient<T, Mask::from_x>}};
}

}  // namespace FASTRES_ISA
