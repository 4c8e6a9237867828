// The kernels for volumes (B, C, D, H, W): reassembly with its two adjoints, local similarity, trilinear sampling.
//
// As in carafe.h a fine map is held as planes of coarse size, plane p with the p-th fine voxel of every coarse
// voxel. The rows of a tile lie one after the other with room for the window's border between them, so that a tap is
// one shift of the whole tile, and short rows, the rule in volumes, fill vectors. What vectors compute between the
// rows is dropped.
#pragma once

#include "carafe.h"
#include "resample.h"
#include "similarity.h"

namespace {

using freqfusion::Volume;
using freqfusion::VolumeSampling;

// One slice of a volume, as a map.
INLINE Map slice(const Volume& volume, i64 z) {
  const i64 size = volume.dtype == freqfusion::kFloat64 ? 8 : volume.dtype == freqfusion::kFloat32 ? 4 : 2;
  return {static_cast<char*>(volume.data) + z * volume.slice_stride * size,
          volume.dtype,
          volume.batch,
          volume.channels,
          volume.height,
          volume.width,
          volume.batch_stride,
          volume.channel_stride,
          volume.row_stride,
          volume.column_stride};
}

// Tiles of coarse rows of one slice and one group.
template <class A>
struct VolumeTiling {
  static constexpr int L = kLanes<A>;
  Reassembly options;
  i64 batch, groups, channels;  // channels of one group
  Axis slices, rows, columns;
  i64 k, taps, radius, reach, planes;
  i64 pitch, tile, tiles, area;

  // `margin`: room beside a row, on both sides together
  VolumeTiling(const Volume& coarse, const Volume& fine, i64 channels_of_map, Reassembly options, i64 margin,
               i64 threads)
      : options(options),
        batch(coarse.batch),
        groups(options.groups),
        channels(channels_of_map / options.groups),
        slices{coarse.depth, fine.depth},
        rows{coarse.height, fine.height},
        columns{coarse.width, fine.width},
        k(options.kernel_size),
        taps(k * k * k),
        radius(k / 2),
        reach(radius * options.dilation),
        planes(slices.slots() * rows.slots() * columns.slots()),
        pitch(columns.coarse + margin) {
    divide(coarse.depth, coarse.height, threads);
  }

  void divide(i64 depth, i64 height, i64 threads) {
    tile = most(least(kMaskBytes / (taps * planes * pitch * i64(sizeof(A))), height), 1);
    tile = least(tile, ceil_div(batch * groups * depth * height, 4 * threads));
    tiles = ceil_div(height, tile);
    area = round_up(tile * pitch, L);
  }

  struct Place {
    i64 b, g, z, top, bottom;
  };
  Place place(i64 item, i64 depth, i64 height) const {
    const i64 top = item % tiles * tile, rest = item / tiles, z = rest % depth, image = rest / depth;
    return {image / groups, image % groups, z, top, least(top + tile, height)};
  }

  i64 plane(i64 p, i64 q) const { return (p * rows.slots() + q) * columns.slots(); }

  // Calls body(plane, slice of the map, fine row, place in the tile) for the fine rows of a tile.
  template <class Body>
  void fine_rows(const Volume& fine, i64 z, i64 top, i64 bottom, Body body) const {
    for (i64 p = 0; p < slices.count(z); ++p) {
      const Map map = slice(fine, slices.first(z) + p);
      for (i64 i = top; i < bottom; ++i)
        for (i64 q = 0; q < rows.count(i); ++q) body(plane(p, q), map, rows.first(i) + q, (i - top) * pitch);
    }
  }
};

// The windows of a tile in x: rows and columns around it, of the k slices that its taps read.
template <class A>
struct Windows {
  i64 slices, rows, pitch, channel;  // sizes; `channel`: distance of two channels

  explicit Windows(const VolumeTiling<A>& tiling)
      : slices(tiling.k),
        rows(tiling.tile + 2 * tiling.reach),
        pitch(tiling.pitch),
        channel(slices * rows * pitch) {}

  i64 bytes(i64 channels) const { return scratch_bytes<A>(channels * channel + kLanes<A>); }

  void find_taps(i64* offsets, i64 dilation) const {
    for (i64 t = 0; t < slices * slices * slices; ++t)
      offsets[t] = (t / (slices * slices) * rows + t / slices % slices * dilation) * pitch + t % slices * dilation;
  }

