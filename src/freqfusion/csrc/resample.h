// Grouped bilinear sampling at displaced positions (see ops/resample/op.py).
#pragma once

#include "simd.h"

namespace {

using freqfusion::Sampling;

constexpr i64 kSampleBlock = 2048;  // output pixels whose positions are computed together

// Positions of a block of output pixels, some columns of some rows: the upper left neighbour, the way to the others (none
// beyond the border), and how far between them. NaN positions read a valid place with NaN weights.
template <class A>
struct Positions {
  i64 *place, *right, *down;
  A *weight_x, *weight_y, *slope_x, *slope_y;

  static i64 bytes() { return 3 * scratch_bytes<i64>(kSampleBlock) + 4 * scratch_bytes<A>(kSampleBlock); }

  explicit Positions(Scratch& scratch)
      : place(scratch.take<i64>(kSampleBlock)),
        right(scratch.take<i64>(kSampleBlock)),
        down(scratch.take<i64>(kSampleBlock)),
        weight_x(scratch.take<A>(kSampleBlock)),
        weight_y(scratch.take<A>(kSampleBlock)),
        slope_x(scratch.take<A>(kSampleBlock)),
        slope_y(scratch.take<A>(kSampleBlock)) {}
};

template <class X, class A>
struct Sampler {
  Map x, offsets;
  Sampling options;
  i64 channels, columns, rows, column_blocks, row_blocks;

  Sampler(const Map& x, const Map& offsets, Sampling options, i64 threads)
      : x(x), offsets(offsets), options(options), channels(x.channels / options.groups) {
    columns = least(offsets.width, kSampleBlock);
    rows = least(kSampleBlock / columns, ceil_div(x.batch * options.groups * offsets.height, 4 * threads));
    column_blocks = ceil_div(offsets.width, columns);
    row_blocks = ceil_div(offsets.height, rows);
  }

  // Items of the operations that divide the output pixels.
  i64 items() const { return x.batch * options.groups * row_blocks * column_blocks; }

  struct Block {
    i64 b, g, top, left, height, width;
  };
  Block block(i64 item) const {
    const i64 left = item % column_blocks * columns, top = item / column_blocks % row_blocks * rows;
    const i64 rest = item / column_blocks / row_blocks;
    return {rest / options.groups,
            rest % options.groups,
            top,
            left,
            least(rows, offsets.height - top),
            least(columns, offsets.width - left)};
  }

  // One axis, in the order of operations of the released code: an equal one rounds differently. Returns the
  // lower neighbour; `slope` is the derivative of the position in the offset, zero where it was clamped and NaN
  // where the position is.
  static INLINE i64 locate(A centre, A offset, A unit, i64 size, A* weight, A* slope) {
    const A relative = 2 * (centre + offset) / unit - 1;
    A position = (relative + 1) * (A(size) / 2) - A(0.5);
    *slope = position > 0 && position < A(size - 1) ? A(size) / unit : A(0);
    if (position != position) *slope = position;
    if (position < 0) position = 0;
    if (position > A(size - 1)) position = A(size - 1);
    const i64 lower = position == position ? i64(position) : 0;
    *weight = position - A(lower);
    return lower;
  }

  void locate_block(const Positions<A>& to, const Block& block) const {
    const A unit_x = A(options.unit_width), unit_y = A(options.unit_height);
    for (i64 r = 0; r < block.height; ++r) {
      const i64 row = block.top + r, start = r * block.width;
      A *const slope_x = to.slope_x + start, *const slope_y = to.slope_y + start;
      load_row(slope_x, offsets, block.b, block.g, row, block.left, block.width);
      load_row(slope_y, offsets, block.b, options.groups + block.g, row, block.left, block.width);
      const A centre_y = (A(row) + A(0.5)) * unit_y / A(offsets.height);
      for (i64 j = 0; j < block.width; ++j) {
        const A centre_x = (A(block.left + j) + A(0.5)) * unit_x / A(offsets.width);
        const i64 column = locate(centre_x, slope_x[j], unit_x, x.width, to.weight_x + start + j, slope_x + j);
        const i64 line = locate(centre_y, slope_y[j], unit_y, x.height, to.weight_y + start + j, slope_y + j);
        to.place[start + j] = line * x.row_stride + column * x.column_stride;
        to.right[start + j] = column + 1 < x.width ? x.column_stride : 0;
        to.down[start + j] = line + 1 < x.height ? x.row_stride : 0;
      }
    }
  }
};

// Item: one block of output pixels, all channels of a group.
template <class X, class A>
struct Resample : Sampler<X, A> {
  Map out;

