// Cosine similarity of every pixel with its neighbours (see ops/local_similarity/op.py).
//
// Pixels are scaled to unit length as they are read. Similarity is symmetric, so only the later half of the
// taps (below, or to the right of the centre) is computed; the earlier ones are the same values, moved.
#pragma once

#include "simd.h"

namespace {

using freqfusion::Neighbourhood;

constexpr double kEpsilon = 1e-8;  // floor of the norms
constexpr i64 kSimilarityChannels = 8;

INLINE float root(float x) { return __builtin_sqrtf(x); }
INLINE double root(double x) { return __builtin_sqrt(x); }

// 1 / max(norm, epsilon) of every pixel's vector; item: one row.
template <class X, class A>
struct InverseNorms {
  Map x, out;

  i64 items() const { return x.batch * x.height; }
  i64 scratch() const { return 2 * scratch_bytes<A>(x.width); }

  void run(i64 item, Scratch scratch) const {
    constexpr int L = kLanes<A>;
    const i64 b = item / x.height, y = item % x.height, n = x.width;
    A* const sums = scratch.take<A>(n);
    A* const line = scratch.take<A>(n);
    if (channels_innermost(x)) {
      for (i64 j = 0; j < n; ++j) {
        const X* const from = at<X>(x, b, 0, y, j);
        Lanes<A, L> squares = {};
        i64 c = 0;
        for (; c + L <= x.channels; c += L) {
          const auto value = load<A, L>(from + c);
          squares += value * value;
        }
        A total = sum<A, L>(squares);
        for (; c < x.channels; ++c) total += A(widen(from[c])) * A(widen(from[c]));
        sums[j] = total;
      }
    } else {
      fill(sums, n, A(0));
      for (i64 c = 0; c < x.channels; ++c) {
        load_row(line, x, b, c, y, 0, n);
        for (i64 j = 0; j < n; ++j) sums[j] += line[j] * line[j];
      }
    }
    for (i64 j = 0; j < n; ++j) {
      const A norm = root(sums[j]);
      sums[j] = 1 / (norm < A(kEpsilon) ? A(kEpsilon) : norm);
    }
    store_row(out, b, 0, y, 0, sums, n);
  }
};

// Item: a tile of rows.
template <class X, class A>
struct Similarity {
  static constexpr int L = kLanes<A>;
  Map x, inverse, out;
  Neighbourhood options;
  i64 half, reach, tile, tiles, plane, width;

  Similarity(const Map& x, const Map& inverse, const Map& out, Neighbourhood options, i64 threads)
      : x(x), inverse(inverse), out(out), options(options) {
    half = options.window * options.window / 2;
    reach = options.window / 2 * options.dilation;
    plane = round_up(x.width, L);
    width = round_up(plane + 2 * reach, L);
    tile = most(least((256 << 10) / (half * plane * i64(sizeof(A))), 16), 1);
    tile = least(tile, ceil_div(x.batch * x.height, 4 * threads));
    tiles = ceil_div(x.height, tile);
  }

  i64 items() const { return x.batch * tiles; }
  i64 scratch() const {
    return scratch_bytes<A>(half * tile * plane) + scratch_bytes<A>(plane) +
           scratch_bytes<A>(kSimilarityChannels * (tile + reach) * width) + scratch_bytes<i64>(2 * half);
  }

  i64 step_y(i64 t) const { return ((half + 1 + t) / options.window - options.window / 2) * options.dilation; }
  i64 step_x(i64 t) const { return ((half + 1 + t) % options.window - options.window / 2) * options.dilation; }

  void run(i64 item, Scratch scratch) const {
    const i64 b = item / tiles, top = item % tiles * tile, bottom = least(top + tile, x.height), w = x.width;
    A* const sums = scratch.take<A>(half * tile * plane);
    A* const inverse_row = scratch.take<A>(plane);
    A* const units = scratch.take<A>(kSimilarityChannels * (tile + reach) * width);
    i64* const steps = scratch.take<i64>(2 * half);
    fill(sums, half * tile * plane, A(0));
    if (channels_innermost(x)) {
      pixels(b, top, bottom, sums, steps);
    } else {
      for (i64 c0 = 0; c0 < x.channels; c0 += kSimilarityChannels)
        rows(b, c0, least(kSimilarityChannels, x.channels - c0), top, bottom, sums, inverse_row, units);
    }
    for (i64 t = 0; t < half; ++t) {
      const i64 dy = step_y(t), dx = step_x(t), later = half + t, earlier = half - 1 - t;
      const i64 begin = least(most(-dx, 0), w), end = most(least(w - dx, w), begin);  // columns with a neighbour
      const i64 mirrored_begin = least(most(dx, 0), w), mirrored_end = most(least(w + dx, w), mirrored_begin);
      for (i64 i = top; i < bottom; ++i) {
        const A* const row = sums + (t * tile + i - top) * plane;
        store_row(out, b, later, i, 0, row, w);
        // Row i of the mirrored map comes from row i - dy, perhaps in another tile; this tile writes row i + dy
        // and the zeros of row i.
        if (i + dy < x.height) store_row(out, b, earlier, i + dy, mirrored_begin, row + begin, end - begin);
        zero_row(b, earlier, i, 0, i >= dy ? mirrored_begin : w);
        if (i >= dy) zero_row(b, earlier, i, mirrored_end, w);
      }
    }
  }

  void zero_row(i64 b, i64 c, i64 y, i64 begin, i64 end) const {
    const A zero = 0;
    for (i64 j = begin; j < end; ++j) store_row(out, b, c, y, j, &zero, 1);
  }

