// The reassembly (see ops/carafe/op.py) and its two adjoints.
//
// The fine pixels that share a window are its coarse pixel's: coarse row i has the fine rows
// [first(i), first(i + 1)). A fine row is held as `slots` planes of coarse width, plane p with the p-th fine
// pixel of every coarse pixel, so that one load of x serves all fine pixels of a window and a shift by a tap
// is a shift by one element. Where the ratio is no whole number, some pixels have no p-th fine pixel; their
// places are computed and dropped.
//
// Maps with channels innermost are read where they lie, a vector of channels at a time; all others row by
// row, through a padded copy of a few channels' rows (which also serves any stride and bfloat16).
#pragma once

#include "simd.h"

namespace {

using freqfusion::Reassembly;

constexpr i64 kMaskBytes = 192 << 10;  // of the packed kernels of a tile: stays in the second-level cache
constexpr i64 kChannelBlock = 4;       // channels whose rows are copied together
constexpr i64 kPixelBlock = 16;        // coarse pixels handled together where channels are innermost

struct Axis {
  i64 coarse, fine;
  i64 slots() const { return ceil_div(fine, coarse); }
  i64 first(i64 i) const { return ceil_div(i * fine, coarse); }
  i64 count(i64 i) const { return first(i + 1) - first(i); }
};

// A fine row's pixels of coarse columns [begin, end) to planes, zero where a column has no such pixel.
template <class A>
void split_row(A* __restrict to, i64 plane, const Map& map, const Axis& axis, i64 b, i64 c, i64 row, i64 begin,
               i64 end) {
  const i64 first = axis.first(begin), count = axis.first(end) - first, n = end - begin;
  if (axis.fine == axis.coarse) return load_row(to, map, b, c, row, begin, n);
  typed<A>(map, b, c, row, first, [&](const auto* from) {
    const i64 stride = map.column_stride;
    if (axis.slots() == 2 && axis.fine >= 2 * axis.coarse - 1) {  // at most the last pixel is missing
      const i64 pairs = count / 2;
      if (stride == 1) {
        for (i64 j = 0; j < pairs; ++j) {
          to[j] = A(widen(from[2 * j]));
          to[plane + j] = A(widen(from[2 * j + 1]));
        }
      } else {
        for (i64 j = 0; j < pairs; ++j) {
          to[j] = A(widen(from[2 * j * stride]));
          to[plane + j] = A(widen(from[(2 * j + 1) * stride]));
        }
      }
      if (pairs < n) {
        to[pairs] = A(widen(from[2 * pairs * stride]));
        to[plane + pairs] = 0;
      }
      return;
    }
    const i64 slots = axis.slots();
    for (i64 j = 0; j < n; ++j) {
      const i64 start = axis.first(begin + j), pixels = axis.count(begin + j);
      for (i64 p = 0; p < slots; ++p)
        to[p * plane + j] = p < pixels ? A(widen(from[(start - first + p) * stride])) : A(0);
    }
  });
}

// The reverse: planes of coarse columns [begin, end) to a fine row.
template <class A>
void merge_row(const A* __restrict from, i64 plane, const Map& map, const Axis& axis, i64 b, i64 c, i64 row,
               i64 begin, i64 end) {
  const i64 first = axis.first(begin), count = axis.first(end) - first, n = end - begin;
  if (axis.fine == axis.coarse) return store_row(map, b, c, row, begin, from, n);
  typed<A>(map, b, c, row, first, [&](auto* to) {
    const i64 stride = map.column_stride;
    if (axis.slots() == 2 && axis.fine >= 2 * axis.coarse - 1) {
      const i64 pairs = count / 2;
      if (stride == 1) {
        for (i64 j = 0; j < pairs; ++j) {
          narrow(from[j], to + 2 * j);
          narrow(from[plane + j], to + 2 * j + 1);
        }
      } else {
        for (i64 j = 0; j < pairs; ++j) {
          narrow(from[j], to + 2 * j * stride);
          narrow(from[plane + j], to + (2 * j + 1) * stride);
        }
      }
      if (pairs < n) narrow(from[pairs], to + 2 * pairs * stride);
      return;
    }
    for (i64 j = 0; j < n; ++j) {
      const i64 start = axis.first(begin + j), pixels = axis.count(begin + j);
      for (i64 p = 0; p < pixels; ++p) narrow(from[p * plane + j], to + (start - first + p) * stride);
    }
  });
}

// Columns [begin, begin + n) of a row, either of which may lie outside the map.
template <class A>
void load_padded(A* to, const Map& map, bool reflect, i64 b, i64 c, i64 row, i64 begin, i64 n) {
  if (reflect) {
    row = reflected(row, map.height);
  } else if (row < 0 || row >= map.height) {
    return fill(to, n, A(0));
  }
  const i64 inside = least(most(-begin, 0), n), outside = most(least(map.width - begin, n), inside);
  load_row(to + inside, map, b, c, row, begin + inside, outside - inside);
  if (!reflect) {
    fill(to, inside, A(0));
    fill(to + outside, n - outside, A(0));
    return;
  }
  for (i64 j = 0; j < inside; ++j) load_row(to + j, map, b, c, row, reflected(begin + j, map.width), 1);
  for (i64 j = outside; j < n; ++j) load_row(to + j, map, b, c, row, reflected(begin + j, map.width), 1);
}

// What the row-wise kernels share: tiles of coarse rows and blocks of coarse columns of one group.
template <class A>
struct Tiling {
  static constexpr int L = kLanes<A>;
  Reassembly options;
  i64 batch, groups, channels;  // channels of one group
  Axis rows, columns;
  i64 k, taps, radius, planes;
  i64 block, blocks, tile, tiles;

