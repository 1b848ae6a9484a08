// Formats against formulas written out here: which tensors a layer needs, how it is unpacked, and
// what is refused.
#include "quant/weight_format.h"

#include <bit>
#include <cstring>

#include "models/weight_loader.h"
#include "reference_backend.h"
#include "temporary_folder.h"
#include "test.h"

using namespace turbomind;
using turbomind::test::ReferenceBackend;
using turbomind::test::ReferenceWeight;

namespace {

// A checkpoint of tensors given as raw bytes, in one file.
class HandMade {
 public:
  template <class T>
  void add(const std::string& name, DType dtype, std::vector<int64_t> shape,
           const std::vector<T>& values) {
    const uint64_t bytes = values.size() * sizeof(T);
    entries_.push_back({name, dtype, std::move(shape), 0, data_.size(), bytes});
    const size_t begin = data_.size();
    data_.resize(begin + bytes);
    std::memcpy(data_.data() + begin, values.data(), bytes);
  }
  std::unique_ptr<WeightStore> open() const {
    const std::string path = folder_.write("model.safetensors", data_);
    return std::make_unique<WeightStore>(CheckpointFiles{{path}, entries_});
  }

 private:
  test::TemporaryFolder folder_;
  std::vector<char> data_;
  std::vector<TensorEntry> entries_;
};

// Value of column n, row k; every nibble of an int32 is another one.
int quantised(int64_t k, int64_t n) { return static_cast<int>((k * 7 + n * 5 + n / 8) % 16); }
int zero_point(int64_t group, int64_t n) { return static_cast<int>((group * 3 + n * 11) % 16); }
float scale_of(int64_t group, int64_t n) { return 0.25F * static_cast<float>(1 + (group + n) % 9); }

// AutoAWQ's packing, from its description: int32 j of a row holds columns 8j..8j+7, from the lowest
// bits up 0, 2, 4, 6, 1, 3, 5, 7.
std::vector<uint32_t> pack(int64_t rows, int64_t columns, int (*value)(int64_t, int64_t)) {
  std::vector<uint32_t> packed;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns / 8; ++j) {
      uint32_t word = 0;
      int place = 0;
      for (int column : {0, 2, 4, 6, 1, 3, 5, 7}) {
        word |= static_cast<uint32_t>(value(r, 8 * j + column)) << (4 * place++);
      }
      packed.push_back(word);
    }
  }
  return packed;
}

void add_awq(HandMade& file, const std::string& prefix, int64_t n, int64_t k, int64_t group) {
  std::vector<float> scales;
  for (int64_t g = 0; g < k / group; ++g) {
    for (int64_t i = 0; i < n; ++i) scales.push_back(scale_of(g, i));
  }
  file.add(prefix + ".qweight", DType::i32, {k, n / 8}, pack(k, n, quantised));
  file.add(prefix + ".qzeros", DType::i32, {k / group, n / 8}, pack(k / group, n, zero_point));
  file.add(prefix + ".scales", DType::f32, {k / group, n}, scales);
}

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST("AWQ of every group size dequantises to (q - zero) * scale") {
  for (int group : {32, 64, 128}) {
    const int64_t n = 24;
    const int64_t k = 2 * group;
    HandMade file;
    add_awq(file, "up", n, k, group);
    const auto store = file.open();
    const WeightFormat& format = weight_format_of(*store, "up");
    EXPECT_EQ(format.name, "awq");
    const LinearPart part = format.load(*store, "up", {k, n}, group);
    EXPECT_EQ(part.out_features, n);
    std::vector<float> out(static_cast<size_t>(n * k));
    format.dequantize(part, {k, n}, group, out);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const float wanted =
            static_cast<float>(quantised(j, i) - zero_point(j / group, i)) * scale_of(j / group, i);
        if (out[static_cast<size_t>(i * k + j)] != wanted)
          EXPECT_EQ(out[static_cast<size_t>(i * k + j)], wanted);
      }
    }
  }
}

TEST("half and brain floats are read exactly, subnormals and infinities too") {
  const std::vector<uint16_t> half = {0x3C00, 0xC000, 0x0001, 0x83FF,
                                      0x7BFF, 0x7C00, 0x8000, 0x0400};
  const std::vector<double> wanted = {1.0,     -2.0,     0x1p-24, -1023 * 0x1p-24,
                                      65504.0, HUGE_VAL, -0.0,    0x1p-14};
  for (size_t i = 0; i < half.size(); ++i) {
    EXPECT_EQ(static_cast<double>(load_float(half.data(), DType::f16, static_cast<int64_t>(i))),
              wanted[i]);
  }
  EXPECT(std::isnan(load_float(std::vector<uint16_t>{0x7E00}.data(), DType::f16, 0)));
  const std::vector<uint16_t> brain = {0x3F80, 0xC049, 0x0001};
  EXPECT_EQ(load_float(brain.data(), DType::bf16, 0), 1.0F);
  EXPECT_EQ(load_float(brain.data(), DType::bf16, 1), -3.140625F);
  EXPECT_EQ(load_float(brain.data(), DType::bf16, 2), std::bit_cast<float>(0x00010000U));
}

