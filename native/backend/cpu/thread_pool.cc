// The team of threads behind every op of the CPU backend. A job is a range cut into chunks; chunks
// are claimed by compare-and-swap on one word that also holds the job's number, so a worker that
// wakes late can neither claim from a finished job nor read a later job's body by mistake, and the
// caller never waits for a worker that claimed nothing.
#include "backend/cpu/thread_pool.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "base/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace turbomind::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough to span the serial pieces between two ops of a decode step, short enough that an idle
// or crowded machine loses little.
constexpr auto kSpin = std::chrono::microseconds(40);

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Spins until `ready()` or the time is up; says whether it was ready. The clock is read rarely.
template <class Ready>
bool spin_until(Ready&& ready) {
  if (ready()) return true;
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      relax();
      if (ready()) return true;
    }
  } while (Clock::now() < end);
  return false;
}

thread_local int current_thread_index = 0;

}  // namespace

struct ThreadPool::State {
  using RangeBody = void (*)(void*, int64_t, int64_t);
  using ThreadBody = void (*)(void*, int);

  // Ticket: the job's number in the high half, the next unclaimed chunk in the low half.
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<uint32_t> chunks_done{0};
  std::atomic<bool> caller_sleeps{false};
  // The job's number, odd for `run`; workers wait for it to move.
  alignas(64) std::atomic<uint32_t> epoch{0};
  std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false};

  // The job. Written between two stores to the ticket (closed, then open), so a late worker that
  // read a field of the next job cannot claim a chunk of the one before.
  std::atomic<RangeBody> range_body{nullptr};
  std::atomic<void*> context{nullptr};
  std::atomic<int64_t> count{0};
  std::atomic<int64_t> grain{1};
  std::atomic<uint32_t> chunks{0};
  std::atomic<ThreadBody> thread_body{nullptr};  // `run`: part t belongs to thread t

  std::vector<std::thread> workers;
  int threads = 1;
  bool busy = false;  // caller's thread only: a nested call runs serially

  static bool is_run(uint32_t job) { return (job & 1U) != 0; }
  uint32_t next_job(uint32_t kind) const {
    const uint32_t job = epoch.load(std::memory_order_relaxed) + 1;
    return is_run(job) == (kind != 0) ? job : job + 1;
  }
  void take_chunks(uint32_t job);
  void finish_chunk();
  void worker(int thread);
  void close(uint32_t job, void* job_context, uint32_t job_chunks);
  void open(uint32_t job);
  void wait_for(uint32_t total);
};

void ThreadPool::State::finish_chunk() {
  const uint32_t total = chunks.load(std::memory_order_relaxed);
  // seq_cst with the caller's store of caller_sleeps: one of the two sees the other.
  const uint32_t done = chunks_done.fetch_add(1) + 1;
  if (done == total && caller_sleeps.load()) chunks_done.notify_one();
}