  Tiling(const Map& coarse, const Map& fine, i64 channels_of_map, Reassembly options, i64 widest_block,
         i64 deepest_tile, i64 threads)
      : options(options),
        batch(coarse.batch),
        groups(options.groups),
        channels(channels_of_map / options.groups),
        rows{coarse.height, fine.height},
        columns{coarse.width, fine.width},
        k(options.kernel_size),
        taps(k * k),
        radius(k / 2),
        planes(rows.slots() * columns.slots()) {
    const i64 column_bytes = taps * planes * i64(sizeof(A));
    blocks = 1;
    while (ceil_div(columns.coarse, blocks) > least(widest_block, most(kMaskBytes / column_bytes, 64))) ++blocks;
    block = round_up(ceil_div(columns.coarse, blocks), L);
    blocks = ceil_div(columns.coarse, block);
    tile = most(least(kMaskBytes / (column_bytes * block), deepest_tile), 1);
    tile = least(tile, ceil_div(batch * groups * blocks * rows.coarse, 4 * threads));
    tiles = ceil_div(rows.coarse, tile);
  }

  i64 items() const { return batch * groups * tiles * blocks; }

  struct Place {
    i64 b, g, top, bottom, left, right;
  };
  Place place(i64 item) const {
    const i64 block_index = item % blocks, tile_index = item / blocks % tiles;
    const i64 rest = item / blocks / tiles;
    const i64 top = tile_index * tile, left = block_index * block;
    return {rest / groups,
            rest % groups,
            top,
            least(top + tile, rows.coarse),
            left,
            least(left + block, columns.coarse)};
  }
};

// ---------------------------------------------------------------------------------------------------------
// Forward, row by row

// N channels and P planes of one coarse row: out[c][p][j] = sum over taps of x[c][row d][j + e] * masks[t][p][j]
template <class A, int K, int P, int N>
void reassemble(const A* x, i64 x_channel, i64 x_row, const A* masks, i64 mask_tap, i64 plane, A* out,
                i64 out_channel, i64 n, i64 k, i64 dilation) {
  constexpr int L = kLanes<A>;
  using V = Lanes<A, L>;
  const i64 side = K ? K : k;
  for (i64 j = 0; j < n; j += L) {
    V sums[N][P] = {};
    const A* mask = masks + j;
    for (i64 d = 0; d < side; ++d) {
      const A* row = x + d * dilation * x_row + j;
#pragma GCC unroll 5
      for (i64 e = 0; e < side; ++e, mask += mask_tap) {
        V weights[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) weights[p] = load<A, L>(mask + p * plane);
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c) {
          const V value = load<A, L>(row + c * x_channel + e * dilation);
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) sums[c][p] += value * weights[p];
        }
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) store<A, L>(out + c * out_channel + p * plane + j, sums[c][p]);
  }
}

template <class A, int K>
struct ForwardRows : Tiling<A> {
  using Tiling<A>::L;
  Map x, masks, out;
  i64 reach, x_rows, x_width, plane;

  ForwardRows(const Map& x, const Map& masks, const Map& out, Reassembly options, i64 threads)
      : Tiling<A>(x, out, x.channels, options, 512, 16, threads), x(x), masks(masks), out(out) {
    reach = this->radius * options.dilation;
    plane = this->block;
    x_rows = this->tile + 2 * reach;
    x_width = round_up(plane + 2 * reach, L);
  }

  i64 scratch() const {
    return scratch_bytes<A>(this->tile * this->taps * this->planes * plane) +
           scratch_bytes<A>(kChannelBlock * x_rows * x_width) +
           scratch_bytes<A>(kChannelBlock * this->planes * plane);
  }

  template <int P>
  void row(const A* x_scratch, const A* mask_scratch, A* out_scratch, i64 channels, i64 n) const {
    constexpr int N = P == 4 && !kManyRegisters ? 2 : 4;
    const i64 mask_tap = this->planes * plane, x_channel = x_rows * x_width, out_channel = mask_tap;
    i64 c = 0;
    for (; c + N <= channels; c += N)
      reassemble<A, K, P, N>(x_scratch + c * x_channel, x_channel, x_width, mask_scratch, mask_tap, plane,
                             out_scratch + c * out_channel, out_channel, n, this->k, this->options.dilation);
    for (; c < channels; ++c)
      reassemble<A, K, P, 1>(x_scratch + c * x_channel, x_channel, x_width, mask_scratch, mask_tap, plane,
                             out_scratch + c * out_channel, out_channel, n, this->k, this->options.dilation);
  }

