// Logits of a prompt, computed between two steps with blocks of its own.
#include <future>
#include <utility>

#include "runtime/engine_impl.h"

namespace turbomind {
namespace {

// Exceptions do not cross threads: the error travels as a value.
struct LogitsAnswer {
  std::vector<float> logits;
  std::optional<Error> error;
};

}  // namespace

std::vector<float> EngineImpl::prompt_logits(const Request& request) {
  if (stepping_ == Stepping::manual) {
    if (inbox_.closed()) throw closed_error();
    drain();
    return compute_prompt_logits(request);
  }
  TM_CHECK(std::this_thread::get_id() != thread_id_, "prompt_logits called by the sink");
  std::promise<LogitsAnswer> promise;
  std::future<LogitsAnswer> future = promise.get_future();
  // References are safe: this function waits until the call was made.
  CallMessage message{[this, &promise, &request](CallOutcome outcome) {
    LogitsAnswer answer;
    try {
      if (outcome == CallOutcome::closed) throw closed_error();
      answer.logits = compute_prompt_logits(request);
    } catch (...) {
      answer.error = to_error(std::current_exception());
    }
    promise.set_value(std::move(answer));
  }};
  if (!inbox_.push(std::move(message))) throw closed_error();
  LogitsAnswer answer = future.get();
  if (answer.error) throw *answer.error;
  return std::move(answer.logits);
}

// Runs between two steps, with blocks of its own that are back before the next plan.
std::vector<float> EngineImpl::compute_prompt_logits(const Request& request) {
  if (dead_) throw *dead_;
  if (std::optional<Error> problem = check_request(request, rules_)) throw *problem;
  const int num_tokens = static_cast<int>(request.prompt_tokens.size());
  const Admission admission = scheduler_.fits(num_tokens);
  if (admission.admit == Admit::never) throw Error(admission.code, admission.reason);
  Sequence sequence(request, Clock::now(), num_tokens + 1, blocks_);
  scheduler_.open_images(sequence);
  if (!sequence.blocks().grow_to(num_tokens)) {
    throw Error(ErrorCode::out_of_memory,
                format("logits of a prompt of %d tokens need %d KV blocks; %d of %d are free while "
                       "%d sequences run; ask again when they have ended",
                       num_tokens, blocks_.blocks_for(num_tokens), blocks_.num_free(),
                       blocks_.num_blocks(), scheduler_.num_running()));
  }
  std::vector<float> logits(static_cast<size_t>(rules_.vocab_size));
  StepPlan plan;
  while (sequence.num_pending() > 0) {
    plan.clear();
    StepBudget budget{scheduler_.limits().max_prefill_token_num, scheduler_.limits().max_tiles};
    scheduler_.limit_held_tiles(budget);
    const int count = plan.add_prefill(sequence, budget);
    if (count == 0) {
      throw Error(ErrorCode::out_of_memory,
                  format("the pictures of %d running sequences leave no room for those of this "
                         "prompt; ask again when they have ended",
                         scheduler_.num_running()));
    }
    try {
      if (plan.num_samples == 1) {
        runner_->run_logits(plan, logits);
      } else {
        runner_->run(plan);
      }
    } catch (...) {
      runner_->discard();
      plan.clear();  // others may show the same picture
      throw;
    }
    sequence.advance(count);
  }
  return logits;
}

}  // namespace turbomind
