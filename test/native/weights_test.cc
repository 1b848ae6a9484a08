// Files made by hand, most of them broken: each must be a typed error that names the culprit.
#include "io/weights.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <limits>

#include "temporary_folder.h"
#include "test.h"

using namespace turbomind;
using turbomind::test::TemporaryFolder;

namespace {

template <class T>
std::vector<char> bytes_of(const std::vector<T>& values, size_t padding = 0) {
  std::vector<char> bytes(padding + values.size() * sizeof(T));
  std::memcpy(bytes.data() + padding, values.data(), values.size() * sizeof(T));
  return bytes;
}

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// 1,024 floats 0, 1, 2, … in one file.
struct CountingFile {
  TemporaryFolder folder;
  std::vector<float> values = std::vector<float>(1024);
  std::string path;
  explicit CountingFile(size_t padding = 0) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
    path = folder.write("model.safetensors", bytes_of(values, padding));
  }
};

}  // namespace

TEST("a tensor is found by name with its dtype, shape and bytes") {
  CountingFile file;
  const WeightStore store(
      {{file.path}, {{"a", DType::f32, {2, 3}, 0, 8, 24}, {"b", DType::f32, {}, 0, 0, 4}}});
  const ConstTensorView a = store.view("a", {2, 3});
  EXPECT_EQ(a.rank, 2);
  EXPECT_EQ(a.bytes(), size_t{24});
  EXPECT_EQ(a.as<float>()[0], 2.0F);
  EXPECT_EQ(a.as<float>()[5], 7.0F);
  EXPECT_EQ(store.view("b").elements(), int64_t{1});
  EXPECT(store.has("a") && !store.has("c"));
  EXPECT_EQ(store.total_bytes(), size_t{28});
}

TEST("a tensor may end at the last byte of its file and not one byte later") {
  CountingFile file;
  const WeightStore store({{file.path}, {{"a", DType::f32, {4}, 0, 4080, 16}}});
  EXPECT_EQ(store.view("a").as<float>()[3], 1023.0F);
  EXPECT_ERROR(WeightStore({{file.path}, {{"a", DType::f32, {4}, 0, 4081, 16}}}),
               ErrorCode::invalid_checkpoint);
  EXPECT_ERROR(WeightStore({{file.path}, {{"a", DType::f32, {1025}, 0, 0, 4100}}}),
               ErrorCode::invalid_checkpoint);
}

TEST("offsets and shapes that overflow 64 bits are refused") {
  CountingFile file;
  const uint64_t top = std::numeric_limits<uint64_t>::max();
  EXPECT_ERROR(WeightStore({{file.path}, {{"a", DType::f32, {4}, 0, top - 7, 16}}}),
               ErrorCode::invalid_checkpoint);
  const int64_t half = int64_t{1} << 32;
  EXPECT_ERROR(WeightStore({{file.path}, {{"a", DType::f32, {half, half, 4}, 0, 0, 0}}}),
               ErrorCode::invalid_checkpoint);
  EXPECT_ERROR(WeightStore({{file.path}, {{"a", DType::f32, {-1, -4}, 0, 0, 16}}}),
               ErrorCode::invalid_checkpoint);
}

TEST("bytes that contradict the shape are refused with both numbers") {
  CountingFile file;
  const std::string message = message_of([&] {
    WeightStore store({{file.path}, {{"layers.0.mlp.up.weight", DType::bf16, {4, 4}, 0, 0, 64}}});
  });
  EXPECT(contains(message, "layers.0.mlp.up.weight") && contains(message, "32") &&
         contains(message, "64"));
}

TEST("a name given twice, a rank of five and a file index out of range are refused") {
  CountingFile file;
  const TensorEntry a{"a", DType::f32, {4}, 0, 0, 16};
  EXPECT_ERROR(WeightStore({{file.path}, {a, a}}), ErrorCode::invalid_checkpoint);
  EXPECT_ERROR(WeightStore({{file.path}, {{"a", DType::f32, {1, 1, 1, 1, 4}, 0, 0, 16}}}),
               ErrorCode::invalid_checkpoint);
  EXPECT_ERROR(WeightStore({{file.path}, {{"a", DType::f32, {4}, 1, 0, 16}}}),
               ErrorCode::invalid_checkpoint);
  EXPECT_ERROR(WeightStore({{file.path}, {{"a", DType::f32, {4}, -1, 0, 16}}}),
               ErrorCode::invalid_checkpoint);
}

