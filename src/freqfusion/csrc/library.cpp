// Entry points for ctypes, the threads, and the choice of the instruction set.
#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "api.h"

using namespace freqfusion;

extern "C" {
extern const Kernels freqfusion_kernels_baseline;
#if defined(FREQFUSION_X86_LEVELS)
extern const Kernels freqfusion_kernels_v3;
extern const Kernels freqfusion_kernels_v4;
#endif
}

namespace {

const Kernels& best_kernels() {
#if defined(FREQFUSION_X86_LEVELS)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  // Testing the lower levels on a processor that has the higher ones.
  const char* limit = std::getenv("FREQFUSION_X86_LEVEL");
  const int level = limit == nullptr ? 4 : std::atoi(limit);
  if (v4 && level >= 4) return freqfusion_kernels_v4;
  if (v3 && level >= 3) return freqfusion_kernels_v3;
#endif
  return freqfusion_kernels_baseline;
}

const Kernels& kernels() {
  static const Kernels& chosen = best_kernels();
  return chosen;
}

// Items are taken in turn by threads that live for this call alone: nothing outlives it that a fork could
// break, and no second OpenMP runtime comes into the process. Each item writes what no other item writes, so
// the result does not depend on which thread took it.
bool drive(const void* operation, Run run, int64_t items, size_t scratch_bytes, int64_t threads) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> enough_memory{true};
  auto work = [&] {
    constexpr std::align_val_t line{64};
    char* memory = static_cast<char*>(::operator new(scratch_bytes + 64, line, std::nothrow));
    if (memory == nullptr) {
      enough_memory = false;
      return;
    }
    for (int64_t item; (item = next.fetch_add(1)) < items;) run(operation, item, memory);
    ::operator delete(memory, line);
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < threads && i < items; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads to be had: those that started do the work
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  return enough_memory;
}

// A large fresh output costs more in page faults than in arithmetic; huge pages make that few faults.
void want_huge_pages(void* data, int64_t dtype, int64_t elements) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const int64_t size = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + uintptr_t(elements * size);
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)dtype, (void)elements;
#endif
}
void want_huge_pages(const Map& out) {
  want_huge_pages(out.data, out.dtype, out.batch * out.channels * out.height * out.width);
}
void want_huge_pages(const Volume& out) {
  want_huge_pages(out.data, out.dtype, out.batch * out.channels * out.depth * out.height * out.width);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) bool

extern "C" __attribute__((visibility("default"))) const char* freqfusion_instruction_set() {
  return kernels().name;
}
// Digest of the sources that this library was compiled from.
extern "C" __attribute__((visibility("default"))) const char* freqfusion_sources() { return FREQFUSION_SOURCES; }

