// The steps: who decodes, what runs ahead, and what a queue takes. Joining is scheduler_join.cc,
// giving way scheduler_preempt.cc, results scheduler_commit.cc, ends scheduler_end.cc.
#include "runtime/scheduler.h"

#include <algorithm>

#include "base/error.h"

namespace turbomind {
namespace {

// While somebody waits, a full plan is made at least this often.
constexpr int kMostStepsAhead = 16;

}  // namespace

Scheduler::Scheduler(const SchedulerLimits& limits, BlockManager& blocks)
    : limits_(limits),
      blocks_(blocks),
      swap_space_(limits.swap.num_blocks),
      sharing_(blocks, limits.enable_prefix_caching),
      budgeter_(limits.max_inter_token_ms, limits.max_prefill_token_num, limits.max_tiles),
      images_(limits.max_held_tiles > 0 ? limits.max_held_tiles : 4 * limits.max_tiles),
      drafts_(limits.speculation) {
  TM_CHECK(limits.session_len >= 2 && limits.max_batch_size >= 1 &&
               limits.max_prefill_token_num >= 1 && limits.max_tiles >= 1,
           "scheduler limits: session_len %d, max_batch_size %d, max_prefill_token_num %d, "
           "max_tiles %d",
           limits.session_len, limits.max_batch_size, limits.max_prefill_token_num,
           limits.max_tiles);
  TM_CHECK(images_.num_free() >= limits_.max_tiles, "%d tiles held, %d encoded in a step",
           images_.num_free(), limits_.max_tiles);
  running_.reserve(static_cast<size_t>(limits.max_batch_size));
  // Whatever a plan adds while it moves sequences and blocks has its place already: nothing can fail
  // between two halves of a move.
  const auto sequences = static_cast<size_t>(limits.max_batch_size);
  saved_.reserve(sequences);
  copied_.reserve(sequences);
  computing_.reserve(sequences);
  prefilling_.reserve(sequences);
  for (StepPlan* plan : {&plan_, &ahead_}) {  // they change places
    plan->rows.reserve(sequences);
    plan->copies.reserve(sequences);
    plan->tiles.reserve(static_cast<size_t>(limits.max_tiles));
    plan->saves.reserve(static_cast<size_t>(std::min(limits.swap.num_blocks, blocks.num_blocks())));
    plan->loads.reserve(plan->saves.capacity());
  }
}

int Scheduler::max_sequence_tokens() const {
  return static_cast<int>(std::min<int64_t>(limits_.session_len, blocks_.num_tokens()));
}

Admission Scheduler::fits(int num_prompt_tokens) const {
  if (num_prompt_tokens >= limits_.session_len) {
    return {Admit::never, ErrorCode::prompt_too_long,
            format("the prompt has %d tokens and leaves no room for a completion in a session of "
                   "%d; shorten it or raise sessionLen",
                   num_prompt_tokens, limits_.session_len)};
  }
  if (num_prompt_tokens >= blocks_.num_tokens()) {
    return {Admit::never, ErrorCode::out_of_memory,
            format("the prompt has %d tokens and needs %d KV blocks, but the pool has %d of %d "
                   "tokens; shorten it or raise cacheMaxEntryCount",
                   num_prompt_tokens, blocks_.blocks_for(num_prompt_tokens + 1),
                   blocks_.num_blocks(), blocks_.block_size())};
  }
  return {};
}

Admission Scheduler::add(Request request, Clock::time_point submitted) {
  Admission admission = fits(static_cast<int>(request.prompt_tokens.size()));
  if (admission.admit == Admit::never) return admission;
  if (limits_.max_queue_size > 0) {
    const auto queued = std::count_if(waiting_.begin(), waiting_.end(),
                                      [](const Owner& s) { return !s->started(); });
    if (queued >= limits_.max_queue_size) {
      return {Admit::refused, ErrorCode::queue_full,
              format("%d requests wait already, as many as maxQueueSize allows; try again later",
                     static_cast<int>(queued))};
    }
  }
  // A preempted sequence comes back here.
  const size_t all = waiting_.size() + running_.size() + 1;
  if (waiting_.capacity() < all) waiting_.reserve(2 * all);
  may_join_ = true;
  const Rank rank{submitted - request.priority * kPriorityStep, num_added_++};
  auto sequence = std::make_unique<Sequence>(std::move(request), submitted, max_sequence_tokens(),
                                             blocks_, rank);
  if (limits_.swap.num_blocks > 0) {
    sequence->swapped().reserve(
        std::min(limits_.swap.num_blocks, blocks_.blocks_for(max_sequence_tokens())));
  }
  open_images(*sequence);
  insert_by_rank(waiting_, std::move(sequence));
  return admission;
}

// Sequences that show the same picture share its embeddings.
void Scheduler::open_images(Sequence& sequence) {
  for (SequenceImage& image : sequence.images()) {
    if (sequence.num_computed() < image.end()) image.encoded = images_.open(*image.tiles);
  }
}

const StepPlan& Scheduler::plan() {
  forget_plans();
  may_join_ = false;
  steps_ahead_ = 0;
  planned_at_ = Clock::now();
  make_way();
  const bool enough_blocks = plan_decode();
  // The second time only if sequences were found to need other tiles than those kept for them.
  for (int i = 0; i < 2 && (i == 0 || (plan_.empty() && !idle())); ++i) {
    StepBudget budget = budgeter_.budget(plan_.num_decode);
    limit_held_tiles(budget);
    plan_prefill(budget, enough_blocks);
  }
  drafts_.add_drafts(plan_);
  const bool parked = std::any_of(running_.begin(), running_.end(),
                                  [](const Owner& sequence) { return sequence->parked(); });
  TM_CHECK(!plan_.empty() || idle() || parked,
           "nothing to run with %d running and %d waiting sequences", num_running(), num_waiting());
  for (const ScheduledRow& row : plan_.rows) row.sequence->mark_scheduled(planned_at_);
  return plan_;
}

const StepPlan* Scheduler::plan_ahead() {
  TM_CHECK(ahead_.empty(), "a second step ahead");
  const auto num_rows = static_cast<int>(plan_.rows.size());
  const bool only_decodes = plan_.num_prefill_tokens == 0 && plan_.num_tokens == num_rows &&
                            plan_.num_samples == num_rows && num_rows == num_running();
  if (num_rows == 0 || !only_decodes) return nullptr;
  if (!waiting_.empty() && (may_join_ || steps_ahead_ >= kMostStepsAhead)) return nullptr;
  for (const ScheduledRow& row : plan_.rows) {
    if (row.sequence == nullptr || row.sequence->request().step_by_step()) return nullptr;
  }
  if (drafts_.has_guess(plan_)) return nullptr;
  for (int i = 0; i < num_rows; ++i) {
    Sequence& sequence = *plan_.rows[static_cast<size_t>(i)].sequence;
    if (sequence.num_completion_tokens() + 1 >= sequence.max_new_tokens()) continue;  // its last
    if (!sequence.blocks().grow_to(sequence.num_tokens() + 1)) {
      ahead_.clear();
      return nullptr;
    }
    ahead_.add_ahead(sequence, i);
  }
  if (ahead_.empty()) return nullptr;
  ++steps_ahead_;
  return &ahead_;
}

bool Scheduler::plan_decode() {
  const size_t before = running_.size();
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    if (!sequence.decoding() || sequence.parked()) continue;
    // The last one is behind i or i itself, so it has no row in the plan yet.
    while (i < running_.size() && !sequence.blocks().grow_to(sequence.num_tokens())) {
      TM_CHECK(running_.size() > 1, "a lone sequence does not fit into a pool of %d blocks",
               blocks_.num_blocks());
      preempt_last();
    }
    if (i < running_.size()) plan_.add_decode(sequence);
  }
  return running_.size() == before;
}

