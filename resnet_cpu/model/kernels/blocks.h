// Work in blocks of rows, by several threads: which block is done by which thread does not change a result.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace resnet_cpu {

// Blocks of rows that do not depend on the number of threads, so that sums do not depend on it either.
struct Blocks {
  int64_t rows, size, count;

  Blocks(int64_t rows, int64_t channels) : rows(rows) {
    constexpr int64_t kElements = 32768, kLeast = 64;  // kLeast: else adding up the blocks' sums takes too long
    size = std::max(kElements / std::max<int64_t>(channels, 1), kLeast);
    count = (rows + size - 1) / size;
  }
  int64_t first(int64_t block) const { return block * size; }
  int64_t length(int64_t block) const { return std::min(size, rows - block * size); }
};

// Calls body(0) ... body(count - 1), each once, on this thread and on `threads` - 1 others, on which `schedule` starts
// the function that it is given. A thread takes the next block when it has finished one; this one waits for blocks only,
// not for threads that start too late.
template <typename Schedule>
void for_blocks(int64_t threads, const Schedule& schedule, int64_t count, const std::function<void(int64_t)>& body) {
  const int64_t helpers = std::min(threads, count) - 1;
  if (helpers <= 0) {
    for (int64_t block = 0; block < count; ++block) body(block);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t finished = 0;
    std::mutex mutex;
    std::condition_variable changed;
  };
  auto shared = std::make_shared<Shared>();
  const auto work = [shared, count, &body] {
    int64_t done = 0;
    for (int64_t block; (block = shared->next.fetch_add(1)) < count; ++done) body(block);
    if (done == 0) return;
    std::lock_guard<std::mutex> lock(shared->mutex);
    shared->finished += done;
    if (shared->finished == count) shared->changed.notify_all();
  };
  for (int64_t i = 0; i < helpers; ++i) schedule(work);
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->changed.wait(lock, [&] { return shared->finished == count; });
}

// Adds up the two sums per channel of all blocks, in the order of the blocks.
inline void add_up(const float* sums, int64_t blocks, int64_t channels, std::vector<double>* total) {
  total->assign(2 * channels, 0.0);
  for (int64_t block = 0; block < blocks; ++block) {
    const float* of_block = sums + block * 2 * channels;
    for (int64_t c = 0; c < 2 * channels; ++c) (*total)[c] += of_block[c];
  }
}

}  // namespace resnet_cpu
