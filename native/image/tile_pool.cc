#include "image/tile_pool.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.h"
#include "image/tile_job.h"

namespace turbomind::image {
namespace {

// One image in the queue. Phases follow each other: plan (one item), bands, hashes. All fields but
// `job` are guarded by the pool's mutex; `job` is written by the plan item and read after it.
struct Work {
  enum class Phase { plan, bands, hashes };

  ImageView image;
  TileOptions options;
  TilePool::Done done;
  std::optional<TileJob> job;
  Phase phase = Phase::plan;
  int num_items = 1;  // of the phase
  int num_taken = 0;
  int num_done = 0;
  std::exception_ptr failure;
};

using WorkPtr = std::shared_ptr<Work>;

}  // namespace

struct TilePool::State {
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<WorkPtr> queue;  // oldest first; an image leaves when it is answered
  bool stopping = false;
  int num_threads = 0;
  std::vector<std::thread> threads;

  void loop();
  WorkPtr next_with_items() const;
  void run_item(Work& work, Work::Phase phase, int item_idx) const;
  bool advance(Work& work) const;
  void stop();
};

// The oldest image that has something to take; null when there is none.
WorkPtr TilePool::State::next_with_items() const {
  for (const WorkPtr& work : queue) {
    if (work->num_taken < work->num_items) return work;
  }
  return nullptr;
}

void TilePool::State::run_item(Work& work, Work::Phase phase, int item_idx) const {
  switch (phase) {
    case Work::Phase::plan:
      work.job.emplace(work.image, work.options, num_threads, best_resize_kernels());
      return;
    case Work::Phase::bands:
      return work.job->run_band(item_idx);
    case Work::Phase::hashes:
      return work.job->run_hash(item_idx);
  }
}

// The phase's last item is done: true when the image is finished, else the next phase is open.
bool TilePool::State::advance(Work& work) const {
  if (work.failure || work.phase == Work::Phase::hashes) return true;
  const bool planned = work.phase == Work::Phase::plan;
  work.phase = planned ? Work::Phase::bands : Work::Phase::hashes;
  work.num_items = planned ? work.job->num_bands() : work.job->num_hashes();
  work.num_taken = 0;
  work.num_done = 0;
  return false;
}

void TilePool::State::loop() {
  std::unique_lock lock(mutex);
  while (true) {
    WorkPtr work;
    wake.wait(lock, [&] { return stopping || (work = next_with_items()) != nullptr; });
    if (stopping) return;
    const int item_idx = work->num_taken++;
    const Work::Phase phase = work->phase;
    lock.unlock();
    std::exception_ptr failure;
    try {
      run_item(*work, phase, item_idx);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    if (failure) {
      work->failure = failure;
      work->num_items = work->num_taken;  // no more items are handed out
    }
    if (++work->num_done < work->num_items) continue;
    if (!advance(*work)) {
      wake.notify_all();
      continue;
    }
    std::erase(queue, work);
    lock.unlock();
    std::shared_ptr<const ImageTiles> tiles = work->failure ? nullptr : work->job->take();
    work->job.reset();
    work->done(std::move(tiles), work->failure);
    work.reset();
    lock.lock();
  }
}

void TilePool::State::stop() {
  {
    const std::lock_guard lock(mutex);
    stopping = true;
  }
  wake.notify_all();
  for (std::thread& thread : threads) thread.join();
  for (const WorkPtr& work : queue) {
    work->job.reset();
    const Error stopped(ErrorCode::disposed, "image: the preprocessing threads were stopped");
    work->done(nullptr, std::make_exception_ptr(stopped));
  }
  queue.clear();
}

TilePool::TilePool(int threads) : state_(std::make_unique<State>()) {
  TM_CHECK(threads >= 1, "tile pool of %d threads", threads);
  state_->num_threads = threads;
  state_->threads.reserve(threads);
  try {
    for (int i = 0; i < threads; ++i) state_->threads.emplace_back([this] { state_->loop(); });
  } catch (...) {
    state_->stop();
    throw;
  }
}

TilePool::~TilePool() { state_->stop(); }

int TilePool::size() const { return state_->num_threads; }

void TilePool::submit(const ImageView& image, const TileOptions& options, Done done) {
  auto work = std::make_shared<Work>();
  work->image = image;
  work->options = options;
  work->done = std::move(done);
  {
    const std::lock_guard lock(state_->mutex);
    state_->queue.push_back(std::move(work));
  }
  state_->wake.notify_one();
}

std::future<std::shared_ptr<const ImageTiles>> TilePool::submit(const ImageView& image,
                                                                const TileOptions& options) {
  auto promise = std::make_shared<std::promise<std::shared_ptr<const ImageTiles>>>();
  std::future<std::shared_ptr<const ImageTiles>> future = promise->get_future();
  submit(image, options,
         [promise](std::shared_ptr<const ImageTiles> tiles, std::exception_ptr failure) {
           if (failure) {
             promise->set_exception(failure);
           } else {
             promise->set_value(std::move(tiles));
           }
         });
  return future;
}

}  // namespace turbomind::image
