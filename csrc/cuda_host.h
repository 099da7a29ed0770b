// What a host function around a launch needs: errors with CUDA's text, and the tensors' device made current.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace alr {

inline void check_cuda(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed on cuda:" + std::to_string(device) + ": " +
                           cudaGetErrorString(error) + "; run `alr-kernels doctor`");
}

// Makes `device` current and restores the previous one.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : device_(device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice", device);
    if (previous_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice", device);
  }
  ~CurrentDevice() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

}  // namespace alr
