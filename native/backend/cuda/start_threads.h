// Helper threads where the system gives them. Any thread.
#pragma once

#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace turbomind::cuda {

// Starts up to `count` threads, which run what body(0), body(1) and so on answer; fewer where the system
// gives no more.
template <class Body>
void start_threads(std::vector<std::thread>& threads, size_t count, Body&& body) {
  threads.reserve(count);
  try {
    for (size_t i = 0; i < count; ++i) threads.emplace_back(body(i));
  } catch (const std::system_error&) {
    return;  // those that run are joined by whoever owns them
  }
}

}  // namespace turbomind::cuda
