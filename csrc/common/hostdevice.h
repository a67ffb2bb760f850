// Functions shared by the C++ and the CUDA kernels.
#pragma once

#ifdef __CUDACC__
#define TK_HD __host__ __device__ __forceinline__
#else
#define TK_HD inline
#endif
