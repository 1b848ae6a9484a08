// Where the CUDA backend's library lies: in the build, or the unpacked bundle, that this test is part of.
#pragma once

#include <filesystem>
#include <string>

namespace turbomind::cuda::testing {

inline std::string cuda_library() {
  const std::filesystem::path test = std::filesystem::read_symlink("/proc/self/exe");
  return (test.parent_path() / "../../Release/libturbomind_cuda.so").lexically_normal().string();
}

}  // namespace turbomind::cuda::testing