  Resample(const Map& x, const Map& offsets, const Map& out, Sampling options, i64 threads)
      : Sampler<X, A>(x, offsets, options, threads), out(out) {}

  i64 scratch() const { return Positions<A>::bytes() + scratch_bytes<A>(this->columns); }

  void run(i64 item, Scratch scratch) const {
    const auto block = this->block(item);
    const auto [b, g, top, left, height, width] = block;
    const Positions<A> positions(scratch);
    A* const line = scratch.take<A>(this->columns);
    this->locate_block(positions, block);
    if (this->x.channel_stride == 1 && out.channel_stride == 1 && out.channels > 1) {
      for (i64 r = 0; r < height; ++r)
        for (i64 j = 0; j < width; ++j) pixel(positions, b, g, top + r, left + j, r * width + j);
      return;
    }
    for (i64 c = g * this->channels; c < (g + 1) * this->channels; ++c) {
      const X* const plane = at<X>(this->x, b, c, 0, 0);
      for (i64 r = 0; r < height; ++r) {
        const i64 start = r * width;
        const i64 *const place = positions.place + start, *const right = positions.right + start;
        const i64* const down = positions.down + start;
        const A *const weight_x = positions.weight_x + start, *const weight_y = positions.weight_y + start;
        for (i64 j = 0; j < width; ++j) {
          const X *const upper = plane + place[j], *const lower = upper + down[j];
          const A wx = weight_x[j], wy = weight_y[j];
          const A above = A(widen(upper[0])) * (1 - wx) + A(widen(upper[right[j]])) * wx;
          const A below = A(widen(lower[0])) * (1 - wx) + A(widen(lower[right[j]])) * wx;
          line[j] = above * (1 - wy) + below * wy;
        }
        store_row(out, b, c, top + r, left, line, width);
      }
    }
  }

  void pixel(const Positions<A>& positions, i64 b, i64 g, i64 row, i64 column, i64 place) const {
    const X* const upper = at<X>(this->x, b, g * this->channels, 0, 0) + positions.place[place];
    const X* const lower = upper + positions.down[place];
    const i64 right = positions.right[place];
    X* const to = at<X>(out, b, g * this->channels, row, column);
    const A wx = positions.weight_x[place], wy = positions.weight_y[place];
    partition<A, kLanes<A>>(0, this->channels, [&](auto lanes, i64 c) {
      constexpr int N = lanes.value;
      const auto above = load<A, N>(upper + c) * (1 - wx) + load<A, N>(upper + right + c) * wx;
      const auto below = load<A, N>(lower + c) * (1 - wx) + load<A, N>(lower + right + c) * wx;
      store<A, N>(to + c, above * (1 - wy) + below * wy);
    });
  }
};

// Adds every output pixel's gradient to the four pixels that it read. Item: a few channels of one group,
// whose sums are this item's alone, taken in the order of the output pixels: no race, one result. `out` is of
// type A.
template <class X, class A>
struct ResampleGradient : Sampler<A, A> {
  Map grad, out;
  i64 channel_block, channel_blocks;

  ResampleGradient(const Map& offsets, const Map& grad, const Map& out, Sampling options, i64 threads)
      : Sampler<A, A>(out, offsets, options, 1), grad(grad), out(out) {
    // at least a cache line, so that two threads never write to one; more where there are items enough
    channel_block = least(most(16, ceil_div(out.batch * out.channels, 4 * threads)), this->channels);
    channel_blocks = ceil_div(this->channels, channel_block);
  }

