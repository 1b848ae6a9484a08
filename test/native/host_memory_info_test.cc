// Free memory as the system's files and the limits of control groups say it, from folders made up.
#include "base/host_memory_info.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "test.h"

using namespace turbomind;

namespace {

constexpr size_t kMiB = size_t{1} << 20;

// A folder that stands for the root of a file system.
struct Root {
  Root() {
    char name[] = "/tmp/turbomind-memory-XXXXXX";
    path = mkdtemp(name);
    write("/proc/meminfo", "MemTotal: 16384 kB\nMemFree: 1024 kB\nMemAvailable: 8192 kB\n");
  }
  ~Root() { std::filesystem::remove_all(path); }
  void write(const std::string& file, const std::string& text) const {
    std::filesystem::create_directories(std::filesystem::path(path + file).parent_path());
    std::ofstream(path + file) << text;
  }
  void group(const std::string& folder, size_t limit, size_t used, size_t inactive_file) const {
    write("/sys/fs/cgroup" + folder + "/memory.max", std::to_string(limit) + "\n");
    write("/sys/fs/cgroup" + folder + "/memory.current", std::to_string(used) + "\n");
    write("/sys/fs/cgroup" + folder + "/memory.stat",
          "anon 1\ninactive_file " + std::to_string(inactive_file) + "\nactive_file 5\n");
  }
  std::string path;
};

}  // namespace

TEST("without control groups the system's numbers count") {
  const Root root;
  const HostMemoryInfo info = host_memory_info(root.path);
  EXPECT_EQ(info.total_bytes, 16 * kMiB);
  EXPECT_EQ(info.free_bytes, 8 * kMiB);
}

TEST("a container's limit counts, its page cache is free, 'max' is no limit") {
  const Root root;
  root.write("/proc/self/cgroup", "0::/\n");
  root.group("", 4 * kMiB, 3 * kMiB, 2 * kMiB);
  EXPECT_EQ(host_memory_info(root.path).total_bytes, 4 * kMiB);
  EXPECT_EQ(host_memory_info(root.path).free_bytes, 3 * kMiB);
  root.group("", 4 * kMiB, 5 * kMiB, 0);  // over its limit already
  EXPECT_EQ(host_memory_info(root.path).free_bytes, size_t{0});
  root.write("/sys/fs/cgroup/memory.max", "max\n");
  EXPECT_EQ(host_memory_info(root.path).free_bytes, 8 * kMiB);
  EXPECT_EQ(host_memory_info(root.path).total_bytes, 16 * kMiB);
}

TEST("the tightest of the groups above a process counts, wherever it stands") {
  const Root root;
  root.write("/proc/self/cgroup", "12:cpu:/other\n0::/service/web/worker\n");
  root.group("/service/web/worker", 7 * kMiB, kMiB, 0);
  root.group("/service/web", 6 * kMiB, 4 * kMiB, 0);  // its children's use is in it
  root.group("/service", 15 * kMiB, 5 * kMiB, 0);
  EXPECT_EQ(host_memory_info(root.path).total_bytes, 6 * kMiB);
  EXPECT_EQ(host_memory_info(root.path).free_bytes, 2 * kMiB);
}

TEST("a path that a container does not show says nothing; its own root does") {
  const Root root;
  root.write("/proc/self/cgroup", "0::/kubepods/pod1/abc\n");
  root.group("", 5 * kMiB, 2 * kMiB, kMiB);
  EXPECT_EQ(host_memory_info(root.path).total_bytes, 5 * kMiB);
  EXPECT_EQ(host_memory_info(root.path).free_bytes, 4 * kMiB);
}

TEST("the first version of control groups counts too") {
  const Root root;
  root.write("/proc/self/cgroup", "9:cpu,memory:/docker/x\n3:cpuset:/\n");
  root.write("/sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes", std::to_string(3 * kMiB));
  root.write("/sys/fs/cgroup/memory/docker/x/memory.usage_in_bytes", std::to_string(2 * kMiB));
  root.write("/sys/fs/cgroup/memory/docker/x/memory.stat",
             "total_inactive_file " + std::to_string(kMiB) + "\n");
  root.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(host_memory_info(root.path).total_bytes, 3 * kMiB);
  EXPECT_EQ(host_memory_info(root.path).free_bytes, 2 * kMiB);
}

TEST("the real machine has memory, and no more of it free than there is") {
  const HostMemoryInfo info = host_memory_info();
  EXPECT(info.free_bytes > 0 && info.free_bytes <= info.total_bytes);
}

TEST_MAIN()
