// Stands for the CUDA runtime where the host half of a .cu file calls it: a launch goes to a callback, with its
// kernel's name, its configuration and the addresses of its arguments. Everything else is what a launch needs.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace {

using Callback = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared, void** args);
Callback callback = nullptr;
cudaError_t last = cudaSuccess;

std::map<const void*, std::string>& kernels() {  // a function's: static initialisers fill it
  static std::map<const void*, std::string> names;
  return names;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void ptx_set_callback(Callback f) { callback = f; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[host] = name;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
  const unsigned grid[] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  const unsigned block[] = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  const auto found = kernels().find(kernel);
  const char* name = found == kernels().end() ? "" : found->second.c_str();
  return last = cudaError_t(callback(name, grid, block, config->dynamicSmemBytes, args));
}

// what a kernel's host stub refers to; a launch by <<<>>> is not supported
cudaError_t __cudaGetKernel(void**, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "refused by the execution on a CPU";
}
}
