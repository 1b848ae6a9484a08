// What a pipeline's owner sees when the GPU has no code for it, and when the device is lost under it:
// typed errors, a dead engine that says so, and a process whose CPU engine goes on. The second costs
// the process its CUDA context, so this is an executable of its own, with the library loaded as the
// addon loads it.
#include <cuda_runtime.h>

#include <memory>
#include <string>
#include <vector>

#include "cuda_library.h"
#include "provoke.h"
#include "runtime/engine.h"
#include "test.h"
#include "tiny_checkpoint.h"

using namespace turbomind;
using namespace turbomind::test;

namespace {

struct Client {
  Client(const TinyCheckpoint& checkpoint, const std::string& device) {
    EngineOptions options;
    options.spec = checkpoint.spec;
    options.files = checkpoint.files;
    options.backend.device = device;
    options.backend.cuda_library = device == "cpu" ? "" : cuda::testing::cuda_library();
    options.backend.threads = 1;
    options.session_len = 128;
    options.max_batch_size = 4;
    options.max_prefill_token_num = 64;
    options.cache.share = 0.05;
    options.manual_stepping = true;
    engine = Engine::open(
        options,
        [this](std::vector<Event> batch) {
          for (Event& event : batch) events.push_back(std::move(event));
        },
        nullptr);
  }

  // Runs one request to its end.
  std::vector<TokenId> run(RequestId id) {
    events.clear();
    Request request;
    request.id = id;
    request.prompt_tokens = {1, 2, 3, 4, 5};
    request.max_new_tokens = 12;
    engine->submit(std::move(request));
    while (engine->step()) {
    }
    std::vector<TokenId> tokens;
    for (const Event& event : events) {
      for (const TokenEvent& token : event.tokens) tokens.push_back(token.token);
    }
    return tokens;
  }
  const Event& last() const { return events.back(); }

  std::vector<Event> events;
  std::unique_ptr<Engine> engine;
};

TEST("a GPU that this build has no code for is unsupported_device") {
  int major = 0;
  (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  if (major == 10) {
    std::printf("     not run: the device has the architecture of the kernel without code\n");
    return;
  }
  bool thrown = false;
  try {
    cuda::testing::launch_without_code();
  } catch (const Error& error) {
    thrown = true;
    EXPECT(error.code() == ErrorCode::unsupported_device);
    EXPECT(std::string(error.what()).find("kernel image") != std::string::npos);
  }
  EXPECT(thrown);
}

TEST("a lost device ends its engine with typed errors; the process and a CPU engine live on") {
  const TinyCheckpoint checkpoint(QuantMethod::awq);
  Client cpu(checkpoint, "cpu");
  Client gpu(checkpoint, "cuda:0");
  const std::vector<TokenId> on_cpu = cpu.run(1);
  EXPECT_EQ(gpu.run(1).size(), 12U);
  EXPECT(gpu.last().finish_reason == FinishReason::length);

  cuda::testing::lose_the_device();
  (void)gpu.run(2);
  EXPECT(!gpu.events.empty() && gpu.last().finish_reason == FinishReason::error);
  EXPECT(gpu.last().error_code == ErrorCode::device_error);
  (void)gpu.run(3);
  EXPECT(!gpu.events.empty() && gpu.last().error_code == ErrorCode::device_error);
  EXPECT(gpu.last().error_message.find("opened again") != std::string::npos);

  EXPECT(cpu.run(2) == on_cpu);
  gpu.engine->close();
  gpu.engine.reset();
  bool refused = false;
  try {
    Client again(checkpoint, "cuda:0");
  } catch (const Error& error) {
    refused = error.code() == ErrorCode::device_error || error.code() == ErrorCode::unsupported_device;
    std::printf("     reopening says: %s\n", error.what());
  }
  EXPECT(refused);
  EXPECT(cpu.run(3) == on_cpu);
}

}  // namespace

int main() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) skip_all("no CUDA device");
  return run_all();
}
