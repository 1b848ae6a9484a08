// Loading's way to the device: what arrives, from memory and from files, and what is refused.
#include "backend/cuda/cuda_upload.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "backend/cuda/host_buffer.h"
#include "gpu_test.h"

namespace {

using namespace turbomind;
using namespace turbomind::cuda;
using namespace turbomind::cuda::testing;

// A file of random bytes, mapped read-only as a checkpoint is.
class MappedBytes {
 public:
  explicit MappedBytes(const std::vector<uint8_t>& bytes) : size_(bytes.size()) {
    const char* folder = std::getenv("TMPDIR");
    path_ = std::string(folder != nullptr ? folder : "/tmp") + "/tm_upload_test_XXXXXX";
    fd_ = mkstemp(path_.data());
    TM_CHECK(fd_ >= 0, "no temporary file at %s", path_.c_str());
    for (size_t done = 0; done < size_;) {
      const ssize_t count = write(fd_, bytes.data() + done, size_ - done);
      TM_CHECK(count > 0, "cannot write %s", path_.c_str());
      done += static_cast<size_t>(count);
    }
    data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd_, 0);
    TM_CHECK(data_ != MAP_FAILED, "cannot map %s", path_.c_str());
  }
  ~MappedBytes() {
    munmap(data_, size_);
    close(fd_);
    unlink(path_.c_str());
  }
  const uint8_t* data() const { return static_cast<const uint8_t*>(data_); }
  void cut(size_t bytes) { TM_CHECK(ftruncate(fd_, static_cast<off_t>(bytes)) == 0, "truncate"); }

 private:
  std::string path_;
  int fd_ = -1;
  size_t size_;
  void* data_ = nullptr;
};

ConstTensorView bytes_view(const uint8_t* data, size_t count) {
  return ConstTensorView(data, DType::u8, {static_cast<int64_t>(count)});
}

struct Target {
  std::unique_ptr<DeviceArray<uint8_t>> array;
  size_t offset, bytes;
};

// Groups of one to three arrays of random sizes; each is copied on the device to its own place.
std::vector<Target> upload_groups(WeightUpload& upload, CudaStream stream, const uint8_t* data, size_t size, Random& random) {
  std::vector<Target> targets;
  for (int group = 0; group < 40; ++group) {
    std::vector<Target> arrays(1 + static_cast<size_t>(random.below(3)));
    size_t room = 0;
    for (Target& array : arrays) {
      array.bytes = static_cast<size_t>(random.below(group % 3 == 0 ? 3000 : 5 << 20));
      array.offset = static_cast<size_t>(random.below(static_cast<int>(size - array.bytes)));
      array.array = std::make_unique<DeviceArray<uint8_t>>(array.bytes);
      room += round_up<size_t>(array.bytes, 256);
    }
    cuda_check(cudaDeviceSynchronize());  // the arrays are poisoned in another stream
    std::vector<std::pair<const void*, uint8_t*>> copies;
    upload.begin(room);
    for (Target& array : arrays) {
      copies.emplace_back(upload.add(bytes_view(data + array.offset, array.bytes)), array.array->get());
    }
    std::vector<size_t> counts;
    for (const Target& array : arrays) counts.push_back(array.bytes);
    upload.end([copies, counts, stream] {
      for (size_t i = 0; i < copies.size(); ++i) {
        cuda_check(cudaMemcpyAsync(copies[i].second, copies[i].first, counts[i], cudaMemcpyDeviceToDevice, stream));
      }
    });
    for (Target& array : arrays) targets.push_back(std::move(array));
  }
  return targets;
}

