// All kernels for one instruction set, whose name the build passes as FREQFUSION_LEVEL; compiled once a level.
#include "carafe.h"
#include "resample.h"
#include "similarity.h"
#include "volumes.h"

namespace {

using freqfusion::Driver;
using freqfusion::kBFloat16;
using freqfusion::kFloat64;

// Calls body(storage, arithmetic) with a value of the type a map is stored in and of the type it is computed in.
template <class Body>
bool with_types(const Map& map, Body body) {
  if (map.dtype == kFloat64) return body(double(), double());
  if (map.dtype == kBFloat16) return body(BFloat16(), float());
  return body(float(), float());
}

// Volumes are read row by row, whatever they are stored in.
template <class Body>
bool with_arithmetic(const Volume& volume, Body body) {
  return volume.dtype == kFloat64 ? body(double()) : body(float());
}

// Calls body(Constant) with the kernel sizes that have code of their own, 0 for the others.
template <class Body>
bool with_kernel_size(i64 kernel_size, Body body) {
  if (kernel_size == 3) return body(Constant<3>());
  if (kernel_size == 5) return body(Constant<5>());
  return body(Constant<0>());
}

// Whether a vector of channels at a time is faster than row by row, which reads any layout.
bool by_pixels(const Map& one, const Map& other, const Reassembly& options) {
  return channels_innermost(one) && channels_innermost(other) && one.channels / options.groups >= 16;
}

bool carafe(const Map& x, const Map& masks, const Map& out, Reassembly options, i64 threads, Driver driver) {
  return with_types(x, [&](auto storage, auto arithmetic) {
    using X = decltype(storage);
    using A = decltype(arithmetic);
    if (by_pixels(x, out, options))
      return drive(ForwardPixels<X, A>(x, masks, out, options), threads, driver);
    return with_kernel_size(options.kernel_size, [&](auto k) {
      return drive(ForwardRows<A, k.value>(x, masks, out, options, threads), threads, driver);
    });
  });
}

bool carafe_backward_x(const Map& masks, const Map& grad, const Map& out, Reassembly options, i64 threads,
                       Driver driver) {
  return with_types(grad, [&](auto storage, auto arithmetic) {
    using X = decltype(storage);
    using A = decltype(arithmetic);
    if (by_pixels(grad, out, options))
      return drive(GradientPixels<X, A>(masks, grad, out, options), threads, driver);
    return drive(GradientRows<A>(masks, grad, out, options, threads), threads, driver);
  });
}

bool carafe_backward_kernels(const Map& x, const Map& grad, const Map& out, Reassembly options, i64 threads,
                             Driver driver) {
  return with_types(x, [&](auto storage, auto arithmetic) {
    using X = decltype(storage);
    using A = decltype(arithmetic);
    return with_kernel_size(options.kernel_size, [&](auto k) {
      if (by_pixels(x, grad, options) && x.dtype == grad.dtype)
        return drive(KernelGradientPixels<X, A, k.value>(x, grad, out, options), threads, driver);
      return drive(KernelGradientRows<A, k.value>(x, grad, out, options, threads), threads, driver);
    });
  });
}

bool inverse_norms(const Map& x, const Map& out, i64 threads, Driver driver) {
  return with_types(x, [&](auto storage, auto arithmetic) {
    return drive(InverseNorms<decltype(storage), decltype(arithmetic)>{x, out}, threads, driver);
  });
}

bool local_similarity(const Map& x, const Map& inverse, const Map& out, Neighbourhood options, i64 threads,
                      Driver driver) {
  return with_types(x, [&](auto storage, auto arithmetic) {
    using Operation = Similarity<decltype(storage), decltype(arithmetic)>;
    return drive(Operation(x, inverse, out, options, threads), threads, driver);
  });
}

bool local_similarity_weights(const Map& similarity, const Map& grad, const Map& inverse, const Map& out,
                              Neighbourhood options, i64 threads, Driver driver) {
  return with_types(out, [&](auto, auto arithmetic) {
    return drive(SimilarityWeights<decltype(arithmetic)>{similarity, grad, inverse, out, options}, threads, driver);
  });
}

bool resample(const Map& x, const Map& offsets, const Map& out, Sampling options, i64 threads, Driver driver) {
  return with_types(x, [&](auto storage, auto arithmetic) {
    using Operation = Resample<decltype(storage), decltype(arithmetic)>;
    return drive(Operation(x, offsets, out, options, threads), threads, driver);
  });
}

bool resample_backward_x(const Map& offsets, const Map& grad, const Map& out, Sampling options, i64 threads,
                         Driver driver) {
  return with_types(grad, [&](auto storage, auto arithmetic) {
    using Operation = ResampleGradient<decltype(storage), decltype(arithmetic)>;
    return drive(Operation(offsets, grad, out, options, threads), threads, driver);
  });
}

bool resample_backward_offsets(const Map& x, const Map& offsets, const Map& grad, const Map& out, Sampling options,
                               i64 threads, Driver driver) {
  return with_types(x, [&](auto storage, auto arithmetic) {
    using Operation = ResampleOffsetGradient<decltype(storage), decltype(arithmetic)>;
    return drive(Operation(x, offsets, grad, out, options, threads), threads, driver);
  });
}

bool volume_carafe(const Volume& x, const Volume& masks, const Volume& out, Reassembly options, i64 threads,
                   Driver driver) {
  return with_arithmetic(x, [&](auto arithmetic) {
    return drive(VolumeForward<decltype(arithmetic)>(x, masks, out, options, threads), threads, driver);
  });
}

bool volume_carafe_backward_x(const Volume& masks, const Volume& grad, const Volume& out, Reassembly options,
                              i64 threads, Driver driver) {
  return with_arithmetic(grad, [&](auto arithmetic) {
    return drive(VolumeGradient<decltype(arithmetic)>(masks, grad, out, options, threads), threads, driver);
  });
}

bool volume_carafe_backward_kernels(const Volume& x, const Volume& grad, const Volume& out, Reassembly options,
                                    i64 threads, Driver driver) {
  return with_arithmetic(x, [&](auto arithmetic) {
    return with_kernel_size(options.kernel_size, [&](auto k) {
      using Operation = VolumeKernelGradient<decltype(arithmetic), k.value>;
      return drive(Operation(x, grad, out, options, threads), threads, driver);
    });
  });
}

bool volume_similarity(const Volume& x, const Volume& inverse, const Volume& out, Neighbourhood options, i64 threads,
                       Driver driver) {
  return with_arithmetic(x, [&](auto arithmetic) {
    return with_kernel_size(options.window, [&](auto k) {
      using Operation = VolumeSimilarity<decltype(arithmetic), k.value>;
      return drive(Operation(x, inverse, out, options, threads), threads, driver);
    });
  });
}

bool volume_similarity_weights(const Volume& similarity, const Volume& grad, const Volume& inverse, const Volume& out,
                               Neighbourhood options, i64 threads, Driver driver) {
  return with_arithmetic(out, [&](auto arithmetic) {
    using Operation = VolumeSimilarityWeights<decltype(arithmetic)>;
    return drive(Operation{similarity, grad, inverse, out, options}, threads, driver);
  });
}

bool volume_copy(const Volume& from, const Volume& to, i64 threads, Driver driver) {
  return with_arithmetic(to, [&](auto arithmetic) {
    return drive(VolumeCopy<decltype(arithmetic)>{from, to}, threads, driver);
  });
}

bool volume_resample(const Volume& x, const Volume& offsets, const Volume& out, VolumeSampling options, i64 threads,
                     Driver driver) {
  return with_arithmetic(x, [&](auto arithmetic) {
    return drive(VolumeResample<decltype(arithmetic)>(x, offsets, out, options), threads, driver);
  });
}

bool volume_resample_backward_x(const Volume& offsets, const Volume& grad, const Volume& out, VolumeSampling options,
                                i64 threads, Driver driver) {
  return with_arithmetic(out, [&](auto arithmetic) {
    using Operation = VolumeResampleGradient<decltype(arithmetic)>;
    return drive(Operation(offsets, grad, out, options, threads), threads, driver);
  });
}

bool volume_resample_backward_offsets(const Volume& x, const Volume& offsets, const Volume& grad, const Volume& out,
                                      VolumeSampling options, i64 threads, Driver driver) {
  return with_arithmetic(x, [&](auto arithmetic) {
    using Operation = VolumeResampleOffsetGradient<decltype(arithmetic)>;
    return drive(Operation(x, offsets, grad, out, options), threads, driver);
  });
}

}  // namespace

#define FREQFUSION_TEXT_(text) #text
#define FREQFUSION_TEXT(text) FREQFUSION_TEXT_(text)
#define FREQFUSION_JOIN_(a, b) a##b
#define FREQFUSION_JOIN(a, b) FREQFUSION_JOIN_(a, b)

extern "C" {
extern const freqfusion::Kernels FREQFUSION_JOIN(freqfusion_kernels_, FREQFUSION_LEVEL);
const freqfusion::Kernels FREQFUSION_JOIN(freqfusion_kernels_, FREQFUSION_LEVEL) = {
    FREQFUSION_TEXT(FREQFUSION_LEVEL),
    carafe,
    carafe_backward_x,
    carafe_backward_kernels,
    inverse_norms,
    local_similarity,
    local_similarity_weights,
    resample,
    resample_backward_x,
    resample_backward_offsets,
    volume_carafe,
    volume_carafe_backward_x,
    volume_carafe_backward_kernels,
    volume_similarity,
    volume_similarity_weights,
    volume_copy,
    volume_resample,
    volume_resample_backward_x,
    volume_resample_backward_offsets,
};
}