  void run(i64 item, Scratch scratch) const {
    const auto [b, g, top, bottom, left, right] = this->place(item);
    const i64 taps = this->taps, planes = this->planes, slots = this->columns.slots(), n = right - left;
    A* const mask_scratch = scratch.take<A>(this->tile * taps * planes * plane);
    A* const x_scratch = scratch.take<A>(kChannelBlock * x_rows * x_width);
    A* const out_scratch = scratch.take<A>(kChannelBlock * planes * plane);
    for (i64 i = top; i < bottom; ++i)
      for (i64 t = 0; t < taps; ++t)
        for (i64 p = 0; p < this->rows.count(i); ++p)
          split_row(mask_scratch + (((i - top) * taps + t) * planes + p * slots) * plane, plane, masks,
                    this->columns, b, g * taps + t, this->rows.first(i) + p, left, right);
    for (i64 c0 = 0; c0 < this->channels; c0 += kChannelBlock) {
      const i64 channels = least(kChannelBlock, this->channels - c0), channel = g * this->channels + c0;
      for (i64 c = 0; c < channels; ++c)
        for (i64 r = 0; r < bottom - top + 2 * reach; ++r)
          load_padded(x_scratch + (c * x_rows + r) * x_width, x, this->options.reflect != 0, b, channel + c,
                      top + r - reach, left - reach, n + 2 * reach);
      for (i64 i = top; i < bottom; ++i) {
        const A* const x_row = x_scratch + (i - top) * x_width;
        const A* const mask_row = mask_scratch + (i - top) * taps * planes * plane;
        const i64 used = this->rows.count(i) * slots;
        i64 p = 0;
        for (; p + 4 <= used; p += 4) row<4>(x_row, mask_row + p * plane, out_scratch + p * plane, channels, n);
        for (; p + 2 <= used; p += 2) row<2>(x_row, mask_row + p * plane, out_scratch + p * plane, channels, n);
        for (; p < used; ++p) row<1>(x_row, mask_row + p * plane, out_scratch + p * plane, channels, n);
        for (i64 c = 0; c < channels; ++c)
          for (i64 q = 0; q < this->rows.count(i); ++q)
            merge_row(out_scratch + (c * planes + q * slots) * plane, plane, out, this->columns, b, channel + c,
                      this->rows.first(i) + q, left, right);
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------
// Derivative in the kernels, row by row

// E columns of one window row, P planes: sums[e][p][j] += sum over channels of x[c][j + e] * grad[c][p][j]
template <class A, int E, int P>
void correlate(const A* x, i64 x_channel, const A* grad, i64 grad_channel, i64 channels, A* sums, i64 sums_tap,
               i64 plane, i64 n) {
  constexpr int L = kLanes<A>;
  using V = Lanes<A, L>;
  for (i64 j = 0; j < n; j += L) {
    V totals[E][P];
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) totals[e][p] = load<A, L>(sums + e * sums_tap + p * plane + j);
    for (i64 c = 0; c < channels; ++c) {
      V incoming[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) incoming[p] = load<A, L>(grad + c * grad_channel + p * plane + j);
#pragma GCC unroll 8
      for (int e = 0; e < E; ++e) {
        const V value = load<A, L>(x + c * x_channel + e + j);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) totals[e][p] += value * incoming[p];
      }
    }
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) store<A, L>(sums + e * sums_tap + p * plane + j, totals[e][p]);
  }
}

template <class A, int K>
struct KernelGradientRows : Tiling<A> {
  using Tiling<A>::L;
  static constexpr i64 kChannels = 8;
  Map x, grad, out;
  i64 x_width, plane;

  KernelGradientRows(const Map& x, const Map& grad, const Map& out, Reassembly options, i64 threads)
      : Tiling<A>(x, grad, x.channels, options, widest(x, grad, options), 1, threads), x(x), grad(grad), out(out) {
    plane = this->block;
    x_width = round_up(plane + 2 * this->radius, L);
  }

  i64 scratch() const {
    return scratch_bytes<A>(this->taps * this->planes * plane) + scratch_bytes<A>(kChannels * this->k * x_width) +
           scratch_bytes<A>(kChannels * this->planes * plane);
  }

  // Columns whose sums stay in the first-level cache; not many fewer than 64, for every row is copied first.
  static i64 widest(const Map& x, const Map& grad, Reassembly options) {
    const i64 planes = ceil_div(grad.height, x.height) * ceil_div(grad.width, x.width);
    return most(64, (32 << 10) / (options.kernel_size * options.kernel_size * planes * i64(sizeof(A))));
  }

  template <int P>
  void window(const A* x_scratch, const A* grad_scratch, A* sums, i64 channels, i64 n) const {
    constexpr int E = K ? K : 1;
    const i64 sums_tap = this->planes * plane;
    for (i64 d = 0; d < this->k; ++d)
      for (i64 e = 0; e < this->k; e += E)
        correlate<A, E, P>(x_scratch + d * x_width + e, this->k * x_width, grad_scratch, sums_tap, channels,
                           sums + (d * this->k + e) * sums_tap, sums_tap, plane, n);
  }

