// The loops over memory, compiled once for each instruction set from loops.cc.
//
// Images are rows of channels: [batch, height, width, channels] is batch * height * width rows. Elements are float32 or
// bfloat16, everything that belongs to a channel is float32. No function allocates memory or uses threads.
#pragma once

#include <cstdint>

namespace resnet_cpu {

// What a row is normalised with: y = (x - mean) * scale + beta, for each channel.
struct Channels {
  const float* mean;
  const float* scale;  // gamma / sqrt(variance + epsilon)
  const float* beta;
};

// The incoming gradient of an output, and what it is masked with.
struct Incoming {
  const void* first;
  const void* second;  // of the output's other copy, which is added; may be null
  const void* output;  // of forward: the gradient is zero where it is not positive; may be null
  bool relu;           // without `output`: zero where (x - mean) * scale + beta is not positive
};

// Coefficients for each channel of dx = dy * scale - constant - (x - mean) * slope.
struct Coefficients {
  const float* constant;
  const float* slope;
};

struct Loops {
  // sums[c] = sum of x - shift, sums[channels + c] = sum of (x - shift)^2.
  void (*moments)(const void* x, int64_t rows, int64_t channels, const float* shift, float* sums);
  // y = relu((x - mean) * scale + beta + side); `side` may be null. NaN stays NaN.
  void (*normalize)(const void* x, const void* side, void* y, int64_t rows, int64_t channels, Channels with, bool relu);
  // sums[c] = sum of dy, sums[channels + c] = sum of dy * (x - mean), where dy is the masked incoming gradient. It is
  // also written to `masked` unless that is null; `masked` may be the memory of `first` or `second`.
  void (*reduce)(Incoming dy, const void* x, void* masked, int64_t rows, int64_t channels, Channels with, float* sums);
  // dx as in Coefficients, from the masked incoming gradient; `dx` may be the memory of `first` or `second`.
  void (*backward)(Incoming dy, const void* x, void* dx, int64_t rows, int64_t channels, Channels with,
                   Coefficients of);
  // velocity = momentum * velocity - rate * (gradient + decay * weight), then weight += velocity, or with Nesterov
  // momentum weight += momentum * velocity - rate * (gradient + decay * weight). All float32.
  void (*momentum)(float* weight, float* velocity, const float* gradient, int64_t count, float rate, float decay,
                   float momentum, bool nesterov);
};

// For AVX2 with FMA, for AVX-512 (F, BW, DQ, VL) and for the same with its bfloat16 instructions.
extern const Loops kAvx2Float, kAvx2Bfloat16;
extern const Loops kAvx512Float, kAvx512Bfloat16;
extern const Loops kAvx512Bf16Float, kAvx512Bf16Bfloat16;

}  // namespace resnet_cpu
