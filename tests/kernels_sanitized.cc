// The loops and threads of resnet_cpu/model/kernels without TensorFlow, to be run under a sanitizer of the compiler:
//
//   cd resnet_cpu/model/kernels
//   for kind in address,undefined thread; do
//     g++ -std=c++17 -O1 -g -fsanitize=$kind -fno-sanitize-recover=all -mavx2 -mfma -ffp-contract=off -DISA=Avx2 \
//       -I. loops.cc ../../../tests/kernels_sanitized.cc -o /tmp/sanitized -lpthread && /tmp/sanitized
//   done
//
// Buffers have exactly the size that is needed, each on the heap: one element too far is reported. Four threads share
// the blocks of a batch norm, forward and backward, as ops.cc does it; the results must be those of one thread.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "blocks.h"
#include "loops.h"

using namespace resnet_cpu;

template <typename T>
std::unique_ptr<T[]> buffer(int64_t size, int step) {
  std::unique_ptr<T[]> made(new T[size]);
  for (int64_t i = 0; i < size; ++i) {
    const float value = static_cast<float>(i * step % 13) - 6.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (sizeof(T) == sizeof value) {
      std::memcpy(&made[i], &value, sizeof value);
    } else {
      made[i] = static_cast<T>(bits >> 16);  // bfloat16
    }
  }
  return made;
}

// Every loop on buffers of every alignment of channels to vectors. Returns the number of calls.
template <typename T>
int edges(const Loops& loops) {
  int calls = 0;
  for (int64_t channels : {1, 2, 3, 7, 8, 9, 13, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 67, 100, 129, 512}) {
    for (int64_t rows : {1, 2, 7, 8, 9, 16, 17, 40}) {
      const int64_t size = rows * channels;
      auto x = buffer<T>(size, 7), side = buffer<T>(size, 5), y = buffer<T>(size, 3), dx = buffer<T>(size, 2);
      auto first = buffer<T>(size, 11), second = buffer<T>(size, 9);
      auto mean = buffer<float>(channels, 1), scale = buffer<float>(channels, 2), beta = buffer<float>(channels, 3);
      auto sums = buffer<float>(2 * channels, 1);
      const Channels with{mean.get(), scale.get(), beta.get()};
      const Coefficients of{scale.get(), beta.get()};
      loops.moments(x.get(), rows, channels, mean.get(), sums.get());
      for (bool relu : {false, true}) {
        for (T* shortcut : {static_cast<T*>(nullptr), side.get()}) {
          loops.normalize(x.get(), shortcut, y.get(), rows, channels, with, relu);
        }
        for (T* other : {static_cast<T*>(nullptr), second.get()}) {
          for (T* output : {static_cast<T*>(nullptr), y.get()}) {
            for (T* masked : {static_cast<T*>(nullptr), first.get(), dx.get()}) {
              const Incoming incoming{first.get(), other, output, relu};
              loops.reduce(incoming, x.get(), masked, rows, channels, with, sums.get());
              loops.backward(incoming, x.get(), dx.get(), rows, channels, with, of);
              loops.backward(incoming, x.get(), first.get(), rows, channels, with, of);
              ++calls;
            }
          }
        }
      }
      auto weight = buffer<float>(size, 1), velocity = buffer<float>(size, 2), gradient = buffer<float>(size, 3);
      for (bool nesterov : {false, true}) {
        loops.momentum(weight.get(), velocity.get(), gradient.get(), size, 0.1f, 1e-4f, 0.9f, nesterov);
      }
    }
  }
  return calls;
}

// Batch norm forward and backward by `threads` threads. Returns y, dx and the sums of both directions.
template <typename T>
std::vector<char> whole(const Loops& loops, int64_t threads, int64_t rows, int64_t channels) {
  const int64_t size = rows * channels;
  auto x = buffer<T>(size, 7), side = buffer<T>(size, 5), y = buffer<T>(size, 3), dy = buffer<T>(size, 11);
  auto mean = buffer<float>(channels, 1), scale = buffer<float>(channels, 2), beta = buffer<float>(channels, 3);
  const Channels with{mean.get(), scale.get(), beta.get()};
  const Blocks blocks(rows, channels);
  std::vector<float> sums(2 * blocks.count * channels);
  std::vector<double> forward, backward;
  std::vector<std::thread> pool;
  const auto schedule = [&pool](const std::function<void()>& work) { pool.emplace_back(work); };
  const auto in_blocks = [&](const std::function<void(int64_t, int64_t, float*)>& body) {
    for_blocks(threads, schedule, blocks.count, [&](int64_t block) {
      body(blocks.first(block) * channels, blocks.length(block), sums.data() + block * 2 * channels);
    });
  };
  in_blocks([&](int64_t at, int64_t length, float* sum) {
    loops.moments(x.get() + at, length, channels, mean.get(), sum);
  });
  add_up(sums.data(), blocks.count, channels, &forward);
  in_blocks([&](int64_t at, int64_t length, float*) {
    loops.normalize(x.get() + at, side.get() + at, y.get() + at, length, channels, with, true);
  });
  in_blocks([&](int64_t at, int64_t length, float* sum) {
    loops.reduce({dy.get() + at, nullptr, y.get() + at, true}, x.get() + at, dy.get() + at, length, channels, with, sum);
  });
  add_up(sums.data(), blocks.count, channels, &backward);
  in_blocks([&](int64_t at, int64_t length, float*) {
    loops.backward({dy.get() + at, nullptr, nullptr, false}, x.get() + at, dy.get() + at, length, channels, with,
                   {scale.get(), beta.get()});
  });
  for (std::thread& thread : pool) thread.join();
  std::vector<char> found;
  const auto append = [&found](const void* data, size_t bytes) {
    found.insert(found.end(), static_cast<const char*>(data), static_cast<const char*>(data) + bytes);
  };
  append(y.get(), size * sizeof(T));
  append(dy.get(), size * sizeof(T));
  append(forward.data(), forward.size() * sizeof(double));
  append(backward.data(), backward.size() * sizeof(double));
  return found;
}

template <typename T>
int different(const Loops& loops) {
  int found = 0;
  for (int64_t rows : {100, 4096, 20000}) {
    for (int64_t channels : {3, 64, 200}) {
      const auto alone = whole<T>(loops, 1, rows, channels);
      for (int repetition = 0; repetition < 5; ++repetition) found += whole<T>(loops, 4, rows, channels) != alone;
    }
  }
  return found;
}

int main() {
  const int calls = edges<float>(kAvx2Float) + edges<uint16_t>(kAvx2Bfloat16);
  const int wrong = different<float>(kAvx2Float) + different<uint16_t>(kAvx2Bfloat16);
  std::printf("%d calls on exact buffers; %d results of four threads differ from those of one\n", calls, wrong);
  return wrong != 0;
}