EXPORT freqfusion_carafe(const Map* x, const Map* masks, const Map* out, const Reassembly* options,
                         int64_t threads) {
  want_huge_pages(*out);
  return kernels().carafe(*x, *masks, *out, *options, threads, drive);
}
EXPORT freqfusion_carafe_backward_x(const Map* masks, const Map* grad, const Map* out, const Reassembly* options,
                                    int64_t threads) {
  want_huge_pages(*out);
  return kernels().carafe_backward_x(*masks, *grad, *out, *options, threads, drive);
}
EXPORT freqfusion_carafe_backward_kernels(const Map* x, const Map* grad, const Map* out,
                                          const Reassembly* options, int64_t threads) {
  want_huge_pages(*out);
  return kernels().carafe_backward_kernels(*x, *grad, *out, *options, threads, drive);
}
EXPORT freqfusion_inverse_norms(const Map* x, const Map* out, int64_t threads) {
  return kernels().inverse_norms(*x, *out, threads, drive);
}
EXPORT freqfusion_local_similarity(const Map* x, const Map* inverse_norms, const Map* out,
                                   const Neighbourhood* options, int64_t threads) {
  want_huge_pages(*out);
  return kernels().local_similarity(*x, *inverse_norms, *out, *options, threads, drive);
}
EXPORT freqfusion_local_similarity_weights(const Map* similarity, const Map* grad, const Map* inverse_norms,
                                           const Map* out, const Neighbourhood* options, int64_t threads) {
  want_huge_pages(*out);
  return kernels().local_similarity_weights(*similarity, *grad, *inverse_norms, *out, *options, threads, drive);
}
EXPORT freqfusion_resample(const Map* x, const Map* offsets, const Map* out, const Sampling* options,
                           int64_t threads) {
  want_huge_pages(*out);
  return kernels().resample(*x, *offsets, *out, *options, threads, drive);
}
EXPORT freqfusion_resample_backward_x(const Map* offsets, const Map* grad, const Map* out,
                                      const Sampling* options, int64_t threads) {
  want_huge_pages(*out);
  return kernels().resample_backward_x(*offsets, *grad, *out, *options, threads, drive);
}
EXPORT freqfusion_resample_backward_offsets(const Map* x, const Map* offsets, const Map* grad, const Map* out,
                                            const Sampling* options, int64_t threads) {
  want_huge_pages(*out);
  return kernels().resample_backward_offsets(*x, *offsets, *grad, *out, *options, threads, drive);
}
EXPORT freqfusion_volume_carafe(const Volume* x, const Volume* masks, const Volume* out, const Reassembly* options,
                                int64_t threads) {
  want_huge_pages(*out);
  return kernels().volume_carafe(*x, *masks, *out, *options, threads, drive);
}
EXPORT freqfusion_volume_carafe_backward_x(const Volume* masks, const Volume* grad, const Volume* out,
                                           const Reassembly* options, int64_t threads) {
  want_huge_pages(*out);
  return kernels().volume_carafe_backward_x(*masks, *grad, *out, *options, threads, drive);
}
EXPORT freqfusion_volume_carafe_backward_kernels(const Volume* x, const Volume* grad, const Volume* out,
                                                 const Reassembly* options, int64_t threads) {
  want_huge_pages(*out);
  return kernels().volume_carafe_backward_kernels(*x, *grad, *out, *options, threads, drive);
}
EXPORT freqfusion_volume_local_similarity(const Volume* x, const Volume* inverse_norms, const Volume* out,
                                          const Neighbourhood* options, int64_t threads) {
  want_huge_pages(*out);
  return kernels().volume_similarity(*x, *inverse_norms, *out, *options, threads, drive);
}
EXPORT freqfusion_volume_local_similarity_weights(const Volume* similarity, const Volume* grad,
                                                  const Volume* inverse_norms, const Volume* out,
                                                  const Neighbourhood* options, int64_t threads) {
  want_huge_pages(*out);
  return kernels().volume_similarity_weights(*similarity, *grad, *inverse_norms, *out, *options, threads, drive);
}
EXPORT freqfusion_volume_copy(const Volume* from, const Volume* to, int64_t threads) {
  want_huge_pages(*to);
  return kernels().volume_copy(*from, *to, threads, drive);
}
EXPORT freqfusion_volume_resample(const Volume* x, const Volume* offsets, const Volume* out,
                                  const VolumeSampling* options, int64_t threads) {
  want_huge_pages(*out);
  return kernels().volume_resample(*x, *offsets, *out, *options, threads, drive);
}
EXPORT freqfusion_volume_resample_backward_x(const Volume* offsets, const Volume* grad, const Volume* out,
                                             const VolumeSampling* options, int64_t threads) {
  want_huge_pages(*out);
  return kernels().volume_resample_backward_x(*offsets, *grad, *out, *options, threads, drive);
}
EXPORT freqfusion_volume_resample_backward_offsets(const Volume* x, const Volume* offsets, const Volume* grad,
                                                   const Volume* out, const VolumeSampling* options,
                                                   int64_t threads) {
  want_huge_pages(*out);
  return kernels().volume_resample_backward_offsets(*x, *offsets, *grad, *out, *options, threads, drive);
}
