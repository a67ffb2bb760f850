"""Launchers of the C++ and CUDA kernels: allocate, pass pointers, turn a bad value into an error."""