  void run(i64 item, Scratch scratch) const {
    const auto [b, g, i, bottom, left, right] = this->place(item);
    const i64 taps = this->taps, planes = this->planes, slots = this->columns.slots(), n = right - left;
    const i64 fine_rows = this->rows.count(i), used = fine_rows * slots;
    A* const sums = scratch.take<A>(taps * planes * plane);
    A* const x_scratch = scratch.take<A>(kChannels * this->k * x_width);
    A* const grad_scratch = scratch.take<A>(kChannels * planes * plane);
    fill(sums, taps * planes * plane, A(0));
    for (i64 c0 = 0; c0 < this->channels; c0 += kChannels) {
      const i64 channels = least(kChannels, this->channels - c0), channel = g * this->channels + c0;
      for (i64 c = 0; c < channels; ++c) {
        for (i64 d = 0; d < this->k; ++d)
          load_padded(x_scratch + (c * this->k + d) * x_width, x, this->options.reflect != 0, b, channel + c,
                      i + d - this->radius, left - this->radius, n + 2 * this->radius);
        for (i64 p = 0; p < fine_rows; ++p)
          split_row(grad_scratch + (c * planes + p * slots) * plane, plane, grad, this->columns, b, channel + c,
                    this->rows.first(i) + p, left, right);
      }
      constexpr int P = kManyRegisters ? 4 : 2;
      i64 p = 0;
      for (; p + P <= used; p += P)
        window<P>(x_scratch, grad_scratch + p * plane, sums + p * plane, channels, n);
      for (; p < used; ++p) window<1>(x_scratch, grad_scratch + p * plane, sums + p * plane, channels, n);
    }
    for (i64 t = 0; t < taps; ++t)
      for (i64 p = 0; p < fine_rows; ++p)
        merge_row(sums + (t * planes + p * slots) * plane, plane, out, this->columns, b, g * taps + t,
                  this->rows.first(i) + p, left, right);
  }
};

// ---------------------------------------------------------------------------------------------------------
// Derivative in x, row by row
//
// A row q of the padded map gathers what every tap of the rows around it took from it; a term is one tap of
// one plane. Columns are places of the padded map too: place q of a block is column left - radius + q.

template <class A, int N>
void gather(const A* masks, i64 width, const i64* offsets, i64 terms, const A* grad, i64 grad_channel, A* out,
            i64 out_channel) {
  constexpr int L = kLanes<A>;
  using V = Lanes<A, L>;
  for (i64 j = 0; j < width; j += L) {
    V sums[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) sums[c] = load<A, L>(out + c * out_channel + j);
    const A* mask = masks + j;
    for (i64 t = 0; t < terms; ++t, mask += width) {
      const V weight = load<A, L>(mask);
      const A* const values = grad + offsets[t] + j;
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) sums[c] += weight * load<A, L>(values + c * grad_channel);
    }
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) store<A, L>(out + c * out_channel + j, sums[c]);
  }
}

template <class A>
struct GradientRows : Tiling<A> {
  using Tiling<A>::L;
  Map masks, grad, out;
  i64 padded_rows, grad_rows, width, grad_width;

  GradientRows(const Map& masks, const Map& grad, const Map& out, Reassembly options, i64 threads)
      : Tiling<A>(out, grad, out.channels, options, 512, 16, threads), masks(masks), grad(grad), out(out) {
    const i64 radius = this->radius, last = this->columns.coarse - (this->blocks - 1) * this->block;
    if (options.reflect && least(last, this->block) <= radius) {  // the folded border must lie in its block
      this->block = round_up(this->columns.coarse, L);
      this->blocks = 1;
    }
    padded_rows = this->tile + (options.reflect ? 2 * radius : 0);
    grad_rows = least(this->tile + 2 * radius, this->rows.coarse);
    width = round_up(this->block + 2 * radius, L);
    grad_width = round_up(width + 2 * radius, L);
  }

  i64 scratch() const {
    const i64 terms = padded_rows * this->taps * this->planes;
    return scratch_bytes<A>(terms * width) + scratch_bytes<i64>(terms) + 2 * scratch_bytes<i64>(padded_rows) +
           scratch_bytes<A>(kChannelBlock * grad_rows * this->planes * grad_width) +
           scratch_bytes<A>(kChannelBlock * this->tile * width);
  }