TEST("a dense convolution is read as a matrix, other shapes are refused") {
  HandMade file;
  file.add("patch.weight", DType::f32, {2, 3, 2, 2}, std::vector<float>(24, 1.5F));
  file.add("flat.weight", DType::f32, {24}, std::vector<float>(24));
  file.add("ints.weight", DType::i32, {4, 6}, std::vector<int32_t>(24));
  const auto store = file.open();
  const LinearPart part = kDenseFormat.load(*store, "patch", {12, 2}, 0);
  EXPECT_EQ(part.weight.dim(1), int64_t{12});
  EXPECT_ERROR(kDenseFormat.load(*store, "patch", {12, 3}, 0), ErrorCode::tensor_mismatch);
  EXPECT_ERROR(kDenseFormat.load(*store, "patch", {24, 1}, 0), ErrorCode::tensor_mismatch);
  EXPECT_ERROR(kDenseFormat.load(*store, "flat", {1, 24}, 0), ErrorCode::tensor_mismatch);
  EXPECT_ERROR(kDenseFormat.load(*store, "ints", {6, 4}, 0), ErrorCode::tensor_mismatch);
}

TEST("an AWQ layer with a wrong group size, width or dtype is refused with the number") {
  HandMade file;
  add_awq(file, "up", 24, 64, 32);
  file.add("half.qweight", DType::i32, {64, 3}, pack(64, 24, quantised));
  file.add("floats.qweight", DType::f32, {64, 3}, std::vector<float>(192));
  const auto store = file.open();
  const auto load = [&](const char* prefix, int64_t k, int64_t n, int group) {
    return kAwqFormat.load(*store, prefix, {k, n}, group);
  };
  for (int group : {0, 16, 48, 96, -1, 256})
    EXPECT_ERROR(load("up", 64, 24, group), ErrorCode::unsupported_quantization);
  EXPECT_ERROR(load("up", 72, 24, 32),
               ErrorCode::unsupported_quantization);  // 32 does not divide 72
  EXPECT_ERROR(load("up", 64, 28, 32),
               ErrorCode::unsupported_quantization);  // 8 does not divide 28
  EXPECT_ERROR(load("up", 64, 32, 32), ErrorCode::tensor_mismatch);
  EXPECT_ERROR(load("up", 64, 24, 64), ErrorCode::tensor_mismatch);  // qzeros have rows for 32
  EXPECT_ERROR(load("half", 64, 24, 32), ErrorCode::missing_tensor);
  EXPECT_ERROR(load("floats", 64, 24, 32), ErrorCode::tensor_mismatch);
  EXPECT(message_of([&] { load("up", 64, 24, 48); }).find("48") != std::string::npos);
}

TEST("a layer in no format at all is reported under its plain name") {
  HandMade file;
  file.add("norm.weight", DType::f32, {1}, std::vector<float>(1));
  const auto store = file.open();
  EXPECT_ERROR(weight_format_of(*store, "up"), ErrorCode::missing_tensor);
  EXPECT(message_of([&] { weight_format_of(*store, "up"); }).find("'up.weight'") !=
         std::string::npos);
}

TEST("the loader joins parts in order, dense and AWQ, and gives each its own bias") {
  HandMade file;
  add_awq(file, "q", 16, 32, 32);
  add_awq(file, "k", 8, 32, 32);
  file.add("q.bias", DType::bf16, {16}, std::vector<uint16_t>(16, 0x3F80));
  file.add("dense.weight", DType::f32, {8, 32}, std::vector<float>(256));
  const auto store = file.open();
  ReferenceBackend backend;
  size_t reported = 0;
  WeightLoader loader(backend, *store, {QuantMethod::awq, 32}, [&](size_t loaded, size_t total) {
    EXPECT(loaded >= reported && loaded <= total && total == store->total_bytes());
    reported = loaded;
  });
  const auto weight = loader.linear(32, {{"q", 16, Bias::required}, {"k", 8, Bias::optional}});
  const auto& joined = static_cast<const ReferenceWeight&>(*weight);
  EXPECT_EQ(joined.n, int64_t{24});
  EXPECT_EQ(joined.row(0)[3],
            static_cast<float>(quantised(3, 0) - zero_point(0, 0)) * scale_of(0, 0));
  EXPECT_EQ(joined.row(17)[5],
            static_cast<float>(quantised(5, 1) - zero_point(0, 1)) * scale_of(0, 1));
  EXPECT_EQ(joined.bias[15], 1.0F);
  EXPECT_EQ(joined.bias[16], 0.0F);
  EXPECT_EQ(reported, store->total_bytes() - 256 * sizeof(float));
  EXPECT_EQ(loader.weight_bytes(), weight->bytes());

  EXPECT_ERROR(loader.linear(32, {{"q", 16, Bias::none}}), ErrorCode::tensor_mismatch);
  EXPECT_ERROR(loader.linear(32, {{"k", 8, Bias::required}}), ErrorCode::missing_tensor);
  EXPECT_ERROR(loader.linear(32, {{"k", 8, Bias::none}, {"dense", 8, Bias::none}}),
               ErrorCode::unsupported_quantization);
}

TEST("a quantised layer under a config without quantisation is refused") {
  HandMade file;
  add_awq(file, "q", 16, 32, 32);
  const auto store = file.open();
  ReferenceBackend backend;
  WeightLoader loader(backend, *store, {});
  EXPECT_ERROR(loader.linear(32, {{"q", 16, Bias::none}}), ErrorCode::unsupported_quantization);
}

TEST_MAIN()
