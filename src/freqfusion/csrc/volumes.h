// The kernels for volumes (B, C, D, H, W): reassembly with its two adjoints, local similarity, trilinear sampling.
//
// As in carafe.h a fine map is held as planes of coarse size, plane p with the p-th fine voxel of every coarse
// voxel. The rows of a tile lie one after the other with room for the window's border between them, so that a tap is
// one shift of the whole tile, and short rows, the rule in volumes, fill vectors. What vectors compute between the
// rows is dropped.
#pragma once

#include "carafe.h"
#include "similarity.h"

namespace {

using freqfusion::Volume;

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

}  // namespace
