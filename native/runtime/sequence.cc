#include "runtime/sequence.h"

#include <algorithm>

#include "base/error.h"

namespace turbomind {

double ms_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

Sequence::Sequence(Request request, Clock::time_point submitted, int max_tokens,
                   BlockManager& blocks, Rank rank)
    : request_(std::move(request)),
      tokens_(std::move(request_.prompt_tokens)),
      num_tokens_(static_cast<int>(tokens_.size())),
      blocks_(blocks),
      num_prompt_tokens_(num_tokens_),
      max_new_tokens_(std::min(request_.max_new_tokens, max_tokens - num_prompt_tokens_)),
      rank_(rank),
      submitted_(submitted) {
  TM_CHECK(num_prompt_tokens_ >= 1 && (max_new_tokens_ >= 1 || request_.max_new_tokens == 0),
           "request %llu: %d prompt tokens leave %d of %d for the completion",
           static_cast<unsigned long long>(id()), num_prompt_tokens_, max_new_tokens_, max_tokens);
  request_.prompt_tokens.clear();
  tokens_.reserve(static_cast<size_t>(num_prompt_tokens_ + max_new_tokens_));
  blocks_.reserve(num_prompt_tokens_ + max_new_tokens_);
  if (request_.outputs.any()) outputs_ = std::make_shared<RequestOutputs>();
  if (request_.outputs.reads_prompt()) request_.share_prefix = false;
  images_.reserve(request_.images.size());
  for (const ImageInput& input : request_.images) {
    SequenceImage& image = images_.emplace_back();
    image.tiles = input.tiles;
    image.token_offset = input.token_offset;
    image.tokens_per_tile = input.num_tokens / input.tiles->num_tiles;
    // Without an identity its tokens look like those of any other picture.
    const auto& hash = input.tiles->content_hash;
    if (hash[0] == 0 && hash[1] == 0) request_.share_prefix = false;
  }
}

BlockContent Sequence::content(int idx, int end, std::vector<ImageSpan>& images) const {
  const int block_size = blocks_.block_size();
  const int begin = idx * block_size;
  end = std::min(end, begin + block_size);
  TM_CHECK(begin >= 0 && begin < end && end <= num_tokens(), "tokens %d to %d of %d", begin, end,
           num_tokens());
  images.clear();
  for (const SequenceImage& image : images_) {
    const int first = std::max(begin, image.token_offset);
    const int last = std::min(end, image.end());
    if (first >= last) continue;
    const auto& hash = image.tiles->content_hash;
    images.push_back({first - begin, last - first, first - image.token_offset, {hash[0], hash[1]}});
  }
  return {tokens().subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin)), images};
}

bool Sequence::expired(Clock::time_point now) const {
  const double longest = request_.queue_timeout_ms;
  return longest > 0 && !started() && ms_between(submitted_, now) > longest;
}

void Sequence::set_drafts(std::span<const TokenId> drafts) {
  tokens_.resize(static_cast<size_t>(num_tokens_));
  TM_CHECK(tokens_.size() + drafts.size() <= tokens_.capacity(),
           "%zu drafts behind %d of %d tokens", drafts.size(), num_tokens_,
           num_prompt_tokens_ + max_new_tokens_);
  tokens_.insert(tokens_.end(), drafts.begin(), drafts.end());
}

Drafter& Sequence::drafter() {
  if (!drafter_) drafter_ = std::make_unique<Drafter>(num_prompt_tokens_ + max_new_tokens_);
  return *drafter_;
}

std::span<const TokenId> Sequence::banned(int completion_idx) const {
  if (completion_idx >= request_.min_new_tokens) return {};
  return request_.stop_token_ids;
}

std::span<const uint32_t> Sequence::allowed() const {
  if (!guide_.mask || !*guide_.mask) return {};
  return **guide_.mask;
}

void Sequence::park() {
  TM_CHECK(request_.guided || request_.edits_logits, "nothing would wake it up");
  parked_ = true;
}

void Sequence::mark_scheduled(Clock::time_point now) {
  if (!scheduled_) scheduled_ = now;
}

void Sequence::advance(int count) {
  TM_CHECK(count >= 1 && count <= num_pending(), "advance by %d of %d pending tokens", count,
           num_pending());
  num_computed_ += count;
  for (SequenceImage& image : images_) {
    if (num_computed_ >= image.end()) image.encoded.reset();
  }
}

void Sequence::skip(int count) {
  if (num_preemptions_ == 0) num_cached_tokens_ += count;
  advance(count);
}

FinishReason Sequence::append(TokenId token, Clock::time_point now) {
  TM_CHECK(num_pending() == 0, "a token was drawn while %d were not computed", num_pending());
  const bool may_stop = num_completion_tokens() >= request_.min_new_tokens;
  tokens_.resize(static_cast<size_t>(num_tokens_));
  tokens_.push_back(token);
  ++num_tokens_;
  guide_.clear();
  parked_ = false;
  last_token_ = now;
  if (!first_token_) {
    first_token_ = now;
    vision_ms_to_first_token_ = vision_ms_;
  }
  const std::vector<TokenId>& stops = request_.stop_token_ids;
  if (may_stop && std::find(stops.begin(), stops.end(), token) != stops.end()) {
    finish_reason_ = FinishReason::stop;
  } else if (num_completion_tokens() >= max_new_tokens_) {
    finish_reason_ = FinishReason::length;
  }
  return finish_reason_;
}

void Sequence::preempt() {
  blocks_.clear();
  num_computed_ = 0;
  parked_ = false;
  num_published_ = 0;
  ++num_preemptions_;
}

RequestTimings Sequence::timings() const {
  RequestTimings timings;
  timings.vision_ms = vision_ms_;
  if (!scheduled_) return timings;
  timings.queue_ms = ms_between(submitted_, *scheduled_);
  if (!first_token_) return timings;
  timings.first_token_ms = ms_between(submitted_, *first_token_);
  timings.prefill_ms = ms_between(*scheduled_, *first_token_) - vision_ms_to_first_token_;
  timings.decode_ms = ms_between(*first_token_, last_token_);
  return timings;
}

}  // namespace turbomind
