// Read bandwidth of this machine: every thread sums its own part of a 1 GiB buffer.
//   bench_bandwidth [threads]   prints {"threads":…,"gbPerSecond":…}, best of nine passes.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <thread>
#include <vector>

#include "backend/cpu/isa.h"

namespace {

// Eight independent sums of 64-bit words: enough loads in flight for the hardware prefetcher.
uint64_t sum(const uint64_t* words, size_t count) {
  uint64_t part[8] = {};
  for (size_t i = 0; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) part[j] += words[i + j];
  }
  return std::accumulate(part, part + 8, uint64_t{0});
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : turbomind::cpu::usable_threads();
  const size_t words = (size_t{1} << 30) / 8 / threads;
  std::vector<std::vector<uint64_t>> parts(threads);
  std::vector<uint64_t> sums(threads);
  double best = 0;
  for (int pass = 0; pass < 10; ++pass) {
    std::vector<std::thread> team;
    const auto start = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; ++t) {
      team.emplace_back([&, t] {
        if (pass == 0)
          parts[t].assign(words, static_cast<uint64_t>(t) + 1);  // first touch
        else
          sums[t] += sum(parts[t].data(), words);
      });
    }
    for (std::thread& thread : team) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (pass > 0) best = std::max(best, words * 8.0 * threads / seconds.count() / 1e9);
  }
  const uint64_t check = std::accumulate(sums.begin(), sums.end(), uint64_t{0});
  std::printf("{\"threads\":%d,\"gbPerSecond\":%.2f,\"check\":%llu}\n", threads, best,
              static_cast<unsigned long long>(check));
  return 0;
}
