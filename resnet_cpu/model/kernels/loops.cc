// The loops of loops.h for one instruction set: ISA is Avx2, Avx512 or Avx512Bf16. It includes nothing that could be
// instantiated here and then be used elsewhere, by a processor that does not have the instructions.
//
// A channel's sums are made in the order of the rows, one multiply-add after another, whatever the width of a vector:
// so all instruction sets give the same bits. Only the conversion to bfloat16 by Avx512Bf16 differs, for denormals.
#include "loops.h"

#include <immintrin.h>

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace resnet_cpu {
namespace {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kTile = 4;  // vectors of channels that are summed side by side
typedef __m512 Vector;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector all(float x) { return _mm512_set1_ps(x); }
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector muladd(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector negmuladd(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }
// x where x is not negative, else 0; NaN stays NaN.
inline Vector not_negative(Vector x) {
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, zero(), _CMP_LT_OQ), zero());
}
// x where y > 0, else 0.
inline Vector where_positive(Vector y, Vector x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero(), _CMP_GT_OQ), x);
}
inline Vector load(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
#if defined(__AVX512BF16__)
inline void store(uint16_t* p, Vector x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
#else
inline void store(uint16_t* p, Vector x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
#endif

#else

constexpr int kLanes = 8;
constexpr int kTile = 2;
typedef __m256 Vector;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector all(float x) { return _mm256_set1_ps(x); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vector x) { _mm256_storeu_ps(p, x); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector muladd(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector negmuladd(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vector not_negative(Vector x) { return _mm256_andnot_ps(_mm256_cmp_ps(x, zero(), _CMP_LT_OQ), x); }
inline Vector where_positive(Vector y, Vector x) { return _mm256_and_ps(_mm256_cmp_ps(y, zero(), _CMP_GT_OQ), x); }
inline Vector load(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void store(uint16_t* p, Vector x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

#endif

// Access to `count` elements, which are all lanes but for the last channels of a row.
template <typename T>
inline Vector load(const T* p, int count) {
  if (count == kLanes) return load(p);
  T part[kLanes] = {};
  for (int i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}

template <typename T>
inline void store(T* p, Vector x, int count) {
  if (count == kLanes) return store(p, x);
  T part[kLanes];
  store(part, x);
  for (int i = 0; i < count; ++i) p[i] = part[i];
}

// What an incoming gradient is masked with.
enum class Mask { kNone, kOutput, kRelu };

// The masked incoming gradient of one vector, see Incoming; `ahead` is (x - mean) * scale + beta, for kRelu.
template <typename T, bool kSecond, Mask kMask>
inline Vector incoming(const Incoming& dy, int64_t at, int count, Vector ahead) {
  Vector sum = load(static_cast<const T*>(dy.first) + at, count);
  if (kSecond) sum = add(sum, load(static_cast<const T*>(dy.second) + at, count));
  if (kMask == Mask::kOutput) return where_positive(load(static_cast<const T*>(dy.output) + at, count), sum);
  return kMask == Mask::kRelu ? where_positive(ahead, sum) : sum;
}

// Calls Kernel<T, kSecond, kMask>::run(arguments...) as `dy` demands.
template <template <typename, bool, Mask> class Kernel, typename T, typename... Arguments>
inline void choose(const Incoming& dy, Arguments... arguments) {
  if (dy.second) {
    if (dy.output) return Kernel<T, true, Mask::kOutput>::run(dy, arguments...);
    if (dy.relu) return Kernel<T, true, Mask::kRelu>::run(dy, arguments...);
    return Kernel<T, true, Mask::kNone>::run(dy, arguments...);
  }
  if (dy.output) return Kernel<T, false, Mask::kOutput>::run(dy, arguments...);
  if (dy.relu) return Kernel<T, false, Mask::kRelu>::run(dy, arguments...);
  return Kernel<T, false, Mask::kNone>::run(dy, arguments...);
}

constexpr int64_t kRows = 8;  // rows that are summed before the sums go back to memory

// Calls `body.run<vectors>(channel, lanes, first row, rows)` for pieces of at most kRows rows and kTile vectors.
template <typename Body>
inline void tiles(int64_t rows, int64_t channels, const Body& body) {
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t some = rows - row < kRows ? rows - row : kRows;
    int64_t c = 0;
    for (; c + kTile * kLanes <= channels; c += kTile * kLanes) body.template run<kTile>(c, kLanes, row, some);
    for (; c + kLanes <= channels; c += kLanes) body.template run<1>(c, kLanes, row, some);
    if (c < channels) body.template run<1>(c, static_cast<int>(channels - c), row, some);
  }
}

// Calls `body(channel, lanes, element)` for each vector of each row.
template <typename Body>
inline void vectors(int64_t rows, int64_t channels, const Body& body) {
  for (int64_t row = 0; row < rows; ++row) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) body(c, kLanes, row * channels + c);
    if (c < channels) body(c, static_cast<int>(channels - c), row * channels + c);
  }
}

// Two sums for each of kVectors vectors of channels, kept in registers between construction and `keep`.
template <int kVectors>
struct Sums {
  Vector first[kVectors], second[kVectors];
  float* memory;
  int64_t channels;
  int lanes;

  inline Sums(float* sums, int64_t c, int64_t channels, int lanes)
      : memory(sums + c), channels(channels), lanes(lanes) {
    for (int v = 0; v < kVectors; ++v) {
      first[v] = load(memory + v * kLanes, lanes);
      second[v] = load(memory + channels + v * kLanes, lanes);
    }
  }
  inline void keep() const {
    for (int v = 0; v < kVectors; ++v) {
      store(memory + v * kLanes, first[v], lanes);
      store(memory + channels + v * kLanes, second[v], lanes);
    }
  }
};

template <typename T>
struct Moments {
  const T* x;
  int64_t channels;
  const float* shift;
  float* sums;

  template <int kVectors>
  inline void run(int64_t c, int lanes, int64_t row, int64_t rows) const {
    Sums<kVectors> total(sums, c, channels, lanes);
    Vector by[kVectors];
    for (int v = 0; v < kVectors; ++v) by[v] = load(shift + c + v * kLanes, lanes);
    const T* at = x + row * channels + c;
    for (int64_t r = 0; r < rows; ++r, at += channels) {
      for (int v = 0; v < kVectors; ++v) {
        const Vector d = sub(load(at + v * kLanes, lanes), by[v]);
        total.first[v] = add(total.first[v], d);
        total.second[v] = muladd(d, d, total.second[v]);
      }
    }
    total.keep();
  }
};

template <typename T>
void moments(const void* x, int64_t rows, int64_t channels, const float* shift, float* sums) {
  for (int64_t c = 0; c < 2 * channels; ++c) sums[c] = 0;
  tiles(rows, channels, Moments<T>{static_cast<const T*>(x), channels, shift, sums});
}

template <typename T, bool kSide, bool kRelu>
void normalize_as(const T* x, const T* side, T* y, int64_t rows, int64_t channels, Channels with) {
  vectors(rows, channels, [=](int64_t c, int lanes, int64_t at) __attribute__((always_inline)) {
    const Vector d = sub(load(x + at, lanes), load(with.mean + c, lanes));
    Vector out = muladd(d, load(with.scale + c, lanes), load(with.beta + c, lanes));
    if (kSide) out = add(out, load(side + at, lanes));
    store(y + at, kRelu ? not_negative(out) : out, lanes);
  });
}

template <typename T>
void normalize(const void* x, const void* side, void* y, int64_t rows, int64_t channels, Channels with, bool relu) {
  const auto* from = static_cast<const T*>(x);
  const auto* plus = static_cast<const T*>(side);
  auto* to = static_cast<T*>(y);
  if (side) {
    if (relu) return normalize_as<T, true, true>(from, plus, to, rows, channels, with);
    return normalize_as<T, true, false>(from, plus, to, rows, channels, with);
  }
  if (relu) return normalize_as<T, false, true>(from, plus, to, rows, channels, with);
  return normalize_as<T, false, false>(from, plus, to, rows, channels, with);
}

template <typename T, bool kSecond, Mask kMask>
struct Reduce {
  Incoming dy;
  const T* x;
  T* masked;
  int64_t channels;
  Channels with;
  float* sums;

  static void run(const Incoming& dy, const T* x, T* masked, int64_t rows, int64_t channels, Channels with,
                  float* sums) {
    tiles(rows, channels, Reduce{dy, x, masked, channels, with, sums});
  }

  template <int kVectors>
  inline void run(int64_t c, int lanes, int64_t row, int64_t rows) const {
    Sums<kVectors> total(sums, c, channels, lanes);
    Vector mean[kVectors], scale[kVectors], beta[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      mean[v] = load(with.mean + c + v * kLanes, lanes);
      scale[v] = load(with.scale + c + v * kLanes, lanes);
      beta[v] = load(with.beta + c + v * kLanes, lanes);
    }
    for (int64_t r = row; r < row + rows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = r * channels + c + v * kLanes;
        const Vector d = sub(load(x + at, lanes), mean[v]);
        const Vector g = incoming<T, kSecond, kMask>(dy, at, lanes, muladd(d, scale[v], beta[v]));
        if (masked) store(masked + at, g, lanes);
        total.first[v] = add(total.first[v], g);
        total.second[v] = muladd(g, d, total.second[v]);
      }
    }
    total.keep();
  }
};

template <typename T>
void reduce(Incoming dy, const void* x, void* masked, int64_t rows, int64_t channels, Channels with, float* sums) {
  for (int64_t c = 0; c < 2 * channels; ++c) sums[c] = 0;
  choose<Reduce, T>(dy, static_cast<const T*>(x), static_cast<T*>(masked), rows, channels, with, sums);
}

template <typename T, bool kSecond, Mask kMask>
struct Backward {
  static void run(const Incoming& dy, const T* x, T* dx, int64_t rows, int64_t channels, Channels with,
                  Coefficients of) {
    vectors(rows, channels, [=](int64_t c, int lanes, int64_t at) __attribute__((always_inline)) {
      const Vector scale = load(with.scale + c, lanes);
      const Vector d = sub(load(x + at, lanes), load(with.mean + c, lanes));
      const Vector ahead = muladd(d, scale, load(with.beta + c, lanes));
      const Vector g = incoming<T, kSecond, kMask>(dy, at, lanes, ahead);
      const Vector straight = sub(mul(g, scale), load(of.constant + c, lanes));
      store(dx + at, negmuladd(d, load(of.slope + c, lanes), straight), lanes);
    });
  }
};

template <typename T>
void backward(Incoming dy, const void* x, void* dx, int64_t rows, int64_t channels, Channels with, Coefficients of) {
  choose<Backward, T>(dy, static_cast<const T*>(x), static_cast<T*>(dx), rows, channels, with, of);
}

void momentum(float* weight, float* velocity, const float* gradient, int64_t count, float rate, float decay,
              float momentum, bool nesterov) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    const Vector w = load(weight + i, lanes);
    const Vector change = mul(all(rate), muladd(all(decay), w, load(gradient + i, lanes)));
    const Vector v = sub(mul(all(momentum), load(velocity + i, lanes)), change);
    store(velocity + i, v, lanes);
    store(weight + i, add(w, nesterov ? sub(mul(all(momentum), v), change) : v), lanes);
  }
}

}  // namespace

const Loops JOIN(JOIN(k, ISA), Float) = {moments<float>, normalize<float>, reduce<float>, backward<float>, momentum};
const Loops JOIN(JOIN(k, ISA), Bfloat16) = {moments<uint16_t>, normalize<uint16_t>, reduce<uint16_t>,
                                            backward<uint16_t>, momentum};

}  // namespace resnet_cpu
