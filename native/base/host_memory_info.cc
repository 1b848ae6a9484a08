// See host_memory_info.h. Linux's files; elsewhere half of the machine's memory counts as free.
#include "base/host_memory_info.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>

#if defined(__linux__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace turbomind {
namespace {

// First number of a one-line file, or of the line that starts with `key`; none where the file or the
// line is missing or says "max".
std::optional<size_t> read_number(const std::string& path, const char* key = "") {
  std::FILE* file = std::fopen(path.c_str(), "re");
  if (file == nullptr) return std::nullopt;
  char line[512];
  std::optional<size_t> value;
  const size_t key_length = std::strlen(key);
  while (std::fgets(line, sizeof line, file) != nullptr) {
    if (std::strncmp(line, key, key_length) != 0) continue;
    char* end = nullptr;
    const unsigned long long number = std::strtoull(line + key_length, &end, 10);
    if (end != line + key_length) value = static_cast<size_t>(number);
    break;
  }
  std::fclose(file);
  return value;
}

// Where this process stands in the hierarchy of control groups: the path behind "0::" (v2, an empty
// `controller`) or behind the line that lists `controller` (v1). "/" where nothing is said, as inside
// a container.
std::string group_path(const std::string& root, const char* controller) {
  std::FILE* file = std::fopen((root + "/proc/self/cgroup").c_str(), "re");
  if (file == nullptr) return "/";
  char line[4096];
  std::string found = "/";
  while (std::fgets(line, sizeof line, file) != nullptr) {
    line[std::strcspn(line, "\n")] = '\0';
    char* const controllers = std::strchr(line, ':');
    char* const path = controllers == nullptr ? nullptr : std::strchr(controllers + 1, ':');
    if (path == nullptr) continue;
    const std::string listed = "," + std::string(controllers + 1, path) + ",";
    const bool wanted = *controller == '\0'
                            ? listed == ",,"
                            : listed.find(std::string(",") + controller + ",") != std::string::npos;
    if (wanted) found = path + 1;
  }
  std::fclose(file);
  return found;
}

struct GroupFiles {
  const char* mount;
  const char* controller;
  const char* limit;
  const char* used;
  const char* page_cache;  // a line of memory.stat: given back under pressure
};
constexpr GroupFiles kVersions[] = {
    {"/sys/fs/cgroup", "", "/memory.max", "/memory.current", "inactive_file "},
    {"/sys/fs/cgroup/memory", "memory", "/memory.limit_in_bytes", "/memory.usage_in_bytes",
     "total_inactive_file "}};

// Every group above the process's own limits it too. The path may name groups that this mount does
// not show (a container's own view): those files are missing and say nothing.
void apply_groups(const std::string& root, const GroupFiles& files, HostMemoryInfo& info) {
  std::string path = group_path(root, files.controller);
  for (;;) {
    while (!path.empty() && path.back() == '/') path.pop_back();
    const std::string group = root + files.mount + path;
    if (const std::optional<size_t> limit = read_number(group + files.limit)) {
      size_t used = read_number(group + files.used).value_or(0);
      used -= std::min(used, read_number(group + "/memory.stat", files.page_cache).value_or(0));
      info.total_bytes = std::min(info.total_bytes, *limit);
      info.free_bytes = std::min(info.free_bytes, *limit - std::min(*limit, used));
    }
    if (path.empty()) return;
    path.erase(path.rfind('/'));
  }
}

size_t machine_bytes() {
#if defined(__linux__) || defined(__APPLE__)
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
#else
  return 0;
#endif
}

}  // namespace

HostMemoryInfo host_memory_info(const std::string& root) {
  HostMemoryInfo info;
  const std::string meminfo = root + "/proc/meminfo";
  const std::optional<size_t> total_kib = read_number(meminfo, "MemTotal:");
  const std::optional<size_t> available_kib = read_number(meminfo, "MemAvailable:");
  info.total_bytes = total_kib ? *total_kib * 1024 : machine_bytes();
  info.free_bytes = available_kib ? *available_kib * 1024 : info.total_bytes / 2;
  for (const GroupFiles& files : kVersions) apply_groups(root, files, info);
  return info;
}

}  // namespace turbomind
