// What the Python side, the thread driver and the kernels (compiled once an instruction set) share.
// Plain data and function pointers only: a C++ template with external linkage here could be merged by the
// linker with a copy that was compiled for an instruction set that the processor lacks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freqfusion {

enum Dtype : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };

// A map (B, C, H, W) anywhere in memory; strides count elements.
struct Map {
  void* data;
  int64_t dtype;
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
};

// A volume (B, C, D, H, W).
struct Volume {
  void* data;
  int64_t dtype;
  int64_t batch, channels, depth, height, width;
  int64_t batch_stride, channel_stride, slice_stride, row_stride, column_stride;
};

// Runs `run(operation, item, scratch)` for every item, each thread with `scratch_bytes` of its own.
using Run = void (*)(const void* operation, int64_t item, char* scratch);
using Driver = bool (*)(const void* operation, Run run, int64_t items, size_t scratch_bytes, int64_t threads);

struct Reassembly {
  int64_t kernel_size, groups, reflect, dilation;
};

struct Sampling {
  int64_t groups, unit_height, unit_width;
};

struct VolumeSampling {
  int64_t groups, unit_depth, unit_height, unit_width;
};

struct Neighbourhood {
  int64_t window, dilation;
};

// One instruction set's kernels. Each returns false when memory ran out.
struct Kernels {
  const char* name;
  bool (*carafe)(const Map& x, const Map& kernels, const Map& out, Reassembly, int64_t threads, Driver);
  bool (*carafe_backward_x)(const Map& kernels, const Map& grad, const Map& out, Reassembly, int64_t threads,
                            Driver);
  bool (*carafe_backward_kernels)(const Map& x, const Map& grad, const Map& out, Reassembly, int64_t threads,
                                  Driver);
  bool (*inverse_norms)(const Map& x, const Map& out, int64_t threads, Driver);
  bool (*local_similarity)(const Map& x, const Map& inverse_norms, const Map& out, Neighbourhood,
                           int64_t threads, Driver);
  bool (*local_similarity_weights)(const Map& similarity, const Map& grad, const Map& inverse_norms,
                                   const Map& out, Neighbourhood, int64_t threads, Driver);
  bool (*resample)(const Map& x, const Map& offsets, const Map& out, Sampling, int64_t threads, Driver);
  bool (*resample_backward_x)(const Map& offsets, const Map& grad, const Map& out, Sampling, int64_t threads,
                              Driver);
  bool (*resample_backward_offsets)(const Map& x, const Map& offsets, const Map& grad, const Map& out, Sampling,
                                    int64_t threads, Driver);
  bool (*volume_carafe)(const Volume& x, const Volume& kernels, const Volume& out, Reassembly, int64_t threads,
                        Driver);
  bool (*volume_carafe_backward_x)(const Volume& kernels, const Volume& grad, const Volume& out, Reassembly,
                                   int64_t threads, Driver);
  bool (*volume_carafe_backward_kernels)(const Volume& x, const Volume& grad, const Volume& out, Reassembly,
                                         int64_t threads, Driver);
  bool (*volume_similarity)(const Volume& x, const Volume& inverse_norms, const Volume& out, Neighbourhood,
                            int64_t threads, Driver);
  bool (*volume_similarity_weights)(const Volume& similarity, const Volume& grad, const Volume& inverse_norms,
                                    const Volume& out, Neighbourhood, int64_t threads, Driver);
  bool (*volume_copy)(const Volume& from, const Volume& to, int64_t threads, Driver);
  bool (*volume_resample)(const Volume& x, const Volume& offsets, const Volume& out, VolumeSampling, int64_t threads,
                          Driver);
  bool (*volume_resample_backward_x)(const Volume& offsets, const Volume& grad, const Volume& out, VolumeSampling,
                                     int64_t threads, Driver);
  bool (*volume_resample_backward_offsets)(const Volume& x, const Volume& offsets, const Volume& grad,
                                           const Volume& out, VolumeSampling, int64_t threads, Driver);
};

}  // namespace freqfusion