void ThreadPool::State::take_chunks(uint32_t job) {
  const RangeBody body = range_body.load(std::memory_order_acquire);
  void* const data = context.load(std::memory_order_acquire);
  const int64_t items = count.load(std::memory_order_acquire);
  const int64_t step = grain.load(std::memory_order_acquire);
  const uint32_t total = chunks.load(std::memory_order_acquire);
  uint64_t seen = ticket.load(std::memory_order_acquire);
  while (static_cast<uint32_t>(seen >> 32) == job) {
    const uint32_t chunk = static_cast<uint32_t>(seen);
    if (chunk >= total) return;
    if (!ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
    const int64_t begin = static_cast<int64_t>(chunk) * step;
    body(data, begin, std::min(items, begin + step));
    finish_chunk();
    seen = ticket.load(std::memory_order_acquire);
  }
}

void ThreadPool::State::worker(int thread) {
  current_thread_index = thread;
  uint32_t last = 0;
  for (;;) {
    const auto moved = [&] { return epoch.load(std::memory_order_acquire) != last; };
    if (!spin_until(moved)) {
      sleepers.fetch_add(1);
      while (epoch.load() == last) epoch.wait(last);
      sleepers.fetch_sub(1);
    }
    if (stop.load(std::memory_order_acquire)) return;
    last = epoch.load(std::memory_order_acquire);
    if (is_run(last)) {  // cannot end before this thread did its part: the fields are stable
      thread_body.load(std::memory_order_acquire)(context.load(std::memory_order_acquire), thread);
      finish_chunk();
    } else {
      take_chunks(last);
    }
  }
}

// Nobody can claim from the job before, nor yet from this one.
void ThreadPool::State::close(uint32_t job, void* job_context, uint32_t job_chunks) {
  ticket.store((static_cast<uint64_t>(job) << 32) | 0xffffffffU, std::memory_order_relaxed);
  context.store(job_context, std::memory_order_release);
  chunks.store(job_chunks, std::memory_order_release);
  chunks_done.store(0, std::memory_order_release);
}

// Makes the job claimable and wakes whoever sleeps.
void ThreadPool::State::open(uint32_t job) {
  ticket.store(static_cast<uint64_t>(job) << 32, std::memory_order_release);
  epoch.store(job);  // seq_cst: ordered before the look at `sleepers`
  if (sleepers.load() > 0) epoch.notify_all();
}

void ThreadPool::State::wait_for(uint32_t total) {
  const auto finished = [&] { return chunks_done.load(std::memory_order_acquire) == total; };
  if (spin_until(finished)) return;
  caller_sleeps.store(true);
  for (uint32_t done = chunks_done.load(); done != total; done = chunks_done.load()) {
    chunks_done.wait(done);
  }
  caller_sleeps.store(false);
}

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>()) {
  TM_CHECK(threads >= 1 && threads <= 1024, "thread pool of %d threads; expected 1 to 1024",
           threads);
  state_->threads = threads;
  State* state = state_.get();
  for (int i = 1; i < threads; ++i) state_->workers.emplace_back([state, i] { state->worker(i); });
}

ThreadPool::~ThreadPool() {
  state_->stop.store(true);
  state_->epoch.fetch_add(1);
  state_->epoch.notify_all();
  for (std::thread& worker : state_->workers) worker.join();
}

int ThreadPool::size() const { return state_->threads; }

int ThreadPool::thread_index() { return current_thread_index; }

void ThreadPool::run_raw(void (*body)(void*, int), void* context) {
  State& s = *state_;
  if (s.threads == 1 || s.busy) {
    for (int i = 0; i < s.threads; ++i) body(context, i);
    return;
  }
  s.busy = true;
  const uint32_t job = s.next_job(1);
  s.close(job, context, static_cast<uint32_t>(s.threads));
  s.thread_body.store(body, std::memory_order_release);
  s.open(job);
  body(context, 0);
  s.finish_chunk();
  s.wait_for(static_cast<uint32_t>(s.threads));
  s.busy = false;
}

void ThreadPool::for_raw(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t),
                         void* context) {
  if (count <= 0) return;
  State& s = *state_;
  grain = std::max({grain, int64_t{1}, count / (int64_t{1} << 30)});
  const int64_t chunks = (count + grain - 1) / grain;
  if (s.threads == 1 || chunks == 1 || s.busy) {
    for (int64_t begin = 0; begin < count; begin += grain) {
      body(context, begin, std::min(count, begin + grain));
    }
    return;
  }
  s.busy = true;
  const uint32_t job = s.next_job(0);
  s.close(job, context, static_cast<uint32_t>(chunks));
  s.range_body.store(body, std::memory_order_release);
  s.count.store(count, std::memory_order_release);
  s.grain.store(grain, std::memory_order_release);
  s.open(job);
  s.take_chunks(job);
  s.wait_for(static_cast<uint32_t>(chunks));
  s.busy = false;
}

}  // namespace turbomind::cpu
