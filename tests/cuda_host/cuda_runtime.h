// CUDA's names for a host compiler: the .cu files, compiled as C++ with this folder first on the include path, run
// with one fiber per thread (cuda_host.cpp). For tests of indexing and logic; memory ordering and speed are not
// modelled.
//
// Stricter than the hardware: every lane a mask names must exist, be alive and arrive at the same line.
// Shared memory is the dynamic kind only; a static __shared__ array does not compile here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ __attribute__((weak))  // legal on an extern declaration only, which names the arena below

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_host {

enum class Kind { none, shuffle, ballot, syncwarp, syncthreads };

// What a thread waits for: the collective, who takes part, where in the source, and what it brings and gets.
struct Request {
  Kind kind = Kind::none;
  unsigned mask = 0, size = 0;
  const char* file = "";
  int line = 0, source = 0;
  bool flag = false;
  unsigned char value[16] = {}, result[16] = {};
};

struct Thread {
  dim3 index;
  int lane = 0;
  Request request;
};

extern Thread* current;  // the thread whose fiber runs

void wait();  // hands over to the scheduler; returns when every thread named by current->request has arrived
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

inline Request& ask(Kind kind, unsigned mask, const char* file, int line) {
  Request& request = current->request;
  request.kind = kind, request.mask = mask, request.file = file, request.line = line;
  return request;
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes, as in CUDA");
  Request& request = ask(Kind::shuffle, mask, file, line);
  request.size = sizeof(T), request.source = source;
  std::memcpy(request.value, &value, sizeof(T));
  wait();
  std::memcpy(&value, request.result, sizeof(T));
  return value;
}

inline unsigned ballot(unsigned mask, bool flag, const char* file, int line) {
  Request& request = ask(Kind::ballot, mask, file, line);
  request.flag = flag;
  wait();
  unsigned votes;
  std::memcpy(&votes, request.result, sizeof(votes));
  return votes;
}

}  // namespace cuda_host

#define threadIdx (cuda_host::current->index)
extern dim3 gridDim, blockDim, blockIdx;

#define CUDA_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <class T>
T __shfl_sync(unsigned mask, T value, int source, CUDA_HOST_SITE) {
  return cuda_host::shuffle(mask, value, source & 31, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, CUDA_HOST_SITE) {
  const int lane = cuda_host::current->lane, source = lane - int(delta);
  return cuda_host::shuffle(mask, value, source < 0 ? lane : source, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, CUDA_HOST_SITE) {
  const int lane = cuda_host::current->lane, source = lane + int(delta);
  return cuda_host::shuffle(mask, value, source > 31 ? lane : source, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, CUDA_HOST_SITE) {
  return cuda_host::shuffle(mask, value, (cuda_host::current->lane ^ bits) & 31, file, line);
}
inline unsigned __ballot_sync(unsigned mask, bool flag, CUDA_HOST_SITE) {
  return cuda_host::ballot(mask, flag, file, line);
}
inline bool __any_sync(unsigned mask, bool flag, CUDA_HOST_SITE) {
  return cuda_host::ballot(mask, flag, file, line) != 0;
}
inline bool __all_sync(unsigned mask, bool flag, CUDA_HOST_SITE) {
  return cuda_host::ballot(mask, flag, file, line) == mask;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_HOST_SITE) {
  cuda_host::ask(cuda_host::Kind::syncwarp, mask, file, line);
  cuda_host::wait();
}
inline void __syncthreads(CUDA_HOST_SITE) {
  cuda_host::ask(cuda_host::Kind::syncthreads, 0, file, line);
  cuda_host::wait();
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }

using cudaStream_t = struct cudaStream*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... args) {
  cuda_host::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(P(args)...); });
  return cudaSuccess;
}