  void load(A* to, const VolumeTiling<A>& tiling, const Volume& x, i64 b, i64 c, i64 z, i64 top, i64 bottom) const {
    const bool reflect = tiling.options.reflect != 0;
    for (i64 d = 0; d < slices; ++d) {
      const i64 from = z + (d - tiling.radius) * tiling.options.dilation;
      A* const target = to + d * rows * pitch;
      if (!reflect && (from < 0 || from >= x.depth)) {
        fill(target, rows * pitch, A(0));
        continue;
      }
      const Map map = slice(x, reflect ? reflected(from, x.depth) : from);
      for (i64 r = 0; r < bottom - top + 2 * tiling.reach; ++r)
        load_padded(target + r * pitch, map, reflect, b, c, top + r - tiling.reach, -tiling.reach, pitch);
    }
  }
};

// N channels and P planes: out[c][p][j] = sum over taps of x[c][j + offset] * masks[t][p][j]
template <class A, int P, int N>
void reassemble_volume(const A* x, i64 x_channel, const i64* offsets, i64 taps, const A* masks, i64 mask_tap, i64 area,
                       A* out, i64 out_channel, i64 n) {
  constexpr int L = kLanes<A>;
  using V = Lanes<A, L>;
  for (i64 j = 0; j < n; j += L) {
    V sums[N][P] = {};
    const A* mask = masks + j;
    for (i64 t = 0; t < taps; ++t, mask += mask_tap) {
      const A* const window = x + offsets[t] + j;
      V weights[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) weights[p] = load<A, L>(mask + p * area);
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) {
        const V value = load<A, L>(window + c * x_channel);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) sums[c][p] += value * weights[p];
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) store<A, L>(out + c * out_channel + p * area + j, sums[c][p]);
  }
}

template <class A>
struct VolumeForward : VolumeTiling<A> {
  Volume x, masks, out;
  Windows<A> windows;

  VolumeForward(const Volume& x, const Volume& masks, const Volume& out, Reassembly options, i64 threads)
      : VolumeTiling<A>(x, out, x.channels, options, options.kernel_size / 2 * options.dilation * 2, threads),
        x(x),
        masks(masks),
        out(out),
        windows(*this) {}

  i64 items() const { return this->batch * this->groups * this->slices.coarse * this->tiles; }
  i64 scratch() const {
    return scratch_bytes<i64>(this->taps) + scratch_bytes<A>(this->taps * this->planes * this->area) +
           windows.bytes(kChannelBlock) + scratch_bytes<A>(kChannelBlock * this->planes * this->area);
  }

  template <int P>
  void block(const A* x, const i64* offsets, const A* mask, A* to, i64 channels, i64 n) const {
    constexpr int N = P == 4 && !kManyRegisters ? 2 : 4;
    const i64 mask_tap = this->planes * this->area;
    i64 c = 0;
    for (; c + N <= channels; c += N)
      reassemble_volume<A, P, N>(x + c * windows.channel, windows.channel, offsets, this->taps, mask, mask_tap,
                                 this->area, to + c * mask_tap, mask_tap, n);
    for (; c < channels; ++c)
      reassemble_volume<A, P, 1>(x + c * windows.channel, 0, offsets, this->taps, mask, mask_tap, this->area,
                                 to + c * mask_tap, 0, n);
  }

  void run(i64 item, Scratch scratch) const {
    const auto [b, g, z, top, bottom] = this->place(item, this->slices.coarse, this->rows.coarse);
    const i64 taps = this->taps, planes = this->planes, area = this->area, w = this->columns.coarse;
    const i64 used = this->plane(this->slices.count(z), 0), n = (bottom - top - 1) * this->pitch + w;
    if (used == 0) return;
    i64* const offsets = scratch.take<i64>(taps);
    A* const mask_scratch = scratch.take<A>(taps * planes * area);
    A* const x_scratch = scratch.take<A>(kChannelBlock * windows.channel + kLanes<A>);
    A* const out_scratch = scratch.take<A>(kChannelBlock * planes * area);
    windows.find_taps(offsets, this->options.dilation);
    fill(mask_scratch, taps * planes * area, A(0));
    this->fine_rows(masks, z, top, bottom, [&, b = b, g = g](i64 plane, const Map& map, i64 row, i64 place) {
      for (i64 t = 0; t < taps; ++t)
        split_row(mask_scratch + (t * planes + plane) * area + place, area, map, this->columns, b, g * taps + t, row, 0,
                  w);
    });
    for (i64 c0 = 0; c0 < this->channels; c0 += kChannelBlock) {
      const i64 channels = least(kChannelBlock, this->channels - c0), channel = g * this->channels + c0;
      for (i64 c = 0; c < channels; ++c)
        windows.load(x_scratch + c * windows.channel, *this, x, b, channel + c, z, top, bottom);
      i64 p = 0;
      for (; p + 4 <= used; p += 4)
        block<4>(x_scratch, offsets, mask_scratch + p * area, out_scratch + p * area, channels, n);
      for (; p + 2 <= used; p += 2)
        block<2>(x_scratch, offsets, mask_scratch + p * area, out_scratch + p * area, channels, n);
      for (; p < used; ++p)
        block<1>(x_scratch, offsets, mask_scratch + p * area, out_scratch + p * area, channels, n);
      this->fine_rows(out, z, top, bottom, [&, b = b](i64 plane, const Map& map, i64 row, i64 place) {
        for (i64 c = 0; c < channels; ++c)
          merge_row(out_scratch + (c * planes + plane) * area + place, area, map, this->columns, b, channel + c, row, 0,
                    w);
      });
    }
  }
};

