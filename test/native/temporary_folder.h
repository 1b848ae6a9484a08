// A folder for a test's files, removed with the object. One left by a process that died is removed
// by the next one that makes a folder: names carry the process id.
#pragma once

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/error.h"

namespace turbomind::test {

class TemporaryFolder {
 public:
  TemporaryFolder() : owner_(getpid()) {
    static int last = 0;
    const std::filesystem::path base = std::filesystem::temp_directory_path();
    if (last == 0) sweep(base);
    path_ = base / (kPrefix + std::to_string(owner_) + "-" + std::to_string(++last));
    TM_CHECK(std::filesystem::create_directory(path_), "%s is there already", path_.c_str());
  }
  ~TemporaryFolder() {
    if (getpid() != owner_) return;  // a forked child's copy
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string path(const std::string& name) const { return path_ / name; }
  // Returns the file's path.
  std::string write(const std::string& name, const std::vector<char>& bytes) const {
    const std::string file = path(name);
    std::ofstream out(file, std::ios::binary);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    out.close();
    TM_CHECK(out.good(), "short write to %s", file.c_str());
    return file;
  }

 private:
  static constexpr const char* kPrefix = "turbomind-native-";

  static void sweep(const std::filesystem::path& base) {
    std::error_code ignored;  // another process may sweep, too
    for (const auto& entry : std::filesystem::directory_iterator(base, ignored)) {
      const std::string name = entry.path().filename();
      if (!name.starts_with(kPrefix)) continue;
      const int process = std::atoi(name.c_str() + std::string(kPrefix).size());
      if (process <= 0 || kill(process, 0) == 0 || errno != ESRCH) continue;
      std::filesystem::remove_all(entry.path(), ignored);
    }
  }

  pid_t owner_;
  std::filesystem::path path_;
};

}  // namespace turbomind::test
