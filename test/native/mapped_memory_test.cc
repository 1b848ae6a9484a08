// Page hints: read-only file pages are dropped after packing, nobody else's memory ever is.
#include "backend/cpu/mapped_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "linear_fixture.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::test;

namespace {

// A read-only mapping of a deleted temporary file holding `bytes`.
struct FileMapping {
  FileMapping(const void* bytes, size_t count, int protection) : size(count) {
    std::FILE* file = std::tmpfile();
    TM_CHECK(file != nullptr, "no temporary file");
    std::fwrite(bytes, 1, count, file);
    std::fflush(file);
    data = mmap(nullptr, count, protection, MAP_PRIVATE, fileno(file), 0);
    TM_CHECK(data != MAP_FAILED, "mmap of %zu bytes failed", count);
    std::fclose(file);
  }
  ~FileMapping() { munmap(data, size); }
  // Kilobytes of the mapping that are resident in this process.
  long resident_kb() const {
    std::FILE* smaps = std::fopen("/proc/self/smaps", "r");
    char line[512];
    unsigned long begin = 0, end = 0;
    long kb = 0, total = 0;
    bool inside = false;
    const unsigned long from = reinterpret_cast<unsigned long>(data);
    while (std::fgets(line, sizeof(line), smaps) != nullptr) {
      if (std::sscanf(line, "%lx-%lx ", &begin, &end) == 2)
        inside = begin < from + size && end > from;
      if (inside && std::sscanf(line, "Rss: %ld kB", &kb) == 1) total += kb;
    }
    std::fclose(smaps);
    return total;
  }
  void* data = nullptr;
  size_t size;
};

}  // namespace

TEST("packing from a file leaves its pages, and gives the result of packing from the heap") {
  std::mt19937 rng(31);
  cpu::ThreadPool pool(2);
  const std::vector<AwqPart> parts = {AwqPart(rng, 1024, 512, 128, DType::f16, false)};
  const FileMapping file(parts[0].qweight.data(), parts[0].qweight.size() * 4, PROT_READ);
  LinearSource source = awq_source(parts);
  source.parts[0].qweight.data = file.data;
  const auto mapped = cpu::pack_linear(source, cpu::best_isa(), pool);
  EXPECT(file.resident_kb() <= 16);  // of 256
  const auto heap = cpu::pack_linear(awq_source(parts), cpu::best_isa(), pool);
  const std::vector<float> x = random_floats(rng, 1024, 1.0F);
  EXPECT(same_bits(run(*mapped, {.x = x.data(), .rows = 1}, 512, pool),
                   run(*heap, {.x = x.data(), .rows = 1}, 512, pool)));
}

TEST("heap memory and writable mappings keep their contents") {
  std::vector<uint8_t> bytes(1 << 20, 7);
  const cpu::SourcePages heap({{bytes.data(), bytes.size()}});
  heap.will_read(bytes.data(), bytes.size());
  heap.done_with(bytes.data(), bytes.size());
  EXPECT_EQ(std::count(bytes.begin(), bytes.end(), 7), 1 << 20);
  const FileMapping file(bytes.data(), bytes.size(), PROT_READ | PROT_WRITE);
  std::memset(file.data, 9, file.size);
  const cpu::SourcePages written({{file.data, file.size}});
  written.done_with(file.data, file.size);
  const uint8_t* first = static_cast<const uint8_t*>(file.data);
  EXPECT_EQ(std::count(first, first + file.size, 9), 1 << 20);
}

TEST("memory is aligned, zeroed, and an impossible size is a typed error") {
  const cpu::MappedMemory memory(5 << 20);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.data()) % (2 << 20), uintptr_t{0});
  EXPECT_EQ(std::count(memory.data(), memory.data() + memory.bytes(), 0), 5 << 20);
  EXPECT_ERROR(cpu::MappedMemory(size_t{1} << 62), ErrorCode::out_of_memory);
}

TEST_MAIN()
