// Vectors, storage types and rows of maps. Everything has internal linkage, see api.h.
#pragma once

#include <cstring>

#include "api.h"

namespace {

using i64 = int64_t;
using freqfusion::Map;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32 vector registers rather than 16
#else
constexpr bool kManyRegisters = false;
#endif

#define INLINE inline __attribute__((always_inline))

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
INLINE i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

struct BFloat16 {
  uint16_t bits;
};

INLINE float widen(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }

INLINE void narrow(float value, float* out) { *out = value; }
INLINE void narrow(double value, double* out) { *out = value; }
INLINE void narrow(float value, BFloat16* out) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = uint16_t(value == value ? rounded : (bits >> 16) | 0x40);
}

template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

// N lanes of A; a single lane is A itself, so that the same code serves remainders.
template <class A, int N>
struct Vector {
  typedef A Type __attribute__((vector_size(N * sizeof(A))));
};
template <class A>
struct Vector<A, 1> {
  typedef A Type;
};
template <class A, int N>
using Lanes = typename Vector<A, N>::Type;

template <class A, int N>
INLINE Lanes<A, N> load(const A* from) {
  Lanes<A, N> value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <class A, int N>
INLINE Lanes<A, N> load(const BFloat16* from) {
  if constexpr (N == 1) {
    return widen(*from);
  } else {
    Lanes<uint16_t, N> half;
    memcpy(&half, from, sizeof half);
    Lanes<uint32_t, N> bits = __builtin_convertvector(half, Lanes<uint32_t, N>) << 16;
    Lanes<float, N> value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
}
template <class A, int N>
INLINE void store(A* to, Lanes<A, N> value) {
  memcpy(to, &value, sizeof value);
}
template <class A, int N>
INLINE void store(BFloat16* to, Lanes<A, N> value) {
  float lanes[N];
  memcpy(lanes, &value, sizeof value);
  for (int i = 0; i < N; ++i) narrow(lanes[i], to + i);
}

// The next width of vectors for a remainder: half as wide, then single values.
template <class A>
constexpr int narrower(int width) {
  return width * int(sizeof(A)) > 16 ? width / 2 : 1;
}

template <class A>
constexpr int64_t plain_dtype = sizeof(A) == 8 ? freqfusion::kFloat64 : freqfusion::kFloat32;

template <class A, int N>
INLINE A sum(Lanes<A, N> value) {
  if constexpr (N == 1) {
    return value;
  } else {
    Lanes<A, N / 2> halves[2];
    memcpy(halves, &value, sizeof value);
    return sum<A, N / 2>(halves[0] + halves[1]);
  }
}

// Rows: n values of a map (any dtype, any stride) to or from contiguous ones of type A.
template <class X, class A>
INLINE void load_strided(A* to, const X* from, i64 stride, i64 n) {
  if (stride == 1) {
    for (i64 i = 0; i < n; ++i) to[i] = A(widen(from[i]));
  } else {
    for (i64 i = 0; i < n; ++i) to[i] = A(widen(from[i * stride]));
  }
}
template <class X, class A>
INLINE void store_strided(X* to, i64 stride, const A* from, i64 n) {
  if (stride == 1) {
    for (i64 i = 0; i < n; ++i) narrow(from[i], to + i);
  } else {
    for (i64 i = 0; i < n; ++i) narrow(from[i], to + i * stride);
  }
}

template <class X>
INLINE X* at(const Map& map, i64 b, i64 c, i64 y, i64 x) {
  return static_cast<X*>(map.data) + b * map.batch_stride + c * map.channel_stride + y * map.row_stride +
         x * map.column_stride;
}

INLINE bool channels_innermost(const Map& map) { return map.channel_stride == 1 && map.channels > 1; }

// Calls `body(pointer)` with the map's element (b, c, y, x), typed as it is stored. A map that is computed
// in float64 is stored so; one that is computed in float32 is float32 or bfloat16.
template <class A, class Body>
INLINE void typed(const Map& map, i64 b, i64 c, i64 y, i64 x, Body body) {
  if constexpr (sizeof(A) == 8) {
    body(at<double>(map, b, c, y, x));
  } else if (map.dtype == freqfusion::kBFloat16) {
    body(at<BFloat16>(map, b, c, y, x));
  } else {
    body(at<float>(map, b, c, y, x));
  }
}

template <class A>
INLINE void load_row(A* to, const Map& map, i64 b, i64 c, i64 y, i64 x, i64 n) {
  typed<A>(map, b, c, y, x, [&](auto* from) { load_strided(to, from, map.column_stride, n); });
}
template <class A>
INLINE void store_row(const Map& map, i64 b, i64 c, i64 y, i64 x, const A* from, i64 n) {
  typed<A>(map, b, c, y, x, [&](auto* to) { store_strided(to, map.column_stride, from, n); });
}

template <class A>
INLINE void fill(A* to, i64 n, A value) {
  for (i64 i = 0; i < n; ++i) to[i] = value;
}

// Source of place i of a reflect-padded axis; defined for any length, 1 included.
INLINE i64 reflected(i64 i, i64 length) {
  if (length == 1) return 0;
  const i64 period = 2 * (length - 1);
  i64 place = i % period;
  if (place < 0) place += period;
  return least(place, period - place);
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls body(width, c) for vectors that lie side by side over [c, end), ever narrower ones at the end.
template <class A, int W, class Body>
INLINE void partition(i64 c, i64 end, Body body) {
  for (; c + W <= end; c += W) body(Constant<W>{}, c);
  if constexpr (W > 1)
    if (c < end) partition<A, narrower<A>(W)>(c, end, body);
}

// Scratch memory handed out piece by piece, each aligned to a cache line.
struct Scratch {
  char* next;
  template <class T>
  INLINE T* take(i64 n) {
    T* piece = reinterpret_cast<T*>(next);
    next += round_up(n * i64(sizeof(T)), 64);
    return piece;
  }
};
template <class T>
INLINE i64 scratch_bytes(i64 n) {
  return round_up(n * i64(sizeof(T)), 64);
}

// Starts the driver on an operation with members `items()`, `scratch()` and `run(item, Scratch)`.
template <class Operation>
INLINE bool drive(const Operation& operation, i64 threads, freqfusion::Driver driver) {
  auto run = [](const void* self, int64_t item, char* scratch) {
    static_cast<const Operation*>(self)->run(item, Scratch{scratch});
  };
  return driver(&operation, run, operation.items(), size_t(operation.scratch()), threads);
}

}  // namespace