  i64 items() const { return out.batch * this->options.groups * channel_blocks; }
  i64 scratch() const { return Positions<A>::bytes() + scratch_bytes<A>(this->columns); }

  void run(i64 item, Scratch scratch) const {
    // batch first: maps of neighbouring items share no cache lines, channels of one map may
    const i64 b = item % out.batch, first = item / out.batch % channel_blocks * channel_block;
    const i64 g = item / out.batch / channel_blocks, image = b * this->options.groups + g;
    const i64 channels = least(channel_block, this->channels - first), begin = g * this->channels + first;
    const Positions<A> positions(scratch);
    A* const line = scratch.take<A>(this->columns);
    const bool innermost = out.channel_stride == 1 && grad.channel_stride == 1 && out.channels > 1;
    for (i64 c = begin; !innermost && c < begin + channels; ++c)
      for (i64 y = 0; y < out.height; ++y) fill(at<A>(out, b, c, y, 0), out.width, A(0));
    for (i64 y = 0; innermost && y < out.height; ++y)
      for (i64 x = 0; x < out.width; ++x) fill(at<A>(out, b, begin, y, x), channels, A(0));
    const i64 blocks = this->row_blocks * this->column_blocks;
    for (i64 i = 0; i < blocks; ++i) {
      const auto block = this->block(image * blocks + i);
      this->locate_block(positions, block);
      if (innermost) {
        for (i64 r = 0; r < block.height; ++r)
          for (i64 j = 0; j < block.width; ++j)
            pixel(positions, b, begin, channels, block.top + r, block.left + j, r * block.width + j);
        continue;
      }
      for (i64 c = begin; c < begin + channels; ++c) {
        A* const plane = at<A>(out, b, c, 0, 0);
        for (i64 r = 0; r < block.height; ++r) {
          load_row(line, grad, b, c, block.top + r, block.left, block.width);
          for (i64 j = 0; j < block.width; ++j) add<1>(plane, positions, r * block.width + j, line[j]);
        }
      }
    }
  }

  void pixel(const Positions<A>& positions, i64 b, i64 begin, i64 channels, i64 row, i64 column, i64 place) const {
    const X* const from = at<X>(grad, b, begin, row, column);
    A* const origin = at<A>(out, b, begin, 0, 0);
    partition<A, kLanes<A>>(0, channels, [&](auto lanes, i64 c) {
      add<lanes.value>(origin + c, positions, place, load<A, lanes.value>(from + c));
    });
  }

  // N channels of one output pixel; the four places may coincide at the border, so they are updated in turn.
  template <int N>
  static INLINE void add(A* origin, const Positions<A>& positions, i64 place, Lanes<A, N> incoming) {
    A *const upper = origin + positions.place[place], *const lower = upper + positions.down[place];
    const i64 right = positions.right[place];
    const A wx = positions.weight_x[place], wy = positions.weight_y[place];
    const Lanes<A, N> above = incoming * (1 - wy), below = incoming * wy;
    store<A, N>(upper, load<A, N>(upper) + above * (1 - wx));
    store<A, N>(upper + right, load<A, N>(upper + right) + above * wx);
    store<A, N>(lower, load<A, N>(lower) + below * (1 - wx));
    store<A, N>(lower + right, load<A, N>(lower + right) + below * wx);
  }
};

// Item: one block of output pixels, summed over the channels of a group.
template <class X, class A>
struct ResampleOffsetGradient : Sampler<X, A> {
  Map grad, out;

  ResampleOffsetGradient(const Map& x, const Map& offsets, const Map& grad, const Map& out, Sampling options,
                         i64 threads)
      : Sampler<X, A>(x, offsets, options, threads), grad(grad), out(out) {}

  i64 scratch() const {
    return Positions<A>::bytes() + scratch_bytes<A>(this->columns) + 2 * scratch_bytes<A>(kSampleBlock);
  }

