// The team of threads: every chunk runs once, whoever is late.
#include "backend/cpu/thread_pool.h"

#include <atomic>
#include <chrono>
#include <vector>

#include "test.h"

using namespace turbomind;
using cpu::ThreadPool;

namespace {

// Every item of [0, count) is visited exactly once.
bool covers(ThreadPool& pool, int64_t count, int64_t grain) {
  std::vector<std::atomic<int>> visits(static_cast<size_t>(count));
  pool.parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) visits[static_cast<size_t>(i)].fetch_add(1);
  });
  for (const auto& v : visits) {
    if (v.load() != 1) return false;
  }
  return true;
}

}  // namespace

TEST("every item runs exactly once for all counts, grains and team sizes") {
  for (int threads = 1; threads <= 4; ++threads) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.size(), threads);
    for (int64_t count : {0, 1, 2, 7, 64, 1000}) {
      for (int64_t grain : {0, 1, 3, 64, 5000}) EXPECT(covers(pool, count, grain));
    }
  }
}

TEST("run calls the body once on each thread") {
  for (int threads = 1; threads <= 4; ++threads) {
    ThreadPool pool(threads);
    for (int round = 0; round < 200; ++round) {
      std::vector<std::atomic<int>> calls(static_cast<size_t>(threads));
      std::atomic<int> misplaced{0};
      pool.run([&](int thread) {
        calls[static_cast<size_t>(thread)].fetch_add(1);
        if (thread != ThreadPool::thread_index() && threads > 1) misplaced.fetch_add(1);
      });
      for (const auto& c : calls) EXPECT_EQ(c.load(), 1);
      EXPECT_EQ(misplaced.load(), 0);
    }
  }
}

TEST("thousands of short jobs of both kinds in turn, with more threads than cores") {
  ThreadPool pool(4);
  int64_t sum = 0, expected = 0;
  for (int round = 0; round < 5000; ++round) {
    std::atomic<int64_t> total{0};
    const int64_t count = round % 17;
    pool.parallel_for(count, 1 + round % 3, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) total.fetch_add(i + round);
    });
    for (int64_t i = 0; i < count; ++i) expected += i + round;
    if (round % 50 == 0) {
      pool.run([&](int thread) { total.fetch_add(thread); });
      expected += 0 + 1 + 2 + 3;
    }
    sum += total.load();
  }
  EXPECT_EQ(sum, expected);
}

TEST("workers that fell asleep take part again") {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    // Longer than the spin: the clock is watched without a sleep of our own.
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(300);
    while (std::chrono::steady_clock::now() < until) {
    }
    std::atomic<int> seen{0};
    pool.run([&](int) { seen.fetch_add(1); });
    EXPECT_EQ(seen.load(), 3);
  }
}

TEST("a job inside a job runs on the calling thread") {
  ThreadPool pool(2);
  std::atomic<int64_t> total{0};
  pool.parallel_for(8, 1, [&](int64_t begin, int64_t) {
    pool.parallel_for(10, 3,
                      [&](int64_t from, int64_t to) { total.fetch_add((to - from) + 0 * begin); });
  });
  EXPECT_EQ(total.load(), 80);
}

TEST("memory written before a job is seen by it, and its results after it") {
  ThreadPool pool(2);
  std::vector<int> values(256);
  for (int round = 0; round < 2000; ++round) {
    for (int& v : values) v = round;  // plain stores: the job's hand-over must order them
    pool.parallel_for(256, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) values[static_cast<size_t>(i)] += static_cast<int>(i);
    });
    bool same = true;
    for (int i = 0; i < 256; ++i) same = same && values[static_cast<size_t>(i)] == round + i;
    EXPECT(same);
  }
}

TEST("a team of no threads is an internal error") {
  EXPECT_ERROR(ThreadPool(0), ErrorCode::internal);
}

TEST_MAIN()