Sequence* Scheduler::find(RequestId id) {
  for (const Owner& s : running_) {
    if (s->id() == id) return s.get();
  }
  for (const Owner& s : waiting_) {
    if (s->id() == id) return s.get();
  }
  return nullptr;
}

bool Scheduler::has(RequestId id) const {
  const auto matches = [id](const Owner& s) { return s->id() == id; };
  return std::any_of(running_.begin(), running_.end(), matches) ||
         std::any_of(waiting_.begin(), waiting_.end(), matches);
}

void Scheduler::check_invariants() const {
  blocks_.check_invariants();
  TM_CHECK(num_running() <= limits_.max_batch_size, "%d running sequences of at most %d",
           num_running(), limits_.max_batch_size);
  const auto by_rank = [](const Owner& a, const Owner& b) { return a->rank() < b->rank(); };
  TM_CHECK(std::is_sorted(running_.begin(), running_.end(), by_rank) &&
               std::is_sorted(waiting_.begin(), waiting_.end(), by_rank),
           "%d running and %d waiting sequences out of order", num_running(), num_waiting());
  std::vector<int> owners(static_cast<size_t>(blocks_.num_blocks()), 0);
  for (BlockId block : copied_) ++owners[static_cast<size_t>(block)];
  swap_space_.check_invariants();
  std::vector<bool> has_owner(static_cast<size_t>(swap_space_.num_slots()), false);
  int swapped = 0;
  const auto note_swapped = [&](const SwappedBlocks& kept) {
    for (int32_t slot : kept.slots()) {
      TM_CHECK(!has_owner[static_cast<size_t>(slot)], "slot %d has two owners", slot);
      has_owner[static_cast<size_t>(slot)] = true;
      ++swapped;
    }
  };
  for (const Owner& s : running_) {
    TM_CHECK(s->swapped().empty(), "a running sequence holds %zu slots",
             s->swapped().slots().size());
    TM_CHECK(s->blocks().num_blocks() >= blocks_.blocks_for(s->num_computed()),
             "%d blocks for %d tokens", s->blocks().num_blocks(), s->num_computed());
    TM_CHECK(s->num_published() * blocks_.block_size() <= s->num_computed(),
             "%d blocks published of %d tokens", s->num_published(), s->num_computed());
    for (int i = 0; i < s->num_published(); ++i) {
      TM_CHECK(blocks_.index().num_tokens(s->blocks().block(i)) == blocks_.block_size(),
               "published block %d is not in the index", s->blocks().block(i));
    }
    for (BlockId block : s->blocks().blocks()) ++owners[static_cast<size_t>(block)];
  }
  for (const Owner& s : waiting_) {
    TM_CHECK(s->blocks().num_blocks() == 0 && s->num_computed() == 0,
             "a waiting sequence holds %d blocks", s->blocks().num_blocks());
    note_swapped(s->swapped());
  }
  TM_CHECK(swapped == swap_space_.num_slots() - swap_space_.num_free(),
           "%d slots are held, %d of %d are free", swapped, swap_space_.num_free(),
           swap_space_.num_slots());
  for (BlockId block = 0; block < blocks_.num_blocks(); ++block) {
    const int held = owners[static_cast<size_t>(block)];
    TM_CHECK(held == blocks_.reference_count(block), "block %d: %d references, %d owners", block,
             blocks_.reference_count(block), held);
  }
}

}  // namespace turbomind
