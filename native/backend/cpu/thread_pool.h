// A fixed team of threads for one backend. Workers spin for a few microseconds after a job, then
// sleep on a futex, so that a neighbour that takes a core does not stall the others and an idle
// engine costs nothing. The caller takes part as thread 0. Used from one thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace turbomind::cpu {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // >= 1, the caller counted
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;
  // Index of the calling thread in the team that runs it: 0 outside of any team's workers. Picks
  // per-thread scratch inside parallel_for.
  static int thread_index();

  // Runs body(thread_idx) once on each thread; returns when all are done.
  template <class Body>
  void run(Body&& body) {
    run_raw([](void* p, int thread) { (*static_cast<std::remove_reference_t<Body>*>(p))(thread); },
            const_cast<void*>(static_cast<const void*>(&body)));
  }
  // Runs body(begin, end) over chunks of [0, count), `grain` items each, taken dynamically: a
  // thread that lost its core leaves its share to the others. Results must not depend on who
  // runs what.
  template <class Body>
  void parallel_for(int64_t count, int64_t grain, Body&& body) {
    for_raw(
        count, grain,
        [](void* p, int64_t begin, int64_t end) {
          (*static_cast<std::remove_reference_t<Body>*>(p))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  void run_raw(void (*body)(void*, int), void* context);
  void for_raw(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace turbomind::cpu
