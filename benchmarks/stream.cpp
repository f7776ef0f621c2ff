// Memory bandwidth of all cores, in GB/s of bytes read and written: McCalpin's STREAM copy and triad.
//
//   g++ -O3 -march=native -fopenmp benchmarks/stream.cpp -o stream && ./stream BYTES SECONDS
//
// BYTES is the size of each of the three arrays. Each kernel runs with ordinary and with non-temporal stores; the latter bypass
// the cache and save the read of the line that is overwritten (STREAM does not count that read either). Prints one line per
// kernel, such as `copy 12.3`: the median of the repetitions (STREAM itself reports the best).
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr std::size_t kLane = 16;
static void past_cache(float* at, const float* value) { _mm512_stream_ps(at, _mm512_loadu_ps(value)); }
#elif defined(__AVX__)
#include <immintrin.h>
constexpr std::size_t kLane = 8;
static void past_cache(float* at, const float* value) { _mm256_stream_ps(at, _mm256_loadu_ps(value)); }
#else
constexpr std::size_t kLane = 16;
static void past_cache(float* at, const float* value) { std::copy(value, value + kLane, at); }
#endif

using Array = std::unique_ptr<float[], decltype(&std::free)>;

static Array array_of(std::size_t count, float value) {
  Array array(static_cast<float*>(std::aligned_alloc(4096, count * sizeof(float))), &std::free);
  if (!array) throw std::bad_alloc();
#pragma omp parallel for schedule(static)
  for (std::size_t i = 0; i < count; ++i) array[i] = value;  // first touch by the core that uses it
  return array;
}

template <typename Kernel>
static void measure(const char* name, double bytes, double seconds, Kernel kernel) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  std::vector<double> taken;
  while (taken.size() < 3 || Clock::now() < end) {
    const auto started = Clock::now();
    kernel();
    taken.push_back(std::chrono::duration<double>(Clock::now() - started).count());
  }
  std::nth_element(taken.begin(), taken.begin() + taken.size() / 2, taken.end());
  std::printf("%s %.3f\n", name, bytes / taken[taken.size() / 2] / 1e9);
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: stream BYTES SECONDS\n");
    return 64;
  }
  const std::size_t count = std::strtoull(argv[1], nullptr, 10) / sizeof(float) / 1024 * 1024;
  const double each = std::strtod(argv[2], nullptr) / 4, bytes = count * sizeof(float);
  Array a = array_of(count, 1), b = array_of(count, 2), c = array_of(count, 0);
  float *from = a.get(), *other = b.get(), *to = c.get();
  measure("copy", 2 * bytes, each, [=] {
#pragma omp parallel for simd schedule(static)
    for (std::size_t i = 0; i < count; ++i) to[i] = from[i];
  });
  measure("copy_past_cache", 2 * bytes, each, [=] {
#pragma omp parallel for schedule(static)
    for (std::size_t i = 0; i < count; i += kLane) past_cache(to + i, from + i);
  });
  measure("triad", 3 * bytes, each, [=] {
#pragma omp parallel for simd schedule(static)
    for (std::size_t i = 0; i < count; ++i) to[i] = from[i] + 3.0f * other[i];
  });
  measure("triad_past_cache", 3 * bytes, each, [=] {
#pragma omp parallel for schedule(static)
    for (std::size_t i = 0; i < count; i += kLane) {
      float sum[kLane];
      for (std::size_t k = 0; k < kLane; ++k) sum[k] = from[i + k] + 3.0f * other[i + k];
      past_cache(to + i, sum);
    }
  });
  return to[count / 2] == 7.0f ? 0 : 70;
}
