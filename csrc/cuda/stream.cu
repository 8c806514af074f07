#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "../parallel.h"
#include "check.h"
#include "plan.h"
#include "score.h"

namespace influence_fast::cuda {
namespace {

constexpr int64_t kCopyBytes = 1 << 20;  // copied by a thread at a time

// One of the two ways from the host to the device: a pinned buffer, a device buffer, a stream.
struct Slot {
  char* host = nullptr;            // chunk rows, then chunk scales
  char* device = nullptr;
  cudaStream_t stream = nullptr;
  cudaEvent_t copied = nullptr;    // the pinned buffer may be filled again
  cudaEvent_t done = nullptr;      // the outputs are written
};

// Rows into a pinned buffer: `bytes` each, from one stride to another. A page that is not in memory is read here.
void copy_rows(const char* from, int64_t from_stride, char* to, int64_t to_stride, int64_t bytes, int64_t rows,
               int threads) {
  const int64_t block = std::max<int64_t>(1, kCopyBytes / to_stride);
  parallel_blocks((rows + block - 1) / block, threads, [&](int64_t b, int) {
    for (int64_t i = b * block; i < std::min(rows, (b + 1) * block); ++i)
      std::memcpy(to + i * to_stride, from + i * from_stride, static_cast<size_t>(bytes));
  }, nullptr);
}

}  // namespace

struct Stream::State {
  int device = 0;
  int64_t chunk = 0, row_bytes = 0, stride = 0;
  Slot slot[2];
  int next = 0;
  cudaEvent_t ready = nullptr;  // what the caller's stream had queued before a push

  int64_t bytes() const { return chunk * (stride + 4); }

  void begin() {
    const OnDevice guard(device);
    check(cudaEventCreateWithFlags(&ready, cudaEventDisableTiming), "cudaEventCreate");
    for (Slot& s : slot) {
      check(cudaHostAlloc(reinterpret_cast<void**>(&s.host), static_cast<size_t>(bytes()), cudaHostAllocDefault),
            "pinned memory");
      check(cudaMalloc(reinterpret_cast<void**>(&s.device), static_cast<size_t>(bytes())), "device memory");
      check(cudaStreamCreateWithFlags(&s.stream, cudaStreamNonBlocking), "cudaStreamCreate");
      check(cudaEventCreateWithFlags(&s.copied, cudaEventDisableTiming), "cudaEventCreate");
      check(cudaEventCreateWithFlags(&s.done, cudaEventDisableTiming), "cudaEventCreate");
    }
  }

  void release() noexcept {  // of what begin() got hold of; errors of a dead context are nobody's to mend here
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device);
    for (Slot& s : slot) {
      if (s.stream) cudaStreamSynchronize(s.stream), cudaStreamDestroy(s.stream);
      if (s.copied) cudaEventDestroy(s.copied);
      if (s.done) cudaEventDestroy(s.done);
      if (s.device) cudaFree(s.device);
      if (s.host) cudaFreeHost(s.host);
    }
    if (ready) cudaEventDestroy(ready);
    cudaSetDevice(before);
    cudaGetLastError();
  }

  void wait() {
    for (Slot& s : slot) check(cudaStreamSynchronize(s.stream), "cudaStreamSynchronize");
  }
};

Stream::Stream(int device, int64_t chunk, int64_t k_bytes) : state_(new State) {
  state_->device = device;
  state_->chunk = round_up(std::max<int64_t>(chunk, 1), kTileRows);
  state_->row_bytes = k_bytes;
  state_->stride = padded_row(k_bytes);
  try {
    state_->begin();
  } catch (...) {
    state_->release();
    delete state_;
    throw;
  }
}

Stream::~Stream() {
  state_->release();
  delete state_;
}

bool Stream::push(const Queries& queries, const Rows& rows, const Outputs& out, int threads, uintptr_t stream,
                  const std::function<bool()>& stop) {
  State& state = *state_;
  const OnDevice guard(state.device);
  const auto callers = reinterpret_cast<cudaStream_t>(stream);
  check(cudaEventRecord(state.ready, callers), "cudaEventRecord");
  for (int64_t first = 0; first < rows.count; first += state.chunk) {
    Slot& s = state.slot[state.next];
    state.next ^= 1;
    const int64_t n = std::min(state.chunk, rows.count - first);
    check(cudaEventSynchronize(s.copied), "cudaEventSynchronize");
    const auto* from = static_cast<const char*>(rows.data) + first * rows.stride;
    copy_rows(from, rows.stride, s.host, state.stride, state.row_bytes, n, threads);
    const int64_t scales_at = state.chunk * state.stride;
    check(cudaMemcpyAsync(s.device, s.host, static_cast<size_t>(n * state.stride), cudaMemcpyHostToDevice, s.stream),
          "cudaMemcpyAsync");
    if (rows.scales) {
      std::memcpy(s.host + scales_at, rows.scales + first, static_cast<size_t>(n * 4));
      check(cudaMemcpyAsync(s.device + scales_at, s.host + scales_at, static_cast<size_t>(n * 4),
                            cudaMemcpyHostToDevice, s.stream),
            "cudaMemcpyAsync");
    }
    check(cudaEventRecord(s.copied, s.stream), "cudaEventRecord");
    // The copy need not wait for the caller's stream, the outputs must.
    check(cudaStreamWaitEvent(s.stream, state.ready, 0), "cudaStreamWaitEvent");
    const Rows there{s.device, n, state.stride,
                     rows.scales ? reinterpret_cast<const float*>(s.device + scales_at) : nullptr};
    Outputs to = out;
    if (to.scores) to.scores += first * to.scores_stride;
    if (to.columns) to.columns += first;
    if (to.group_sums) to.group_sums += first * to.group_stride;
    if (to.bad) to.bad += first;
    if (to.row_factor) to.row_factor += first;
    score(state.device, queries, there, to, reinterpret_cast<uintptr_t>(s.stream));
    check(cudaEventRecord(s.done, s.stream), "cudaEventRecord");
    check(cudaStreamWaitEvent(callers, s.done, 0), "cudaStreamWaitEvent");
    if (stop && stop()) {
      state.wait();
      return false;
    }
  }
  return true;
}

void Stream::finish() {
  const OnDevice guard(state_->device);
  state_->wait();
}

}  // namespace influence_fast::cuda