  void run(i64 item, Scratch scratch) const {
    const auto block = this->block(item);
    const auto [b, g, top, left, height, width] = block;
    const Positions<A> positions(scratch);
    A* const line = scratch.take<A>(this->columns);
    A* const sums_x = scratch.take<A>(kSampleBlock);
    A* const sums_y = scratch.take<A>(kSampleBlock);
    this->locate_block(positions, block);
    fill(sums_x, height * width, A(0));
    fill(sums_y, height * width, A(0));
    if (this->x.channel_stride == 1 && grad.channel_stride == 1 && grad.channels > 1) {
      for (i64 r = 0; r < height; ++r)
        for (i64 j = 0; j < width; ++j) {
          const i64 place = r * width + j;
          pixel(positions, b, g, top + r, left + j, place, sums_x + place, sums_y + place);
        }
    } else {
      for (i64 c = g * this->channels; c < (g + 1) * this->channels; ++c)
        for (i64 r = 0; r < height; ++r) {
          load_row(line, grad, b, c, top + r, left, width);
          row(positions, at<X>(this->x, b, c, 0, 0), line, r * width, width, sums_x + r * width, sums_y + r * width);
        }
    }
    for (i64 i = 0; i < height * width; ++i) {
      sums_x[i] *= positions.slope_x[i];
      sums_y[i] *= positions.slope_y[i];
    }
    for (i64 r = 0; r < height; ++r) {
      store_row(out, b, g, top + r, left, sums_x + r * width, width);
      store_row(out, b, this->options.groups + g, top + r, left, sums_y + r * width, width);
    }
  }

  // One channel of one row of the block, whose positions begin at `start`.
  void row(const Positions<A>& positions, const X* plane, const A* incoming, i64 start, i64 n, A* __restrict sums_x,
           A* __restrict sums_y) const {
    const i64 *const place = positions.place + start, *const right = positions.right + start;
    const i64* const down = positions.down + start;
    const A *const weight_x = positions.weight_x + start, *const weight_y = positions.weight_y + start;
    for (i64 j = 0; j < n; ++j) {
      const X *const upper = plane + place[j], *const lower = upper + down[j];
      const A a = widen(upper[0]), o = widen(upper[right[j]]), l = widen(lower[0]), m = widen(lower[right[j]]);
      sums_x[j] += incoming[j] * ((o - a) * (1 - weight_y[j]) + (m - l) * weight_y[j]);
      sums_y[j] += incoming[j] * ((l - a) * (1 - weight_x[j]) + (m - o) * weight_x[j]);
    }
  }

  void pixel(const Positions<A>& positions, i64 b, i64 g, i64 row, i64 column, i64 place, A* sum_x, A* sum_y) const {
    const X* const upper = at<X>(this->x, b, g * this->channels, 0, 0) + positions.place[place];
    const X* const lower = upper + positions.down[place];
    const X* const incoming = at<X>(grad, b, g * this->channels, row, column);
    const i64 right = positions.right[place];
    const A wx = positions.weight_x[place], wy = positions.weight_y[place];
    constexpr int L = kLanes<A>;
    auto terms = [&](auto lanes, i64 c, auto* along_x, auto* along_y) {
      constexpr int N = lanes.value;
      using V = Lanes<A, N>;
      const V a = load<A, N>(upper + c), o = load<A, N>(upper + right + c);
      const V l = load<A, N>(lower + c), m = load<A, N>(lower + right + c), in = load<A, N>(incoming + c);
      *along_x += in * ((o - a) * (1 - wy) + (m - l) * wy);
      *along_y += in * ((l - a) * (1 - wx) + (m - o) * wx);
    };
    Lanes<A, L> along_x = {}, along_y = {};
    i64 c = 0;
    for (; c + L <= this->channels; c += L) terms(Constant<L>(), c, &along_x, &along_y);
    *sum_x += sum<A, L>(along_x);
    *sum_y += sum<A, L>(along_y);
    partition<A, L>(c, this->channels, [&](auto lanes, i64 c) {
      Lanes<A, lanes.value> rest_x = {}, rest_y = {};
      terms(lanes, c, &rest_x, &rest_y);
      *sum_x += sum<A, lanes.value>(rest_x);
      *sum_y += sum<A, lanes.value>(rest_y);
    });
  }
};

}  // namespace