TEST("files that are missing, empty, folders or pipes are refused by name") {
  TemporaryFolder folder;
  const std::string empty = folder.write("empty.safetensors", {});
  const std::string pipe = folder.path("pipe.safetensors");
  EXPECT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  for (const std::string& path :
       {folder.path("none.safetensors"), empty, std::string("/tmp"), pipe}) {
    const CheckpointFiles files{{path}, {{"a", DType::f32, {1}, 0, 0, 4}}};
    EXPECT_ERROR(WeightStore(files), ErrorCode::invalid_checkpoint);
    EXPECT(contains(message_of([&] { WeightStore store(files); }), path));
  }
}

TEST("a missing tensor is named together with the files that were searched") {
  CountingFile file;
  const WeightStore store({{file.path}, {{"a", DType::f32, {4}, 0, 0, 16}}});
  EXPECT_ERROR(store.view("layers.3.attn.q.weight"), ErrorCode::missing_tensor);
  const std::string message = message_of([&] { store.view("layers.3.attn.q.weight"); });
  EXPECT(contains(message, "layers.3.attn.q.weight") && contains(message, file.path));
}

TEST("a wrong shape is refused with both shapes and the file") {
  CountingFile file;
  const WeightStore store({{file.path}, {{"norm.weight", DType::f32, {2, 3}, 0, 0, 24}}});
  EXPECT_ERROR(store.view("norm.weight", {3, 2}), ErrorCode::tensor_mismatch);
  EXPECT_ERROR(store.view("norm.weight", {6}), ErrorCode::tensor_mismatch);
  const std::string message = message_of([&] { store.view("norm.weight", {3, 2}); });
  EXPECT(contains(message, "norm.weight") && contains(message, "[2, 3]") &&
         contains(message, "[3, 2]") && contains(message, "model.safetensors"));
}

TEST("a tensor at an odd offset is read from an aligned copy that survives dropped pages") {
  CountingFile file(3);
  const WeightStore store({{file.path}, {{"a", DType::f32, {1024}, 0, 3, 4096}}});
  const ConstTensorView a = store.view("a");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(a.data) % alignof(float), uintptr_t{0});
  EXPECT_EQ(std::memcmp(a.data, file.values.data(), 4096), 0);
  WeightStore::drop_pages(a);
  EXPECT_EQ(std::memcmp(a.data, file.values.data(), 4096), 0);
  EXPECT(store.view("a").data == a.data);
}

TEST("dropped and prefetched pages read the same") {
  TemporaryFolder folder;
  std::vector<int32_t> values(1 << 18);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int32_t>(i * 2654435761U);
  const std::string path = folder.write("model.safetensors", bytes_of(values));
  const WeightStore store({{path}, {{"a", DType::i32, {1 << 16, 3}, 0, 40, 3 << 18}}});
  const ConstTensorView a = store.view("a");
  WeightStore::prefetch(a);
  WeightStore::drop_pages(a);
  EXPECT_EQ(std::memcmp(a.data, values.data() + 10, a.bytes()), 0);
}

TEST("a file that shrinks after it was opened is an error, not a fault") {
  CountingFile file;
  const WeightStore store(
      {{file.path}, {{"a", DType::f32, {512}, 0, 2048, 2048}, {"b", DType::f32, {4}, 0, 0, 16}}});
  EXPECT_EQ(truncate(file.path.c_str(), 2048), 0);
  EXPECT_ERROR(store.view("a"), ErrorCode::invalid_checkpoint);
  EXPECT_EQ(store.view("b").as<float>()[3], 3.0F);
}

TEST("an empty tensor is a view of no bytes") {
  CountingFile file;
  const WeightStore store({{file.path}, {{"a", DType::f32, {0, 7}, 0, 4096, 0}}});
  EXPECT_EQ(store.view("a").bytes(), size_t{0});
}

TEST_MAIN()