TEST("arrays arrive whole, from a mapped file and from memory") {
  Random random(4);
  std::vector<uint8_t> bytes(size_t{24} << 20);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.bits());
  const MappedBytes file(bytes);
  for (const uint8_t* data : {file.data(), static_cast<const uint8_t*>(bytes.data())}) {
    DevicePool pool;
    const CudaStreamOwner stream;
    WeightUpload upload(0, pool, stream.get());
    const std::vector<Target> targets = upload_groups(upload, stream.get(), data, bytes.size(), random);
    upload.finish();
    cuda_check(cudaStreamSynchronize(stream.get()));
    EXPECT_EQ(upload.device_bytes(), pool.bytes_in_use());
    int wrong = 0;
    for (const Target& target : targets) {
      const std::vector<uint8_t> out = target.array->host();
      wrong += std::equal(out.begin(), out.end(), bytes.begin() + static_cast<int64_t>(target.offset)) ? 0 : 1;
    }
    EXPECT_EQ(wrong, 0);
  }
}

TEST("memory that is no file's has been read when a group ends") {
  DevicePool pool;
  const CudaStreamOwner stream;
  WeightUpload upload(0, pool, stream.get());
  std::vector<uint8_t> bytes(size_t{7} << 20, 3);
  DeviceArray<uint8_t> out(bytes.size());
  upload.begin(bytes.size());
  const void* staged = upload.add(bytes_view(bytes.data(), bytes.size()));
  upload.end([&] { cuda_check(cudaMemcpyAsync(out.get(), staged, bytes.size(), cudaMemcpyDeviceToDevice, stream.get())); });
  std::fill(bytes.begin(), bytes.end(), uint8_t{9});
  upload.finish();
  cuda_check(cudaStreamSynchronize(stream.get()));
  const std::vector<uint8_t> copy = out.host();
  EXPECT_EQ(std::count(copy.begin(), copy.end(), 3), static_cast<int64_t>(copy.size()));
}

TEST("a file cut while it is read is an error, not a fault; what was queued is given up") {
  std::vector<uint8_t> bytes(size_t{16} << 20, 5);
  MappedBytes file(bytes);
  DevicePool pool;
  const CudaStreamOwner stream;
  {
    WeightUpload upload(0, pool, stream.get());
    file.cut(size_t{1} << 20);
    const auto load = [&] {
      upload.begin(bytes.size());
      upload.add(bytes_view(file.data(), bytes.size()));
      upload.end([] {});
      upload.finish();
    };
    EXPECT_ERROR((load(), 0), ErrorCode::invalid_checkpoint);
    EXPECT_ERROR((load(), 0), ErrorCode::invalid_checkpoint);
  }
  {
    WeightUpload unfinished(0, pool, stream.get());
    unfinished.begin(size_t{1} << 20);
    unfinished.add(bytes_view(file.data(), size_t{1} << 20));
    unfinished.end([] { TM_CHECK(false, "a conversion nobody waited for"); });
  }
}

TEST("much host memory is pinned, and copies reach all of it") {
  for (const size_t bytes : {size_t{1}, size_t{5} << 20, (size_t{70} << 20) + 3}) {
    HostBuffer memory(bytes);
    auto* data = static_cast<uint8_t*>(memory.data());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % (size_t{2} << 20), 0U);
    for (size_t i = 0; i < bytes; i += 4099) data[i] = static_cast<uint8_t>(i);
    cudaPointerAttributes attributes{};
    cuda_check(cudaPointerGetAttributes(&attributes, data + bytes - 1));
    EXPECT(attributes.type == cudaMemoryTypeHost);
    DeviceArray<uint8_t> there(bytes);
    const CudaStreamOwner stream;
    cuda_check(cudaMemcpyAsync(there.get(), data, bytes, cudaMemcpyHostToDevice, stream.get()));
    cuda_check(cudaStreamSynchronize(stream.get()));
    const std::vector<uint8_t> back = there.host();
    EXPECT(std::memcmp(back.data(), data, bytes) == 0);
  }
  EXPECT_ERROR(HostBuffer(size_t{1} << 60), ErrorCode::out_of_memory);
}

}  // namespace

int main() {
  require_device();
  return turbomind::test::run_all();
}
