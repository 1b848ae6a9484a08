// What kernel tests share: device arrays, seeded random data in 16-bit types, error measures, and
// the SKIP without a device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "backend/cuda/cuda_check.h"
#include "test.h"

namespace turbomind::cuda::testing {

inline void require_device() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    turbomind::test::skip_all("no CUDA device");
  }
}

// Device memory of `count` T, poisoned with 0xff bytes (NaN in every float type), so that an
// element nobody wrote is seen.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    cuda_check(cudaMalloc(&data_, std::max<size_t>(1, count) * sizeof(T)));
    poison();
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    cuda_check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { (void)cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  void poison() { fill(0xff); }
  void zero() { fill(0); }
  T* get() const { return static_cast<T*>(data_); }
  size_t size() const { return count_; }
  std::vector<T> host() const {
    std::vector<T> values(count_);
    cuda_check(cudaDeviceSynchronize(), "the kernel under test");
    cuda_check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  // Waits: a fill on the default stream is in no order with the streams that tests launch on.
  void fill(int byte) {
    cuda_check(cudaMemset(data_, byte, count_ * sizeof(T)));
    cuda_check(cudaStreamSynchronize(nullptr));
  }

  void* data_ = nullptr;
  size_t count_;
};

inline LaunchContext test_context(bool programmatic = true) {
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, 0));
  return {.stream = nullptr,
          .sm = properties.major * 10 + properties.minor,
          .num_sms = properties.multiProcessorCount,
          .max_shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin),
          .programmatic = programmatic && properties.major >= 9};
}

// 16-bit floats as raw bits, so that one test body serves both types.
inline uint16_t to_bits(float value, DType dtype) {
  if (dtype == DType::f16) return __half_as_ushort(__float2half_rn(value));
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
inline float from_bits(uint16_t bits, DType dtype) {
  if (dtype == DType::f16) return __half2float(__ushort_as_half(bits));
  return __bfloat162float(__ushort_as_bfloat16(bits));
}
inline std::vector<float> to_floats(const std::vector<uint16_t>& bits, DType dtype) {
  std::vector<float> values(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) values[i] = from_bits(bits[i], dtype);
  return values;
}

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  float normal(float scale = 1.0F) { return std::normal_distribution<float>(0.0F, scale)(engine_); }
  int below(int limit) { return static_cast<int>(engine_() % static_cast<uint32_t>(limit)); }
  uint32_t bits() { return static_cast<uint32_t>(engine_()); }
  std::vector<uint16_t> half(size_t count, DType dtype, float scale = 1.0F) {
    std::vector<uint16_t> values(count);
    for (uint16_t& value : values) value = to_bits(normal(scale), dtype);
    return values;
  }
  std::vector<float> floats(size_t count, float scale = 1.0F, float mean = 0.0F) {
    std::vector<float> values(count);
    for (float& value : values) value = mean + normal(scale);
    return values;
  }

 private:
  std::mt19937 engine_;
};

// ||out - ref|| / ||ref||; NaN (an unwritten element) gives NaN, which no bound accepts.
inline double relative_error(const std::vector<float>& out, const std::vector<double>& ref) {
  double difference = 0;
  double norm = 0;
  for (size_t i = 0; i < ref.size(); ++i) {
    difference += (out[i] - ref[i]) * (out[i] - ref[i]);
    norm += ref[i] * ref[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

// Tolerances, relative: f32 outputs carry only accumulation error (about sqrt(K) * 2^-24); 16-bit
// outputs one rounding of at most 2^-9 (bf16) or 2^-12 (f16), about a third of it in the mean;
// attention rounds probabilities too.
inline constexpr double kToleranceF32 = 2e-5;
inline double tolerance_rounded(DType dtype) { return dtype == DType::bf16 ? 3e-3 : 5e-4; }

}  // namespace turbomind::cuda::testing