// E taps, P planes: sums[e][p][j] += sum over channels of x[c][j + offset] * grad[c][p][j]
template <class A, int E, int P>
void correlate_volume(const A* x, i64 x_channel, const i64* offsets, const A* grad, i64 grad_channel, i64 channels,
                      A* sums, i64 sums_tap, i64 area, i64 n) {
  constexpr int L = kLanes<A>;
  using V = Lanes<A, L>;
  for (i64 j = 0; j < n; j += L) {
    V totals[E][P];
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) totals[e][p] = load<A, L>(sums + e * sums_tap + p * area + j);
    for (i64 c = 0; c < channels; ++c) {
      V incoming[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) incoming[p] = load<A, L>(grad + c * grad_channel + p * area + j);
#pragma GCC unroll 8
      for (int e = 0; e < E; ++e) {
        const V value = load<A, L>(x + c * x_channel + offsets[e] + j);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) totals[e][p] += value * incoming[p];
      }
    }
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) store<A, L>(sums + e * sums_tap + p * area + j, totals[e][p]);
  }
}

template <class A, int K>
struct VolumeKernelGradient : VolumeTiling<A> {
  static constexpr i64 kChannels = 8;
  Volume x, grad, out;
  Windows<A> windows;

  VolumeKernelGradient(const Volume& x, const Volume& grad, const Volume& out, Reassembly options, i64 threads)
      : VolumeTiling<A>(x, grad, x.channels, options, options.kernel_size / 2 * options.dilation * 2, threads),
        x(x),
        grad(grad),
        out(out),
        windows(*this) {}

  i64 items() const { return this->batch * this->groups * this->slices.coarse * this->tiles; }
  i64 scratch() const {
    return scratch_bytes<i64>(this->taps) + scratch_bytes<A>(this->taps * this->planes * this->area) +
           windows.bytes(kChannels) + scratch_bytes<A>(kChannels * this->planes * this->area);
  }

  template <int P>
  void taps_of(const A* x, const i64* offsets, const A* incoming, A* sums, i64 channels, i64 n) const {
    constexpr int E = K ? K : 1;
    const i64 step = this->planes * this->area;
    for (i64 t = 0; t < this->taps; t += E)
      correlate_volume<A, E, P>(x, windows.channel, offsets + t, incoming, step, channels, sums + t * step, step,
                                this->area, n);
  }

  void run(i64 item, Scratch scratch) const {
    const auto [b, g, z, top, bottom] = this->place(item, this->slices.coarse, this->rows.coarse);
    const i64 taps = this->taps, planes = this->planes, area = this->area, w = this->columns.coarse;
    const i64 used = this->plane(this->slices.count(z), 0), n = (bottom - top - 1) * this->pitch + w;
    if (used == 0) return;
    i64* const offsets = scratch.take<i64>(taps);
    A* const sums = scratch.take<A>(taps * planes * area);
    A* const x_scratch = scratch.take<A>(kChannels * windows.channel + kLanes<A>);
    A* const grad_scratch = scratch.take<A>(kChannels * planes * area);
    windows.find_taps(offsets, this->options.dilation);
    fill(sums, taps * planes * area, A(0));
    fill(grad_scratch, kChannels * planes * area, A(0));
    for (i64 c0 = 0; c0 < this->channels; c0 += kChannels) {
      const i64 channels = least(kChannels, this->channels - c0), channel = g * this->channels + c0;
      for (i64 c = 0; c < channels; ++c)
        windows.load(x_scratch + c * windows.channel, *this, x, b, channel + c, z, top, bottom);
      this->fine_rows(grad, z, top, bottom, [&, b = b](i64 plane, const Map& map, i64 row, i64 place) {
        for (i64 c = 0; c < channels; ++c)
          split_row(grad_scratch + (c * planes + plane) * area + place, area, map, this->columns, b, channel + c, row,
                    0, w);
      });
      constexpr int P = kManyRegisters ? 4 : 2;
      i64 p = 0;
      for (; p + P <= used; p += P)
        taps_of<P>(x_scratch, offsets, grad_scratch + p * area, sums + p * area, channels, n);
      for (; p < used; ++p) taps_of<1>(x_scratch, offsets, grad_scratch + p * area, sums + p * area, channels, n);
    }
    this->fine_rows(out, z, top, bottom, [&, b = b, g = g](i64 plane, const Map& map, i64 row, i64 place) {
      for (i64 t = 0; t < taps; ++t)
        merge_row(sums + (t * planes + plane) * area + place, area, map, this->columns, b, g * taps + t, row, 0, w);
    });
  }
};