  void run(i64 item, Scratch scratch) const {
    const auto [b, g, top, bottom, left, right] = this->place(item);
    const i64 radius = this->radius, k = this->k, taps = this->taps, planes = this->planes;
    const i64 slots = this->columns.slots(), n = right - left, h = this->rows.coarse, w = this->columns.coarse;
    const bool reflect = this->options.reflect != 0;
    A* const mask_scratch = scratch.take<A>(padded_rows * taps * planes * width);
    i64* const offsets = scratch.take<i64>(padded_rows * taps * planes);
    i64* const targets = scratch.take<i64>(padded_rows);
    i64* const terms = scratch.take<i64>(padded_rows);
    A* const grad_scratch = scratch.take<A>(kChannelBlock * grad_rows * planes * grad_width);
    A* const out_scratch = scratch.take<A>(kChannelBlock * this->tile * width);

    const i64 first_row = most(top - radius, 0), last_row = least(bottom + radius, h);
    i64 padded = 0;
    for (i64 q = reflect ? -radius : 0; q < (reflect ? h + radius : h); ++q) {
      const i64 target = reflect ? reflected(q, h) : q;
      if (target < top || target >= bottom) continue;
      A* const packed = mask_scratch + padded * taps * planes * width;
      i64* const places = offsets + padded * taps * planes;
      i64 term = 0;
      for (i64 d = 0; d < k; ++d) {
        const i64 source = q - d + radius;
        if (source < 0 || source >= h) continue;
        const i64 fine_rows = this->rows.count(source);
        for (i64 e = 0; e < k; ++e) {
          const i64 begin = most(left - e, 0), end = least(left + n + 2 * radius - e, w);
          fill(packed + term * width, fine_rows * slots * width, A(0));
          for (i64 p = 0; p < fine_rows; ++p) {
            split_row(packed + (term + p * slots) * width + begin - left + e, width, masks, this->columns, b,
                      g * taps + d * k + e, this->rows.first(source) + p, begin, end);
          }
          for (i64 p = 0; p < fine_rows * slots; ++p)
            places[term + p] = ((source - first_row) * planes + p) * grad_width + 2 * radius - e;
          term += fine_rows * slots;
        }
      }
      targets[padded] = target - top;
      terms[padded++] = term;
    }

    const i64 begin = most(left - 2 * radius, 0), end = least(left + n + 2 * radius, w);
    const i64 margin = begin - left + 2 * radius, tail = margin + end - begin;
    const i64 grad_channel = grad_rows * planes * grad_width, out_channel = this->tile * width;
    for (i64 c0 = 0; c0 < this->channels; c0 += kChannelBlock) {
      const i64 channels = least(kChannelBlock, this->channels - c0), channel = g * this->channels + c0;
      for (i64 c = 0; c < channels; ++c)
        for (i64 i = first_row; i < last_row; ++i)
          for (i64 p = 0; p < this->rows.count(i); ++p) {
            A* const rows = grad_scratch + c * grad_channel + ((i - first_row) * planes + p * slots) * grad_width;
            for (i64 s = 0; s < slots; ++s) {
              fill(rows + s * grad_width, margin, A(0));
              fill(rows + s * grad_width + tail, grad_width - tail, A(0));
            }
            split_row(rows + margin, grad_width, grad, this->columns, b, channel + c, this->rows.first(i) + p, begin,
                      end);
          }
      fill(out_scratch, kChannelBlock * out_channel, A(0));
      for (i64 q = 0; q < padded; ++q) {
        const A* const packed = mask_scratch + q * taps * planes * width;
        const i64* const places = offsets + q * taps * planes;
        A* const target = out_scratch + targets[q] * width;
        if (channels == kChannelBlock) {
          gather<A, kChannelBlock>(packed, width, places, terms[q], grad_scratch, grad_channel, target, out_channel);
          continue;
        }
        for (i64 c = 0; c < channels; ++c)
          gather<A, 1>(packed, width, places, terms[q], grad_scratch + c * grad_channel, 0, target + c * out_channel,
                       0);
      }
      for (i64 c = 0; c < channels; ++c)
        for (i64 i = top; i < bottom; ++i) {
          A* const row = out_scratch + c * out_channel + (i - top) * width + radius;  // its first is column `left`
          if (reflect && left == 0)
            for (i64 j = -radius; j < 0; ++j) row[reflected(j, w)] += row[j];
          if (reflect && right == w)
            for (i64 j = w; j < w + radius; ++j) row[reflected(j, w) - left] += row[j - left];
          store_row(out, b, channel + c, i, left, row, n);
        }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------
// Channels innermost: vectors of channels

// Calls body(width, count, c) for vectors `count * width` channels wide that cover [0, channels); remainders
// are covered by narrower ones, the last of which may overlap its neighbour and computes the same values again.
template <class A, int W, int Count, class Body>
INLINE void cover(i64 channels, Body body) {
  i64 c = 0;
  for (; c + Count * W <= channels; c += Count * W) body(Constant<W>{}, Constant<Count>{}, c);
  if constexpr (Count > 2)
    for (; c + 2 * W <= channels; c += 2 * W) body(Constant<W>{}, Constant<2>{}, c);
  for (; c + W <= channels; c += W) body(Constant<W>{}, Constant<1>{}, c);
  if (c == channels) return;
  if constexpr (W > 1) {
    if (channels > W) return body(Constant<W>{}, Constant<1>{}, channels - W);
    cover<A, narrower<A>(W), 1>(channels, body);
  }
}

template <class A>
struct Pixels {
  Reassembly options;
  i64 groups, channels;
  Axis rows, columns;
  i64 k, taps, radius, slots, planes, batch, blocks;

  Pixels(const Map& coarse, const Map& fine, i64 channels_of_map, Reassembly options)
      : options(options),
        groups(options.groups),
        channels(channels_of_map / options.groups),
        rows{coarse.height, fine.height},
        columns{coarse.width, fine.width},
        k(options.kernel_size),
        taps(k * k),
        radius(k / 2),
        slots(columns.slots()),
        planes(rows.slots() * slots),
        batch(coarse.batch),
        blocks(ceil_div(columns.coarse, kPixelBlock)) {}

  i64 items() const { return batch * rows.coarse; }

  // The rows of x in the window of coarse row i; null where they lie outside the map.
  template <class X>
  void find_lines(const X** lines, const Map& x, i64 b, i64 channel, i64 i) const {
    for (i64 d = 0; d < k; ++d) {
      const i64 row = i + (d - radius) * options.dilation;
      if (options.reflect) {
        lines[d] = at<X>(x, b, channel, reflected(row, x.height), 0);
      } else {
        lines[d] = row < 0 || row >= x.height ? nullptr : at<X>(x, b, channel, row, 0);
      }
    }
  }

  // Where the taps of coarse column j read x.
  template <class X>
  INLINE void find_window(const X** window, const X* const* lines, const Map& x, const X* zeros, i64 j) const {
    for (i64 e = 0; e < k; ++e) {
      i64 column = j + (e - radius) * options.dilation;
      bool inside = column >= 0 && column < x.width;
      if (!inside && options.reflect) {
        column = reflected(column, x.width);
        inside = true;
      }
      const i64 step = column * x.column_stride;
      for (i64 d = 0; d < k; ++d) window[d * k + e] = inside && lines[d] != nullptr ? lines[d] + step : zeros;
    }
  }

  // The first fine column of each of the coarse columns [begin, end], once a block: divisions are slow.
  void find_starts(i64* starts, i64 begin, i64 end) const {
    for (i64 j = begin; j <= end; ++j) starts[j - begin] = columns.first(j);
  }
};

// P fine pixels of one window, N vectors of W channels
template <class X, class A, int W, int P, int N>
INLINE void reassemble_pixels(const X* const* window, i64 taps, const A* const* masks, X* const* out, i64 c) {
  using V = Lanes<A, W>;
  V sums[N][P] = {};
#pragma GCC unroll 1
  for (i64 t = 0; t < taps; ++t) {
    const X* const from = window[t] + c;
    V values[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) values[v] = load<A, W>(from + v * W);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const A weight = masks[p][t];
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) sums[v][p] += values[v] * weight;
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) store<A, W>(out[p] + c + v * W, sums[v][p]);
}

template <class X, class A>
struct ForwardPixels : Pixels<A> {
  Map x, masks, out;

  ForwardPixels(const Map& x, const Map& masks, const Map& out, Reassembly options)
      : Pixels<A>(x, out, x.channels, options), x(x), masks(masks), out(out) {}

  i64 scratch() const {
    return scratch_bytes<A>(kPixelBlock * this->planes * this->taps) + scratch_bytes<A>(kPixelBlock * this->slots) +
           scratch_bytes<const X*>(this->taps) + scratch_bytes<const X*>(this->k) + scratch_bytes<X>(this->channels) +
           scratch_bytes<const A*>(this->planes) + scratch_bytes<X*>(this->planes);
  }

  template <int P>
  void pixels(const X* const* window, const A* const* mask, X* const* to) const {
    constexpr int N = kManyRegisters ? (P == 4 ? 4 : 8) : (P == 4 ? 2 : 4);
    cover<A, kLanes<A>, N>(this->channels, [&](auto width, auto count, i64 c) {
      reassemble_pixels<X, A, width.value, P, count.value>(window, this->taps, mask, to, c);
    });
  }

  void run(i64 item, Scratch scratch) const {
    const i64 b = item / this->rows.coarse, i = item % this->rows.coarse;
    const i64 taps = this->taps, planes = this->planes, width = kPixelBlock * this->slots;
    const i64 first_row = this->rows.first(i), fine_rows = this->rows.count(i);
    A* const packed = scratch.take<A>(kPixelBlock * planes * taps);
    A* const line = scratch.take<A>(width);
    const X** const window = scratch.take<const X*>(taps);
    const X** const lines = scratch.take<const X*>(this->k);
    X* const zeros = scratch.take<X>(this->channels);
    const A** const mask = scratch.take<const A*>(planes);
    X** const to = scratch.take<X*>(planes);
    i64 starts[kPixelBlock + 1];
    // a pixel's taps lie side by side already
    const bool in_place = channels_innermost(masks) && masks.dtype == plain_dtype<A>;
    memset(zeros, 0, this->channels * sizeof(X));
    if (fine_rows == 0) return;
    for (i64 left = 0; left < this->columns.coarse; left += kPixelBlock) {
      const i64 right = least(left + kPixelBlock, this->columns.coarse);
      this->find_starts(starts, left, right);
      const i64 first = starts[0], count = starts[right - left] - first;
      for (i64 g = 0; g < this->groups; ++g) {
        for (i64 t = 0; !in_place && t < taps; ++t)
          for (i64 p = 0; p < fine_rows; ++p) {
            load_row(line, masks, b, g * taps + t, first_row + p, first, count);
            for (i64 q = 0; q < count; ++q) packed[(p * width + q) * taps + t] = line[q];
          }
        this->find_lines(lines, x, b, g * this->channels, i);
        for (i64 j = left; j < right; ++j) {
          i64 fine = 0;
          for (i64 p = 0; p < fine_rows; ++p)
            for (i64 q = starts[j - left]; q < starts[j - left + 1]; ++q) {
              mask[fine] = in_place ? at<A>(masks, b, g * taps, first_row + p, q)
                                    : packed + (p * width + q - first) * taps;
              to[fine++] = at<X>(out, b, g * this->channels, first_row + p, q);
            }
          this->find_window(window, lines, x, zeros, j);
          i64 f = 0;
          for (; f + 4 <= fine; f += 4) pixels<4>(window, mask + f, to + f);
          for (; f + 2 <= fine; f += 2) pixels<2>(window, mask + f, to + f);
          for (; f < fine; ++f) pixels<1>(window, mask + f, to + f);
        }
      }
    }
  }
};

// Inner products over the channels of E window pixels with P fine pixels
template <class X, class A, int W, int E, int P>
INLINE void correlate_pixels(const X* const* window, const X* const* grad, i64 begin, i64 end, A (&totals)[E][P]) {
  using V = Lanes<A, W>;
  V sums[E][P] = {};
#pragma GCC unroll 1
  for (i64 c = begin; c + W <= end; c += W) {
    V incoming[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) incoming[p] = load<A, W>(grad[p] + c);
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e) {
      const V value = load<A, W>(window[e] + c);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sums[e][p] += value * incoming[p];
    }
  }
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) totals[e][p] += sum<A, W>(sums[e][p]);
}

