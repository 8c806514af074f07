// Blocks of work over a few threads: dynamic, interruptible, and the first exception reaches the caller.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace influence_fast {

// Called on the calling thread between its blocks; true stops all threads (Ctrl-C).
using Poll = std::function<bool()>;

// Runs work(block, thread) for every block in [0, blocks); returns false if `poll` stopped it. Threads are started
// per call: about 20 us each, against milliseconds of work, and nothing is left behind for a fork to trip over.
inline bool parallel_blocks(int64_t blocks, int threads, const std::function<void(int64_t, int)>& work,
                            const Poll& poll) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  std::exception_ptr error;
  std::mutex error_lock;
  bool interrupted = false;
  const auto run = [&](int thread) {
    try {
      while (!stop.load(std::memory_order_relaxed)) {
        const int64_t block = next.fetch_add(1);
        if (block >= blocks) break;
        work(block, thread);
        if (thread == 0 && poll && poll()) {
          interrupted = true;
          stop = true;
        }
      }
    } catch (...) {
      const std::lock_guard<std::mutex> hold(error_lock);
      if (!error) error = std::current_exception();
      stop = true;
    }
  };
  if (threads > blocks) threads = static_cast<int>(blocks);
  std::vector<std::thread> others;
  try {
    for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
  } catch (const std::exception&) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  run(0);
  for (auto& thread : others) thread.join();
  if (error) std::rethrow_exception(error);
  return !interrupted;
}

}  // namespace influence_fast
