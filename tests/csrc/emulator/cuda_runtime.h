// A CPU in the place of a GPU: enough of CUDA's device language and run time to run csrc/cuda's kernels in a test, where no
// GPU is. A thread is a fiber with a stack of its own; the fibers of a block take turns on one core and switch where
// CUDA's threads would wait for one another (__syncthreads, __syncwarp, shuffles and votes). Blocks run one after another.
// It shows wrong indices, missed barriers that change a result, and wrong arithmetic; not races, nor speed. x86-64 only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <vector>

#define HERMESFLOW_EMULATED 1
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
// One block runs at a time, so a block's shared memory may be static. It holds what the last block left, as on a GPU.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim, gridDim;

#if !defined(__x86_64__)
#error "the emulator of CUDA switches fibers in x86-64 assembly"
#endif

// Saves the registers that a call keeps on one stack and restores them from another.
asm(R"(
.text
.globl hermesflow_switch_fiber
.type hermesflow_switch_fiber, @function
hermesflow_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hermesflow_switch_fiber, .-hermesflow_switch_fiber
)");

extern "C" void hermesflow_switch_fiber(void** from, void* to);

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 thread{0, 0, 0};
  bool finished = false;
};

struct Barrier {
  int waiting = 0;
  unsigned generation = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  Barrier barrier;
  std::vector<Barrier> warp_barriers;
  std::vector<uint64_t> exchange;  // a slot a thread, for shuffles and votes
  std::vector<bool> present;
  int votes = 0;
  std::function<void()> body;
  void* scheduler = nullptr;
  size_t current = 0;
  unsigned long idle_turns = 0;

  int live(size_t begin, size_t end) const {
    int count = 0;
    for (size_t i = begin; i < std::min(end, fibers.size()); ++i) count += !fibers[i].finished;
    return count;
  }
};

inline Block* block = nullptr;

inline void yield() {
  Block& b = *block;
  hermesflow_switch_fiber(&b.fibers[b.current].stack_pointer, b.scheduler);
}

// Waits until all live fibers in [begin, end) have come.
inline void wait(Barrier& barrier, size_t begin, size_t end) {
  const unsigned generation = barrier.generation;
  ++barrier.waiting;
  while (barrier.generation == generation) {
    if (barrier.waiting >= block->live(begin, end)) {
      barrier.waiting = 0;
      ++barrier.generation;
      block->idle_turns = 0;
      return;
    }
    if (++block->idle_turns > 1000ul * block->fibers.size() + 100000ul) {
      std::fprintf(stderr, "emulated CUDA: block (%u, %u) waits for ever: threads diverged before a barrier\n", blockIdx.x,
                   blockIdx.y);
      std::abort();
    }
    yield();
  }
}

inline size_t warp_begin() { return block->current / kWarp * kWarp; }
inline void wait_warp() {
  const size_t begin = warp_begin();
  wait(block->warp_barriers[begin / kWarp], begin, begin + kWarp);
}

template <typename T>
T exchange(T value, int source_lane, bool in_range) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const size_t begin = warp_begin();
  std::memcpy(&block->exchange[block->current], &value, sizeof value);
  wait_warp();
  T result = value;
  if (in_range && begin + source_lane < block->fibers.size()) std::memcpy(&result, &block->exchange[begin + source_lane], sizeof result);
  wait_warp();
  return result;
}

inline void enter_fiber() {
  Block& b = *block;
  b.body();
  b.fibers[b.current].finished = true;
  b.idle_turns = 0;
  yield();
  std::abort();
}

inline void run_block(const std::function<void()>& body, size_t num_threads) {
  static Block b;  // stacks are kept from block to block
  block = &b;
  while (b.fibers.size() < num_threads) b.fibers.emplace_back();
  b.fibers.resize(num_threads);
  b.barrier = Barrier();
  b.warp_barriers.assign((num_threads + kWarp - 1) / kWarp, Barrier());
  b.exchange.assign(num_threads, 0);
  b.body = body;
  b.idle_turns = 0;
  for (size_t i = 0; i < num_threads; ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.finished = false;
    fiber.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    // A fresh stack as hermesflow_switch_fiber leaves one: six saved registers, then the address to return to.
    auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t{15};
    void** frame = reinterpret_cast<void**>(top - 64);
    for (int r = 0; r < 6; ++r) frame[r] = nullptr;
    frame[6] = reinterpret_cast<void*>(&enter_fiber);
    frame[7] = nullptr;
    fiber.stack_pointer = frame;
  }
  while (b.live(0, num_threads) > 0) {
    for (size_t i = 0; i < num_threads; ++i) {
      if (b.fibers[i].finished) continue;
      b.current = i;
      threadIdx = b.fibers[i].thread;
      hermesflow_switch_fiber(&b.scheduler, b.fibers[i].stack_pointer);
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block->barrier, 0, emulator::block->fibers.size()); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::wait_warp(); }
inline void __threadfence() {}

inline int emulated_lane() { return static_cast<int>(emulator::block->current % emulator::kWarp); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) { return emulator::exchange(value, lane & 31, true); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) { return emulator::exchange(value, emulated_lane() ^ mask, true); }
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const int source = emulated_lane() - static_cast<int>(delta);
  return emulator::exchange(value, source < 0 ? 0 : source, source >= 0);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const unsigned bit = predicate ? 1u << emulated_lane() : 0u;
  unsigned votes = bit;
  for (int mask = 1; mask < 32; mask *= 2) {
    const int source = emulated_lane() ^ mask;
    const bool there = emulator::warp_begin() + source < emulator::block->fibers.size();
    const unsigned other = emulator::exchange(votes, source, there);
    if (there) votes |= other;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __syncthreads_or(int predicate) {
  static int votes;
  __syncthreads();
  votes = 0;
  __syncthreads();
  votes |= predicate != 0;
  __syncthreads();
  const int result = votes;
  __syncthreads();
  return result;
}

template <typename T>
T atomicAdd(T* address, T value) { const T old = *address; *address += value; return old; }

inline uint32_t __float_as_uint(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __uint_as_float(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
using std::isfinite;
using std::isnan;
using std::max;
using std::min;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid configuration"; }
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
template <typename T>
cudaError_t cudaMalloc(T** memory, size_t bytes) { *memory = static_cast<T*>(std::malloc(bytes)); return cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  const dim3 grid = config->gridDim, size = config->blockDim;
  const bool fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x < (1u << 31) && grid.y < 65536 && grid.z < 65536 &&
                    size.x * size.y * size.z > 0 && size.x * size.y * size.z <= 1024;
  if (!fits) return cudaErrorInvalidConfiguration;
  const std::tuple<Params...> parameters(static_cast<Params>(args)...);
  gridDim = grid;
  blockDim = size;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        emulator::run_block([&] { std::apply(kernel, parameters); }, size_t{size.x} * size.y * size.z);
      }
  return cudaSuccess;
}