template <class X, class A, int K>
struct KernelGradientPixels : Pixels<A> {
  Map x, grad, out;

  KernelGradientPixels(const Map& x, const Map& grad, const Map& out, Reassembly options)
      : Pixels<A>(x, grad, x.channels, options), x(x), grad(grad), out(out) {}

  i64 scratch() const {
    return scratch_bytes<A>(this->taps * this->planes * kPixelBlock) + scratch_bytes<const X*>(this->taps) +
           scratch_bytes<const X*>(this->k) +
           scratch_bytes<X>(this->channels) + scratch_bytes<const X*>(this->planes) +
           scratch_bytes<i64>(this->planes);
  }

  template <int P>
  void pixels(const X* const* window, const X* const* incoming, const i64* plane, A* sums) const {
    constexpr int E = K ? K : 1, L = kLanes<A>, small = 16 / int(sizeof(A));
    const i64 wide = this->channels / L * L, narrow = this->channels / small * small;
    for (i64 t = 0; t < this->taps; t += E) {
      A totals[E][P] = {};
      correlate_pixels<X, A, L, E, P>(window + t, incoming, 0, wide, totals);
      if (wide < narrow) correlate_pixels<X, A, small, E, P>(window + t, incoming, wide, narrow, totals);
      if (narrow < this->channels) correlate_pixels<X, A, 1, E, P>(window + t, incoming, narrow, this->channels, totals);
      for (int e = 0; e < E; ++e)
        for (int p = 0; p < P; ++p) sums[((t + e) * this->planes + plane[p]) * kPixelBlock] = totals[e][p];
    }
  }