// N channels: out[c][j] = sum over terms of masks[place + j] * grad[c][other place + j]
template <class A, int N>
void gather_volume(const A* masks, const i64* mask_places, const A* grad, const i64* grad_places, i64 terms,
                   i64 grad_channel, A* out, i64 out_channel, i64 n) {
  constexpr int L = kLanes<A>;
  using V = Lanes<A, L>;
  for (i64 j = 0; j < n; j += L) {
    V sums[N] = {};
    for (i64 t = 0; t < terms; ++t) {
      const V weight = load<A, L>(masks + mask_places[t] + j);
      const A* const values = grad + grad_places[t] + j;
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) sums[c] += weight * load<A, L>(values + c * grad_channel);
    }
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) store<A, L>(out + c * out_channel + j, sums[c]);
  }
}

// The derivative in x; with mirrored borders that of the padded x, which `out` is then.
template <class A>
struct VolumeGradient : VolumeTiling<A> {
  static constexpr i64 kChannels = kManyRegisters ? 8 : 4;
  Volume masks, grad, out;
  i64 border, source_rows, width;

  VolumeGradient(const Volume& masks, const Volume& grad, const Volume& out, Reassembly options, i64 threads)
      : VolumeTiling<A>(without_border(out, options), grad, out.channels, options,
                        options.kernel_size / 2 * (options.reflect ? 4 : 2), threads),
        masks(masks),
        grad(grad),
        out(out),
        border(options.reflect ? this->radius : 0) {
    this->divide(out.depth, out.height, threads);
    source_rows = this->tile + 2 * this->radius;
    width = source_rows * this->pitch;
  }

  static Volume without_border(Volume padded, Reassembly options) {
    const i64 sides = options.reflect ? options.kernel_size / 2 * 2 : 0;
    padded.depth -= sides;
    padded.height -= sides;
    padded.width -= sides;
    return padded;
  }

  i64 items() const { return this->batch * this->groups * out.depth * this->tiles; }
  i64 scratch() const {
    const i64 terms = this->taps * this->planes;
    return 2 * scratch_bytes<i64>(terms) + scratch_bytes<A>(terms * this->area + 2 * lead()) +
           scratch_bytes<A>(kChannels * this->k * this->planes * width + slack()) +
           scratch_bytes<A>(kChannels * this->area);
  }
  i64 lead() const { return round_up(this->radius + border, kLanes<A>); }  // before the first row of the masks
  i64 slack() const { return 2 * this->radius + kLanes<A>; }  // read beyond the last row, and dropped

