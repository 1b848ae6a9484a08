// How much memory the machine has and how much of it this process may still take: the least of what
// the system says and what the process's control groups leave. Any thread.
#pragma once

#include <cstddef>
#include <string>

namespace turbomind {

struct HostMemoryInfo {
  size_t total_bytes = 0;  // of the machine, or the lowest limit of this process's control groups
  size_t free_bytes = 0;   // what can be taken without swapping; the page cache counts as free
};

// `root`: where proc/ and sys/ are found; tests give a folder.
HostMemoryInfo host_memory_info(const std::string& root = "");

}  // namespace turbomind
