// The shared library through its C border, as the addon uses it: errors come over as errors, an
// exception of the forward comes back whole, and the work is the same.
#include "backend/cuda_loader.h"

#include "cuda_library.h"
#include "small_decoder.h"

namespace {

using namespace turbomind;
using namespace turbomind::cuda::testing;

const CudaLoadOptions kOptions{.library = cuda_library()};

TEST("a missing library and a missing device are unsupported_device with the reason") {
  EXPECT_ERROR(load_cuda_backend({.library = "/nonexistent/libturbomind_cuda.so"}), ErrorCode::unsupported_device);
  EXPECT_ERROR(load_cuda_backend({.library = ""}), ErrorCode::unsupported_device);
  EXPECT_ERROR(load_cuda_backend({.library = cuda_library(), .device = 99}), ErrorCode::unsupported_device);
  EXPECT_ERROR(parse_cuda_device("cuda:x"), ErrorCode::unsupported_device);
  EXPECT_EQ(parse_cuda_device("cuda:3"), 3);
  EXPECT(query_cuda(cuda_library(), 0).num_devices > 0);
  EXPECT_EQ(query_cuda("/nonexistent", 0).num_devices, 0);
}

TEST("errors of the library arrive as Error with their code") {
  const auto backend = load_cuda_backend(kOptions);
  EXPECT_ERROR(backend->allocate(size_t{1} << 45), ErrorCode::out_of_memory);
  EXPECT_ERROR(backend->make_kv_cache({1, 1, 64, 16, 4}), ErrorCode::invalid_argument);
  EXPECT(backend->info().total_bytes > 0);
}

TEST("what the forward throws comes out of execute, and later steps work") {
  const auto backend = load_cuda_backend(kOptions);
  SmallDecoder decoder(*backend, {});
  auto sequence = decoder.make_sequence({1, 2, 3});
  decoder.step({&sequence}, {3});
  decoder.step({&sequence}, {1});
  bool thrown = false;
  try {
    backend->execute([] { throw std::runtime_error("mine"); });
  } catch (const std::runtime_error& error) {
    thrown = std::string(error.what()) == "mine";
  }
  EXPECT(thrown);
  decoder.step({&sequence}, {1});
  EXPECT_EQ(sequence.tokens.size(), 6U);
}

}  // namespace

int main() {
  require_device();
  return turbomind::test::run_all();
}