  void run(i64 item, Scratch scratch) const {
    const auto [b, g, z, top, bottom] = this->place(item, out.depth, out.height);
    const i64 k = this->k, radius = this->radius, taps = this->taps, planes = this->planes, pitch = this->pitch;
    const i64 area = this->area, w = this->columns.coarse;
    const i64 n = (bottom - top - 1) * pitch + out.width, block = this->k * planes * width;
    i64* const mask_places = scratch.take<i64>(taps * planes);
    i64* const grad_places = scratch.take<i64>(taps * planes);
    A* const mask_memory = scratch.take<A>(taps * planes * area + 2 * lead());
    A* const mask_scratch = mask_memory + lead();
    A* const grad_scratch = scratch.take<A>(kChannels * block + slack());
    A* const out_scratch = scratch.take<A>(kChannels * area);
    fill(mask_memory, taps * planes * area + 2 * lead(), A(0));
    fill(grad_scratch, kChannels * block + slack(), A(0));
    // row r of a source lies radius rows above row r of the tile
    const i64 first = most(top - border - radius, 0), last = least(bottom - border + radius, this->rows.coarse);
    i64 terms = 0;
    for (i64 d = 0; d < k; ++d) {
      const i64 source = z - border - d + radius;
      if (source < 0 || source >= this->slices.coarse) continue;
      const i64 used = this->plane(this->slices.count(source), 0);
      for (i64 t = d * k * k; t < (d + 1) * k * k; ++t) {
        const i64 up = t / k % k - radius, shift = 2 * radius - t % k;
        const i64 begin = most(top - border - up, 0), end = least(bottom - border - up, this->rows.coarse);
        this->fine_rows(masks, source, begin, end, [&, b = b, g = g, top = top](i64 plane, const Map& map, i64 row,
                                                                               i64 place) {
          A* const to = mask_scratch + (t * planes + plane) * area + place + (begin + up + border - top) * pitch;
          split_row(to + radius + border - shift, area, map, this->columns, b, g * taps + t, row, 0, w);
        });
        for (i64 p = 0; p < used; ++p, ++terms) {
          mask_places[terms] = (t * planes + p) * area;
          grad_places[terms] = (d * planes + p) * width + (radius - up) * pitch + shift;
        }
      }
    }
    for (i64 c0 = 0; c0 < this->channels; c0 += kChannels) {
      const i64 channels = least(kChannels, this->channels - c0), channel = g * this->channels + c0;
      for (i64 d = 0; d < k; ++d) {
        const i64 source = z - border - d + radius;
        if (source < 0 || source >= this->slices.coarse) continue;
        this->fine_rows(grad, source, first, last, [&, b = b, top = top](i64 plane, const Map& map, i64 row,
                                                                        i64 place) {
          A* const to = grad_scratch + (d * planes + plane) * width + place + (first - top + border + radius) * pitch;
          for (i64 c = 0; c < channels; ++c)
            split_row(to + c * block + radius + border, width, map, this->columns, b, channel + c, row, 0, w);
        });
      }
      if (channels == kChannels) {
        gather_volume<A, kChannels>(mask_scratch, mask_places, grad_scratch, grad_places, terms, block, out_scratch,
                                        area, n);
      } else {
        for (i64 c = 0; c < channels; ++c)
          gather_volume<A, 1>(mask_scratch, mask_places, grad_scratch + c * block, grad_places, terms, 0,
                              out_scratch + c * area, 0, n);
      }
      const Map map = slice(out, z);
      for (i64 c = 0; c < channels; ++c)
        for (i64 i = top; i < bottom; ++i)
          store_row(map, b, channel + c, i, 0, out_scratch + c * area + (i - top) * pitch, out.width);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------
// Local similarity: the kernels' derivative for x and x itself, of unit length, without the centre

template <class A, int K>
struct VolumeSimilarity : VolumeTiling<A> {
  static constexpr i64 kChannels = 8;
  Volume x, inverse, out;
  Windows<A> windows;

  VolumeSimilarity(const Volume& x, const Volume& inverse, const Volume& out, Neighbourhood options, i64 threads)
      : VolumeTiling<A>(x, x, x.channels, {options.window, 1, 0, options.dilation},
                        options.window / 2 * options.dilation * 2, threads),
        x(x),
        inverse(inverse),
        out(out),
        windows(*this) {}

  i64 items() const { return x.batch * x.depth * this->tiles; }
  i64 scratch() const {
    return scratch_bytes<i64>(this->taps) + scratch_bytes<A>(this->taps * this->area) + windows.bytes(1) +
           windows.bytes(kChannels);
  }

  void run(i64 item, Scratch scratch) const {
    const auto [b, g, z, top, bottom] = this->place(item, x.depth, x.height);
    constexpr int E = K == 3 ? 9 : K ? K : 1;
    const i64 taps = this->taps, area = this->area, n = (bottom - top - 1) * this->pitch + x.width;
    i64* const offsets = scratch.take<i64>(taps);
    A* const sums = scratch.take<A>(taps * area);
    A* const scales = scratch.take<A>(windows.channel + kLanes<A>);
    A* const units = scratch.take<A>(kChannels * windows.channel + kLanes<A>);
    windows.find_taps(offsets, this->options.dilation);
    windows.load(scales, *this, inverse, b, 0, z, top, bottom);
    fill(sums, taps * area, A(0));
    for (i64 c0 = 0; c0 < x.channels; c0 += kChannels) {
      const i64 channels = least(kChannels, x.channels - c0);
      for (i64 c = 0; c < channels; ++c) {
        A* const unit = units + c * windows.channel;
        windows.load(unit, *this, x, b, c0 + c, z, top, bottom);
        for (i64 i = 0; i < windows.channel; ++i) unit[i] *= scales[i];
      }
      for (i64 t = 0; t < taps; t += E)
        correlate_volume<A, E, 1>(units, windows.channel, offsets + t, units + offsets[taps / 2], windows.channel,
                                  channels, sums + t * area, area, 0, n);
    }
    const Map map = slice(out, z);
    for (i64 t = 0; t < taps; ++t)
      for (i64 i = top; t != taps / 2 && i < bottom; ++i)
        store_row(map, b, t - (t > taps / 2), i, 0, sums + t * area + (i - top) * this->pitch, x.width);
  }
};

// As SimilarityWeights, of a row of a volume.
template <class A>
struct VolumeSimilarityWeights {
  Volume similarity, grad, inverse, out;
  Neighbourhood options;

  i64 items() const { return grad.batch * grad.depth * grad.height; }
  i64 scratch() const { return 6 * scratch_bytes<A>(grad.width); }

  void run(i64 item, Scratch scratch) const {
    const i64 y = item % grad.height, z = item / grad.height % grad.depth, b = item / grad.height / grad.depth;
    const i64 k = options.window, taps = k * k * k, centre = taps / 2, w = grad.width;
    A* const own = scratch.take<A>(w);
    A* const other = scratch.take<A>(w);
    A* const weights = scratch.take<A>(w);
    A* const mirrored = scratch.take<A>(w);
    A* const similarities = scratch.take<A>(w);
    A* const sums = scratch.take<A>(w);
    const Map to = slice(out, z);
    load_row(own, slice(inverse, z), b, 0, y, 0, w);
    fill(sums, w, A(0));
    for (i64 t = 0; t < taps; ++t) {
      if (t == centre) continue;
      const i64 there = z + (t / (k * k) - k / 2) * options.dilation, row = y + (t / k % k - k / 2) * options.dilation;
      const i64 dx = (t % k - k / 2) * options.dilation;
      const i64 channel = t < centre ? t : t - 1, opposite = taps - 2 - channel;
      const i64 begin = least(most(-dx, 0), w), end = most(least(w - dx, w), begin);
      fill(weights, w, A(0));
      if (there >= 0 && there < grad.depth && row >= 0 && row < grad.height && begin < end) {
        load_row(weights + begin, slice(grad, z), b, channel, y, begin, end - begin);
        load_row(mirrored + begin, slice(grad, there), b, opposite, row, begin + dx, end - begin);
        load_row(similarities + begin, slice(similarity, z), b, channel, y, begin, end - begin);
        load_row(other + begin, slice(inverse, there), b, 0, row, begin + dx, end - begin);
        for (i64 j = begin; j < end; ++j) {
          const A weight = weights[j] + mirrored[j];
          sums[j] += weight * similarities[j];
          weights[j] = weight * own[j] * other[j];
        }
      }
      store_row(to, b, t, y, 0, weights, w);
    }
    for (i64 j = 0; j < w; ++j) weights[j] = own[j] < A(1 / kEpsilon) ? -sums[j] * own[j] * own[j] : A(0);
    store_row(to, b, centre, y, 0, weights, w);
  }
};

// ---------------------------------------------------------------------------------------------------------
// Trilinear sampling: a voxel's channels at a time. The volume that is read, or whose derivative is summed, has
// channels innermost and the type of the arithmetic; the others are taken row by row.

// n voxels of a row of a map, from ones with channels innermost
template <class A>
INLINE void store_voxels(const Map& map, i64 b, i64 c, i64 channels, i64 row, const A* from, i64 n) {
  if (map.channel_stride == 1) {
    for (i64 j = 0; j < n; ++j)
      typed<A>(map, b, c, row, j, [&](auto* to) { store_strided(to, 1, from + j * channels, channels); });
    return;
  }
  for (i64 i = 0; i < channels; ++i)
    typed<A>(map, b, c + i, row, 0, [&](auto* to) {
      for (i64 j = 0; j < n; ++j) narrow(from[j * channels + i], to + j * map.column_stride);
    });
}
template <class A>
INLINE void load_voxels(A* to, const Map& map, i64 b, i64 c, i64 channels, i64 row, i64 n) {
  if (map.channel_stride == 1) {
    for (i64 j = 0; j < n; ++j)
      typed<A>(map, b, c, row, j, [&](auto* from) { load_strided(to + j * channels, from, 1, channels); });
    return;
  }
  for (i64 i = 0; i < channels; ++i)
    typed<A>(map, b, c + i, row, 0, [&](auto* from) {
      for (i64 j = 0; j < n; ++j) to[j * channels + i] = A(widen(from[j * map.column_stride]));
    });
}

// A volume in another layout or storage type. Item: a row.
template <class A>
struct VolumeCopy {
  Volume from, to;

  i64 items() const { return to.batch * to.depth * to.height; }
  i64 scratch() const { return scratch_bytes<A>(to.width * to.channels); }

  void run(i64 item, Scratch scratch) const {
    const i64 y = item % to.height, z = item / to.height % to.depth, b = item / to.height / to.depth;
    A* const voxels = scratch.take<A>(to.width * to.channels);
    load_voxels(voxels, slice(from, z), b, 0, to.channels, y, to.width);
    store_voxels(slice(to, z), b, 0, to.channels, y, voxels, to.width);
  }
};

// Where the output voxels of a row read: the first of eight corners, the way to the others, and how far between them.
template <class A>
struct VolumePositions {
  i64 *place, *right, *down, *back;
  A *weight_x, *weight_y, *weight_z, *slope_x, *slope_y, *slope_z;

  static i64 bytes(i64 n) { return 4 * scratch_bytes<i64>(n) + 6 * scratch_bytes<A>(n); }

  VolumePositions(Scratch& scratch, i64 n)
      : place(scratch.take<i64>(n)),
        right(scratch.take<i64>(n)),
        down(scratch.take<i64>(n)),
        back(scratch.take<i64>(n)),
        weight_x(scratch.take<A>(n)),
        weight_y(scratch.take<A>(n)),
        weight_z(scratch.take<A>(n)),
        slope_x(scratch.take<A>(n)),
        slope_y(scratch.take<A>(n)),
        slope_z(scratch.take<A>(n)) {}

  // Calls body(corner, weight) for the eight corners of voxel j, whose weights sum to one.
  template <class P, class Body>
  INLINE void corners(P* origin, i64 j, Body body) const {
    P* corner = origin + place[j];
    for (int z = 0; z < 2; ++z, corner += back[j]) {
      const A wz = z ? weight_z[j] : 1 - weight_z[j];
      P* line = corner;
      for (int y = 0; y < 2; ++y, line += down[j]) {
        const A wy = (y ? weight_y[j] : 1 - weight_y[j]) * wz;
        body(line, wy * (1 - weight_x[j]));
        body(line + right[j], wy * weight_x[j]);
      }
    }
  }
};

template <class A>
struct VolumeSampler {
  Volume x, offsets;
  VolumeSampling options;
  i64 channels, width;

  VolumeSampler(const Volume& x, const Volume& offsets, VolumeSampling options)
      : x(x), offsets(offsets), options(options), channels(x.channels / options.groups), width(offsets.width) {}

  i64 rows() const { return offsets.depth * offsets.height; }
  i64 items() const { return x.batch * rows(); }

  // One axis of a row; a loop of its own, which compilers turn into vectors. `slope` holds the offsets, `place` sums.
  // Output voxel j has place `first + j * step` of `side`.
  void locate_axis(A first, A step, i64 side, A unit, i64 size, i64 stride, A* __restrict weight, A* __restrict slope,
                   i64* __restrict place, i64* __restrict next) const {
    for (i64 j = 0; j < width; ++j) {
      const A centre = (first + A(j) * step + A(0.5)) * unit / A(side);
      const i64 lower = Sampler<A, A>::locate(centre, slope[j], unit, size, weight + j, slope + j);
      place[j] += lower * stride;
      next[j] = lower + 1 < size ? stride : 0;
    }
  }

  void locate_row(const VolumePositions<A>& to, i64 b, i64 g, i64 z, i64 y) const {
    const Map map = slice(offsets, z);
    load_row(to.slope_x, map, b, g, y, 0, width);
    load_row(to.slope_y, map, b, options.groups + g, y, 0, width);
    load_row(to.slope_z, map, b, 2 * options.groups + g, y, 0, width);
    fill(to.place, width, i64(0));
    locate_axis(0, 1, width, A(options.unit_width), x.width, x.column_stride, to.weight_x, to.slope_x, to.place,
                to.right);
    locate_axis(A(y), 0, offsets.height, A(options.unit_height), x.height, x.row_stride, to.weight_y, to.slope_y,
                to.place, to.down);
    locate_axis(A(z), 0, offsets.depth, A(options.unit_depth), x.depth, x.slice_stride, to.weight_z, to.slope_z,
                to.place, to.back);
  }

  A* origin(i64 b, i64 c) const { return at<A>(slice(x, 0), b, c, 0, 0); }
};

// Item: one row of the output.
template <class A>
struct VolumeResample : VolumeSampler<A> {
  Volume out;

  VolumeResample(const Volume& x, const Volume& offsets, const Volume& out, VolumeSampling options)
      : VolumeSampler<A>(x, offsets, options), out(out) {}

  i64 scratch() const {
    return VolumePositions<A>::bytes(this->width) + scratch_bytes<A>(this->width * this->channels);
  }

  void run(i64 item, Scratch scratch) const {
    const i64 b = item / this->rows(), z = item % this->rows() / out.height, y = item % out.height;
    const VolumePositions<A> positions(scratch, this->width);
    A* const voxels = scratch.take<A>(this->width * this->channels);
    for (i64 g = 0; g < this->options.groups; ++g) {
      this->locate_row(positions, b, g, z, y);
      const A* const origin = this->origin(b, g * this->channels);
      for (i64 j = 0; j < this->width; ++j)
        partition<A, kLanes<A>>(0, this->channels, [&](auto lanes, i64 c) {
          constexpr int N = lanes.value;
          Lanes<A, N> total = {};
          positions.corners(origin + c, j, [&](const A* corner, A weight) { total += load<A, N>(corner) * weight; });
          store<A, N>(voxels + j * this->channels + c, total);
        });
      store_voxels(slice(out, z), b, g * this->channels, this->channels, y, voxels, this->width);
    }
  }
};

// As ResampleGradient; `x` of the sampler is the result.
template <class A>
struct VolumeResampleGradient : VolumeSampler<A> {
  Volume grad;
  i64 channel_block, channel_blocks;

  VolumeResampleGradient(const Volume& offsets, const Volume& grad, const Volume& out, VolumeSampling options,
                         i64 threads)
      : VolumeSampler<A>(out, offsets, options), grad(grad) {
    channel_block = least(most(16, ceil_div(out.batch * out.channels, 4 * threads)), this->channels);
    channel_blocks = ceil_div(this->channels, channel_block);
  }

  i64 items() const { return grad.batch * this->options.groups * channel_blocks; }
  i64 scratch() const {
    return VolumePositions<A>::bytes(this->width) + scratch_bytes<A>(this->width * channel_block);
  }

  void run(i64 item, Scratch scratch) const {
    const i64 b = item % grad.batch, first = item / grad.batch % channel_blocks * channel_block;
    const i64 g = item / grad.batch / channel_blocks, channels = least(channel_block, this->channels - first);
    const i64 begin = g * this->channels + first;
    const VolumePositions<A> positions(scratch, this->width);
    A* const voxels = scratch.take<A>(this->width * channel_block);
    const Volume& out = this->x;
    for (i64 z = 0; z < out.depth; ++z)
      for (i64 y = 0; y < out.height; ++y)
        for (i64 j = 0; j < out.width; ++j) fill(at<A>(slice(out, z), b, begin, y, j), channels, A(0));
    for (i64 z = 0; z < grad.depth; ++z)
      for (i64 y = 0; y < grad.height; ++y) {
        this->locate_row(positions, b, g, z, y);
        load_voxels(voxels, slice(grad, z), b, begin, channels, y, this->width);
        for (i64 j = 0; j < this->width; ++j)
          partition<A, kLanes<A>>(0, channels, [&](auto lanes, i64 c) {
            constexpr int N = lanes.value;
            const Lanes<A, N> incoming = load<A, N>(voxels + j * channels + c);
            // corners may coincide at the border, so they are updated in turn
            positions.corners(this->origin(b, begin + c), j, [&](A* corner, A weight) {
              store<A, N>(corner, load<A, N>(corner) + incoming * weight);
            });
          });
      }
  }
};

// Item: one row of the output voxels.
template <class A>
struct VolumeResampleOffsetGradient : VolumeSampler<A> {
  Volume grad, out;

  VolumeResampleOffsetGradient(const Volume& x, const Volume& offsets, const Volume& grad, const Volume& out,
                               VolumeSampling options)
      : VolumeSampler<A>(x, offsets, options), grad(grad), out(out) {}

  i64 scratch() const {
    return VolumePositions<A>::bytes(this->width) + scratch_bytes<A>(this->width * this->channels);
  }

  void run(i64 item, Scratch scratch) const {
    const i64 b = item / this->rows(), z = item % this->rows() / out.height, y = item % out.height;
    const i64 groups = this->options.groups;
    const VolumePositions<A> positions(scratch, this->width);
    A* const voxels = scratch.take<A>(this->width * this->channels);
    const Map map = slice(out, z);
    for (i64 g = 0; g < groups; ++g) {
      this->locate_row(positions, b, g, z, y);
      load_voxels(voxels, slice(grad, z), b, g * this->channels, this->channels, y, this->width);
      const A* const origin = this->origin(b, g * this->channels);
      for (i64 j = 0; j < this->width; ++j) voxel(positions, origin, voxels + j * this->channels, j);
      store_row(map, b, g, y, 0, positions.slope_x, this->width);
      store_row(map, b, groups + g, y, 0, positions.slope_y, this->width);
      store_row(map, b, 2 * groups + g, y, 0, positions.slope_z, this->width);
    }
  }

  // Multiplies the slopes of voxel j by what its channels sum to.
  void voxel(const VolumePositions<A>& positions, const A* origin, const A* incoming, i64 j) const {
    const A wx = positions.weight_x[j], wy = positions.weight_y[j], wz = positions.weight_z[j];
    A along_x = 0, along_y = 0, along_z = 0;
    partition<A, kLanes<A>>(0, this->channels, [&](auto lanes, i64 c) {
      constexpr int N = lanes.value;
      using V = Lanes<A, N>;
      V corners[8];
      int i = 0;
      positions.corners(origin + c, j, [&](const A* corner, A) { corners[i++] = load<A, N>(corner); });
      // corner 4 z + 2 y + x
      const V x0 = (corners[1] - corners[0]) * (1 - wy) + (corners[3] - corners[2]) * wy;
      const V x1 = (corners[5] - corners[4]) * (1 - wy) + (corners[7] - corners[6]) * wy;
      const V y0 = (corners[2] - corners[0]) * (1 - wx) + (corners[3] - corners[1]) * wx;
      const V y1 = (corners[6] - corners[4]) * (1 - wx) + (corners[7] - corners[5]) * wx;
      const V z0 = (corners[4] - corners[0]) * (1 - wx) + (corners[5] - corners[1]) * wx;
      const V z1 = (corners[6] - corners[2]) * (1 - wx) + (corners[7] - corners[3]) * wx;
      const V in = load<A, N>(incoming + c);
      along_x += sum<A, N>(in * (x0 * (1 - wz) + x1 * wz));
      along_y += sum<A, N>(in * (y0 * (1 - wz) + y1 * wz));
      along_z += sum<A, N>(in * (z0 * (1 - wy) + z1 * wy));
    });
    positions.slope_x[j] *= along_x;
    positions.slope_y[j] *= along_y;
    positions.slope_z[j] *= along_z;
  }
};

}  // namespace