  void run(i64 item, Scratch scratch) const {
    const i64 b = item / this->rows.coarse, i = item % this->rows.coarse;
    const i64 taps = this->taps, planes = this->planes, slots = this->slots;
    const i64 first_row = this->rows.first(i), fine_rows = this->rows.count(i);
    A* const sums = scratch.take<A>(taps * planes * kPixelBlock);
    const X** const window = scratch.take<const X*>(taps);
    const X** const lines = scratch.take<const X*>(this->k);
    X* const zeros = scratch.take<X>(this->channels);
    const X** const incoming = scratch.take<const X*>(planes);
    i64* const plane = scratch.take<i64>(planes);
    i64 starts[kPixelBlock + 1];
    memset(zeros, 0, this->channels * sizeof(X));
    if (fine_rows == 0) return;
    for (i64 left = 0; left < this->columns.coarse; left += kPixelBlock) {
      const i64 right = least(left + kPixelBlock, this->columns.coarse);
      this->find_starts(starts, left, right);
      for (i64 g = 0; g < this->groups; ++g) {
        this->find_lines(lines, x, b, g * this->channels, i);
        for (i64 j = left; j < right; ++j) {
          const i64 start = starts[j - left], pixels_wide = starts[j - left + 1] - start;
          i64 fine = 0;
          for (i64 p = 0; p < fine_rows; ++p)
            for (i64 s = 0; s < pixels_wide; ++s) {
              plane[fine] = p * slots + s;
              incoming[fine++] = at<X>(grad, b, g * this->channels, first_row + p, start + s);
            }
          this->find_window(window, lines, x, zeros, j);
          constexpr int P = kManyRegisters ? 4 : 2;
          i64 f = 0;
          for (; f + P <= fine; f += P) pixels<P>(window, incoming + f, plane + f, sums + (j - left));
          for (; f < fine; ++f) pixels<1>(window, incoming + f, plane + f, sums + (j - left));
        }
        for (i64 t = 0; t < taps; ++t)
          for (i64 p = 0; p < fine_rows; ++p)
            merge_row(sums + (t * planes + p * slots) * kPixelBlock, kPixelBlock, out, this->columns, b,
                      g * taps + t, first_row + p, left, right);
      }
    }
  }
};