  void rows(i64 b, i64 c0, i64 channels, i64 top, i64 bottom, A* sums, A* inverse_row, A* units) const {
    const i64 w = x.width, depth = tile + reach;
    for (i64 r = 0; r < bottom - top + reach; ++r) {
      const i64 i = top + r;
      if (i < x.height) load_row(inverse_row, inverse, b, 0, i, 0, w);
      for (i64 c = 0; c < channels; ++c) {
        A* const row = units + (c * depth + r) * width;
        if (i >= x.height) {
          fill(row, width, A(0));
          continue;
        }
        fill(row, reach, A(0));
        load_row(row + reach, x, b, c0 + c, i, 0, w);
        for (i64 j = 0; j < w; ++j) row[reach + j] *= inverse_row[j];
        fill(row + reach + w, width - reach - w, A(0));
      }
    }
    for (i64 r = 0; r < bottom - top; ++r)
      for (i64 t = 0; t < half; ++t) {
        const A* const own = units + r * width + reach;
        const A* const other = own + step_y(t) * width + step_x(t);
        A* const to = sums + (t * tile + r) * plane;
        for (i64 j = 0; j < w; j += L) {
          auto total = load<A, L>(to + j);
          for (i64 c = 0; c < channels; ++c)
            total += load<A, L>(own + c * depth * width + j) * load<A, L>(other + c * depth * width + j);
          store<A, L>(to + j, total);
        }
      }
  }

  void pixels(i64 b, i64 top, i64 bottom, A* sums, i64* steps) const {
    for (i64 t = 0; t < half; ++t) {  // once, not a pixel: divisions are slow
      steps[2 * t] = step_y(t);
      steps[2 * t + 1] = step_x(t);
    }
    for (i64 i = top; i < bottom; ++i)
      for (i64 j = 0; j < x.width; ++j) {
        const X* const own = at<X>(x, b, 0, i, j);
        const A own_scale = *at<A>(inverse, b, 0, i, j);
        for (i64 t = 0; t < half; ++t) {
          const i64 y = i + steps[2 * t], column = j + steps[2 * t + 1];
          if (y >= x.height || column < 0 || column >= x.width) continue;
          const X* const other = at<X>(x, b, 0, y, column);
          const A other_scale = *at<A>(inverse, b, 0, y, column);
          Lanes<A, L> products = {};
          i64 c = 0;
          for (; c + L <= x.channels; c += L)
            products += (load<A, L>(own + c) * own_scale) * (load<A, L>(other + c) * other_scale);
          A total = sum<A, L>(products);
          for (; c < x.channels; ++c)
            total += (A(widen(own[c])) * own_scale) * (A(widen(other[c])) * other_scale);
          sums[(t * tile + i - top) * plane + j] = total;
        }
      }
  }
};

// The derivative in x is a weighted sum of x over the same neighbours and the centre; this makes the weights.
// With u = x / norm and w_d(p) = grad_d(p) + grad_-d(p + d), the derivative at p is
// (sum over d of w_d(p) u(p + d) - u(p) sum over d of w_d(p) similarity_d(p)) / norm(p); a vector whose norm
// is below epsilon was divided by a constant, so its second term is absent. Item: one row.
template <class A>
struct SimilarityWeights {
  Map similarity, grad, inverse, out;
  Neighbourhood options;

  i64 items() const { return grad.batch * grad.height; }
  i64 scratch() const { return 6 * scratch_bytes<A>(grad.width); }

  void run(i64 item, Scratch scratch) const {
    const i64 b = item / grad.height, y = item % grad.height, w = grad.width;
    const i64 taps = options.window * options.window, centre = taps / 2;
    A* const own = scratch.take<A>(w);
    A* const other = scratch.take<A>(w);
    A* const weights = scratch.take<A>(w);
    A* const mirrored = scratch.take<A>(w);
    A* const similarities = scratch.take<A>(w);
    A* const sums = scratch.take<A>(w);
    load_row(own, inverse, b, 0, y, 0, w);
    fill(sums, w, A(0));
    for (i64 t = 0; t < taps; ++t) {
      if (t == centre) continue;
      const i64 dy = (t / options.window - options.window / 2) * options.dilation;
      const i64 dx = (t % options.window - options.window / 2) * options.dilation;
      const i64 channel = t < centre ? t : t - 1, opposite = taps - 2 - channel;
      const i64 begin = least(most(-dx, 0), w), end = most(least(w - dx, w), begin);
      fill(weights, w, A(0));
      if (y + dy >= 0 && y + dy < grad.height && begin < end) {
        load_row(weights + begin, grad, b, channel, y, begin, end - begin);
        load_row(mirrored + begin, grad, b, opposite, y + dy, begin + dx, end - begin);
        load_row(similarities + begin, similarity, b, channel, y, begin, end - begin);
        load_row(other + begin, inverse, b, 0, y + dy, begin + dx, end - begin);
        for (i64 j = begin; j < end; ++j) {
          const A weight = weights[j] + mirrored[j];
          sums[j] += weight * similarities[j];
          weights[j] = weight * own[j] * other[j];
        }
      }
      store_row(out, b, t, y, 0, weights, w);
    }
    for (i64 j = 0; j < w; ++j) weights[j] = own[j] < A(1 / kEpsilon) ? -sums[j] * own[j] * own[j] : A(0);
    store_row(out, b, centre, y, 0, weights, w);
  }
};

}  // namespace
