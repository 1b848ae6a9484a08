// Read-only file mappings: found by address, read through the file, errors where the file is gone.
#include "base/file_mapping.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "test.h"

using namespace turbomind;

namespace {

constexpr size_t kBytes = 3 * 65536 + 100;

struct File {
  explicit File(int protection = PROT_READ, off_t offset = 0) {
    const char* folder = std::getenv("TMPDIR");
    path = std::string(folder != nullptr ? folder : "/tmp") + "/tm mapping test XXXXXX";
    fd = mkstemp(path.data());
    TM_CHECK(fd >= 0, "no temporary file at %s", path.c_str());
    for (size_t i = 0; i < kBytes; ++i) bytes.push_back(static_cast<char>(i * 31 + i / 251));
    TM_CHECK(write(fd, bytes.data(), kBytes) == static_cast<ssize_t>(kBytes), "short write");
    size = kBytes - static_cast<size_t>(offset);
    data = static_cast<char*>(mmap(nullptr, size, protection, MAP_PRIVATE, fd, offset));
    TM_CHECK(data != MAP_FAILED, "mmap failed");
  }
  ~File() {
    munmap(data, size);
    close(fd);
    std::remove(path.c_str());
  }
  std::vector<MappedRange> found() const {
    std::vector<MappedRange> ranges = mapped_files();
    std::erase_if(ranges, [this](const MappedRange& range) { return !range.contains(data, size); });
    return ranges;
  }
  std::string path;
  std::vector<char> bytes;
  int fd = -1;
  size_t size = 0;
  char* data = nullptr;
};

}  // namespace

TEST("a mapping is found by any of its bytes and read through its file, offsets included") {
  for (const off_t offset : {off_t{0}, off_t{65536}}) {
    const File file(PROT_READ, offset);
    const std::vector<MappedRange> ranges = file.found();
    EXPECT_EQ(ranges.size(), 1U);
    EXPECT_EQ(ranges[0].path, file.path);
    const MappingReader reader(ranges[0]);
    EXPECT(reader.is_open());
    std::vector<char> out(5000);
    EXPECT(reader.read(file.data + 70000, out.size(), out.data()));
    EXPECT(std::equal(out.begin(), out.end(), file.bytes.begin() + 70000 + offset));
  }
}

TEST("ranges end where they end") {
  MappedRange range;
  range.begin = 4096;
  range.end = 8192;
  const auto at = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
  EXPECT(range.contains(at(4096), 4096) && range.contains(at(8191), 1) &&
         range.contains(at(8192), 0));
  EXPECT(!range.contains(at(4095), 1) && !range.contains(at(8191), 2) &&
         !range.contains(at(5000), ~size_t{0}));
}

TEST("heap memory and writable mappings are nobody's file") {
  const std::vector<char> heap(1 << 20);
  for (const MappedRange& range : mapped_files()) EXPECT(!range.contains(heap.data(), heap.size()));
  EXPECT(File(PROT_READ | PROT_WRITE).found().empty());
}

TEST("a file that was replaced is not opened; one that was cut cannot be read") {
  const File file;
  const std::vector<MappedRange> ranges = file.found();
  const MappingReader before(ranges.at(0));
  std::vector<char> out(1000);
  EXPECT_EQ(ftruncate(file.fd, 80000), 0);
  EXPECT(before.read(file.data + 79000, 1000, out.data()));
  EXPECT(!before.read(file.data + 79001, 1000, out.data()));
  std::remove(file.path.c_str());
  EXPECT(!MappingReader(ranges[0]).is_open());
  std::FILE* other = std::fopen(file.path.c_str(), "w");
  EXPECT(other != nullptr);
  if (other != nullptr) std::fclose(other);
  EXPECT(!MappingReader(ranges[0]).is_open());
}

TEST_MAIN()