// N vectors of W channels of one coarse pixel: the sum of `count` weighted fine pixels
template <class X, class A, int W, int N>
INLINE void gather_pixels(const X* const* from, const A* weights, i64 count, X* out, i64 c) {
  using V = Lanes<A, W>;
  V sums[N] = {};
#pragma GCC unroll 1
  for (i64 t = 0; t < count; ++t) {
    const X* const values = from[t] + c;
    const A weight = weights[t];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sums[v] += load<A, W>(values + v * W) * weight;
  }
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) store<A, W>(out + c + v * W, sums[v]);
}

template <class X, class A>
struct GradientPixels : Pixels<A> {
  Map masks, grad, out;
  i64 terms, reach;

  GradientPixels(const Map& masks, const Map& grad, const Map& out, Reassembly options)
      : Pixels<A>(out, grad, out.channels, options), masks(masks), grad(grad), out(out) {
    terms = this->taps * this->planes * most_sources(out.height) * most_sources(out.width);
    reach = kPixelBlock + 8 * this->radius + 2;  // coarse columns that may read from a block
  }

  // How many places of the padded axis may stand for one of the map: itself and, reflected, its images.
  i64 most_sources(i64 length) const {
    if (!this->options.reflect) return 1;
    return length == 1 ? 1 + 2 * this->radius : 1 + 2 * ceil_div(this->radius, length - 1);
  }

  i64 scratch() const {
    return scratch_bytes<A>(kPixelBlock * terms) + scratch_bytes<const X*>(kPixelBlock * terms) +
           scratch_bytes<i64>(kPixelBlock) + scratch_bytes<A>(reach * this->slots) + scratch_bytes<i64>(reach + 1);
  }

  void run(i64 item, Scratch scratch) const {
    const i64 h = this->rows.coarse, w = this->columns.coarse, radius = this->radius, k = this->k;
    const i64 b = item / h, i = item % h;
    const bool reflect = this->options.reflect != 0;
    A* const weights = scratch.take<A>(kPixelBlock * terms);
    const X** const from = scratch.take<const X*>(kPixelBlock * terms);
    i64* const counts = scratch.take<i64>(kPixelBlock);
    A* const line = scratch.take<A>(reach * this->slots);
    i64* const starts = scratch.take<i64>(reach + 1);
    for (i64 left = 0; left < w; left += kPixelBlock) {
      const i64 right = least(left + kPixelBlock, w);
      const i64 begin = most(left - 3 * radius - 1, 0), end = least(right + 3 * radius + 1, w);
      this->find_starts(starts, begin, end);
      for (i64 g = 0; g < this->groups; ++g) {
        fill(counts, kPixelBlock, i64(0));
        for (i64 q = reflect ? -radius : i; q < (reflect ? h + radius : i + 1); ++q) {
          if (reflect && reflected(q, h) != i) continue;
          for (i64 d = 0; d < k; ++d) {
            const i64 source = q - d + radius;
            if (source < 0 || source >= h) continue;
            for (i64 row = this->rows.first(source); row < this->rows.first(source + 1); ++row)
              for (i64 e = 0; e < k; ++e) {
                // columns whose tap may fall in the block
                const i64 near = reflect ? begin : least(most(left - e + radius, 0), w);
                const i64 far = reflect ? end : most(least(right - e + radius, w), near);
                const i64 first = starts[near - begin];
                load_row(line, masks, b, g * this->taps + d * k + e, row, first, starts[far - begin] - first);
                const X* const incoming = at<X>(grad, b, g * this->channels, row, 0);
                for (i64 column = near; column < far; ++column) {
                  i64 j = column + e - radius;
                  if (j < 0 || j >= w) j = reflected(j, w);
                  if (j < left || j >= right) continue;
                  for (i64 q = starts[column - begin]; q < starts[column - begin + 1]; ++q) {
                    const i64 term = (j - left) * terms + counts[j - left]++;
                    weights[term] = line[q - first];
                    from[term] = incoming + q * grad.column_stride;
                  }
                }
              }
          }
        }
        constexpr int N = kManyRegisters ? 8 : 4;
        cover<A, kLanes<A>, N>(this->channels, [&](auto width, auto vectors, i64 c) {
          for (i64 j = left; j < right; ++j)
            gather_pixels<X, A, width.value, vectors.value>(from + (j - left) * terms, weights + (j - left) * terms,
                                                            counts[j - left],
                                                            at<X>(out, b, g * this->channels, i, j), c);
        });
      }
    }
  }
};

}  // namespace
