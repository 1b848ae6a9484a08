// Reads logits and hidden states of a step's rows for the requests that asked for them, once for
// each position, however often it is computed. Leaves sampling to the model. Engine thread.
#pragma once

#include <span>
#include <vector>

#include "backend/host_sampler.h"
#include "runtime/model_runner.h"
#include "runtime/request_check.h"

namespace turbomind {

class OutputCollector {
 public:
  OutputCollector(Model& model, const RequestRules& rules) : model_(model), rules_(rules) {}

  // After the forward of `plan` and before its commit. Appends to `failed` the requests whose outputs
  // the host has no memory for.
  void collect(const StepPlan& plan, const ModelRunner& runner, std::vector<RequestId>& failed);

 private:
  void collect_row(const ScheduledRow& row, int first_row, RequestOutputs& out);
  // Positions [begin, end) of a sequence; position p is row p + offset of the step.
  struct Rows {
    int begin = 0;
    int end = 0;
    int offset = 0;
    int count() const { return end > begin ? end - begin : 0; }
    Rows from(int position) const { return {position > begin ? position : begin, end, offset}; }
    Rows until(int position) const { return {begin, position < end ? position : end, offset}; }
  };
  void append_logits(const Rows& rows, std::vector<float>& out);
  void append_hidden(const Rows& rows, std::vector<float>& out);
  void pool(const Sequence& sequence, const Rows& rows, RequestOutputs& out);
  void score(const Sequence& sequence, const Rows& rows, RequestOutputs& out);

  Model& model_;
  RequestRules rules_;
  HostSampler sampler_;
  std::vector<float> buffer_;  // of kGroup rows
};

}  // namespace turbomind
