// What JavaScript says about tokens: masks that come while a step runs, logits that go out and come
// back edited.
#include <algorithm>
#include <new>
#include <utility>

#include "runtime/engine_impl.h"

namespace turbomind {
namespace {

// How long a step whose logits are there waits for the masks of its guided rows.
constexpr auto kMaskPatience = std::chrono::milliseconds(2);

}  // namespace

void EngineImpl::set_mask(RequestId id, uint32_t completion_idx, TokenMask mask) {
  (void)inbox_.push(GuideMessage{id, completion_idx, std::move(mask)});
}

void EngineImpl::set_logits(RequestId id, uint32_t completion_idx, std::vector<float> logits) {
  if (logits.size() != static_cast<size_t>(rules_.vocab_size)) {
    throw Error(
        ErrorCode::invalid_argument,
        format("%zu logits for token %u of request %llu; the vocabulary has %d", logits.size(),
               completion_idx, static_cast<unsigned long long>(id), rules_.vocab_size));
  }
  (void)inbox_.push(GuideMessage{id, completion_idx, std::move(logits)});
}

// The forward runs while JavaScript computes masks. Once its logits are there, late masks get a
// moment; a sequence without one is parked, so that the others need not wait any longer.
void EngineImpl::await_masks(const StepPlan& plan) {
  const auto waits = [](const ScheduledRow& row) {
    return row.num_samples > 0 && row.sequence->needs_mask();
  };
  const auto missing = [&] { return std::any_of(plan.rows.begin(), plan.rows.end(), waits); };
  if (!missing()) return;
  model_->synchronize();
  const Clock::time_point deadline =
      Clock::now() + (stepping_ == Stepping::manual ? Clock::duration::zero() : kMaskPatience);
  do {
    inbox_.take_guides(guides_, deadline, [&](const GuideMessage& guide) {
      return std::any_of(plan.rows.begin(), plan.rows.end(), [&](const ScheduledRow& row) {
        return waits(row) && row.sequence->id() == guide.id;
      });
    });
    std::vector<Event> none;  // nothing is parked yet, so nothing can be drawn
    for (GuideMessage& guide : guides_) take_guide(std::move(guide), none);
  } while (!guides_.empty() && missing());
  for (const ScheduledRow& row : plan.rows) {
    if (waits(row)) row.sequence->park();
  }
}

// Rows whose logits JavaScript edits are parked in every step: their tokens are drawn when the
// answer comes, without another forward.
void EngineImpl::offer_logits(const StepPlan& plan, std::vector<Event>& events) {
  answered_.clear();
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    const ScheduledRow& row = plan.rows[i];
    Sequence& sequence = *row.sequence;
    if (row.num_samples == 0 || !sequence.request().edits_logits) continue;
    sequence.park();
    if (!sequence.needs_logits() && !sequence.needs_mask()) answered_.push_back(sequence.id());
    if (sequence.guide().offered) continue;  // before it was preempted
    try {
      auto offer = std::make_shared<LogitsOffer>();
      offer->completion_idx = static_cast<uint32_t>(sequence.num_completion_tokens());
      offer->logits.resize(static_cast<size_t>(rules_.vocab_size));
      model_->logits(runner_->first_row(i) + row.num_tokens - 1, offer->logits);
      Event& event = events.emplace_back();
      event.id = sequence.id();
      event.offer = std::move(offer);
      sequence.guide().offered = true;
    } catch (const std::bad_alloc&) {
      failed_.push_back(sequence.id());
    }
  }
}

void EngineImpl::take_guide(GuideMessage message, std::vector<Event>& events) {
  Sequence* sequence = scheduler_.find(message.id);
  if (sequence == nullptr) return;  // it has ended
  if (message.completion_idx != static_cast<uint32_t>(sequence->num_completion_tokens())) return;
  const Request& request = sequence->request();
  Guide& guide = sequence->guide();
  if (auto* mask = std::get_if<TokenMask>(&message.answer)) {
    if (!request.guided) return;
    guide.mask = std::move(*mask);
  } else {
    if (!guide.offered) return;
    guide.logits = std::move(std::get<std::vector<float>>(message.answer));
  }
  if (!sequence->parked() || sequence->needs_mask() || sequence->needs_logits()) return;
  if (request.edits_logits) {
    try {
      events.push_back(draw_edited(*sequence));
    } catch (const std::bad_alloc&) {
      failed_.push_back(message.id);
      end_failed(events);
    }
  } else {
    sequence->unpark();
  }
}

Event EngineImpl::draw_edited(Sequence& sequence) {
  SampleRow row;
  row.params = &sequence.request().sampling;
  row.tokens = sequence.tokens();
  row.banned = sequence.banned(sequence.num_completion_tokens());
  row.completion_idx = static_cast<uint32_t>(sequence.num_completion_tokens());
  row.allowed = sequence.allowed();
  SampleResult result;
  std::optional<Error> failure;
  const SampleStatus status = host_sampler_.sample(*sequence.guide().logits, row, result);
  if (status != SampleStatus::ok) {
    failure = Error(ErrorCode::invalid_argument,
                    format("no token can be drawn from the logits that logitsProcessor left: %s",
                           status == SampleStatus::not_finite ? "they hold NaN or infinity"
                                                              : describe(status)));
  }
  return scheduler_.commit_parked(sequence, result, failure);
}

}  // namespace turbomind
