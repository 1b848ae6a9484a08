#include "runtime/output_collector.h"

#include <algorithm>
#include <new>

namespace turbomind {
namespace {

constexpr int kGroup = 16;  // rows read at once where they are not kept

}  // namespace

void OutputCollector::collect(const StepPlan& plan, const ModelRunner& runner,
                              std::vector<RequestId>& failed) {
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    RequestOutputs* out = plan.rows[i].sequence->outputs();
    if (out == nullptr) continue;
    try {
      collect_row(plan.rows[i], runner.first_row(i), *out);
    } catch (const std::bad_alloc&) {
      failed.push_back(plan.rows[i].sequence->id());
    }
  }
}

void OutputCollector::collect_row(const ScheduledRow& row, int first_row, RequestOutputs& out) {
  const Sequence& sequence = *row.sequence;
  const OutputSpec& spec = sequence.request().outputs;
  const int begin = sequence.num_computed();
  const Rows all{begin, begin + row.num_tokens, first_row - begin};
  const Rows fresh = all.from(out.next_position);
  if (fresh.count() == 0) return;
  const Rows generation = fresh.from(sequence.num_prompt_tokens() - 1);
  if (spec.logits != OutputRange::none) {
    append_logits(spec.logits == OutputRange::all ? fresh : generation, out.logits);
  }
  if (spec.hidden_states != OutputRange::none) {
    append_hidden(spec.hidden_states == OutputRange::all ? fresh : generation, out.hidden_states);
  }
  const Rows prompt = fresh.until(sequence.num_prompt_tokens());
  if (spec.pooling != Pooling::none) pool(sequence, prompt, out);
  if (spec.prompt_nll) score(sequence, prompt.until(sequence.num_prompt_tokens() - 1), out);
  out.next_position = fresh.end;
}

void OutputCollector::append_logits(const Rows& rows, std::vector<float>& out) {
  const size_t columns = static_cast<size_t>(rules_.vocab_size);
  const size_t count = static_cast<size_t>(rows.count()) * columns;
  if (count == 0) return;
  out.resize(out.size() + count);
  model_.logits(rows.begin + rows.offset, std::span(out).last(count));
}

void OutputCollector::append_hidden(const Rows& rows, std::vector<float>& out) {
  const size_t columns = static_cast<size_t>(rules_.hidden_size);
  const size_t count = static_cast<size_t>(rows.count()) * columns;
  if (count == 0) return;
  out.resize(out.size() + count);
  model_.hidden_states(rows.begin + rows.offset, std::span(out).last(count));
}

// Sums in float64 in the order of positions, so that chunks of any size give the same bits.
void OutputCollector::pool(const Sequence& sequence, const Rows& rows, RequestOutputs& out) {
  const int last = sequence.num_prompt_tokens() - 1;
  const bool mean = sequence.request().outputs.pooling == Pooling::mean;
  const auto columns = static_cast<size_t>(rules_.hidden_size);
  out.pooled.resize(columns, 0.0);
  const Rows wanted = mean ? rows : rows.from(last);
  for (int begin = wanted.begin; begin < wanted.end; begin += kGroup) {
    buffer_.clear();
    append_hidden(wanted.from(begin).until(begin + kGroup), buffer_);
    for (size_t i = 0; i < buffer_.size(); ++i) out.pooled[i % columns] += buffer_[i];
  }
  if (!mean || rows.end <= last) return;
  for (double& value : out.pooled) value /= sequence.num_prompt_tokens();
}

void OutputCollector::score(const Sequence& sequence, const Rows& rows, RequestOutputs& out) {
  const auto vocab = static_cast<size_t>(rules_.vocab_size);
  for (int begin = rows.begin; begin < rows.end; begin += kGroup) {
    buffer_.clear();
    append_logits(rows.from(begin).until(begin + kGroup), buffer_);
    for (size_t i = 0; i * vocab < buffer_.size(); ++i) {
      const TokenId target = sequence.tokens()[static_cast<size_t>(begin) + i + 1];
      if (target == rules_.image_token_id) continue;
      const std::span<float> logits = std::span(buffer_).subspan(i * vocab, vocab);
      const double score = logits[static_cast<size_t>(target)];
      out.nll += sampler_.log_sum_exp(logits) - score;
      ++out.num_nll_tokens;
    }
  }
}

}  // namespace turbomind
