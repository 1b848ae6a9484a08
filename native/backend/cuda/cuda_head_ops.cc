// The head and sampling: logits of rows to the sampler, what start_sample has launched, and what the
// sampler needs to know of the step. Drawing is cuda_sampler.cc's. Engine thread.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cuda_ops.h"

namespace turbomind::cuda {

void CudaBackend::compute_logits(const LogitsArgs& args, const int32_t* gather, int rows) {
  use_device();
  const CudaLinear& head = as_cuda(args.head);
  Workspace& w = workspace_;
  TM_CHECK(w.sampler != nullptr && head.matrix.n <= w.spec.vocab_size,
           "a head of %lld rows; the workspace was made for %lld",
           static_cast<long long>(head.matrix.n), static_cast<long long>(w.spec.vocab_size));
  const int64_t hidden = args.x.row_elements();
  TM_CHECK(hidden == head.matrix.k && hidden % 8 == 0, "a head over %lld columns of %lld",
           static_cast<long long>(head.matrix.k), static_cast<long long>(hidden));
  split_norms_.forget();
  void* x = w.scratch->data();
  if (args.norm != nullptr) {
    cuda::norm(context_, dtype_,
               {.kind = args.norm->kind,
                .weight = floats(args.norm->weight),
                .bias = floats(args.norm->bias),
                .eps = args.norm->eps,
                .x = args.x.data,
                .y = x,
                .ldx = hidden,
                .ldy = hidden,
                .gather = gather,
                .rows = rows,
                .columns = static_cast<int>(hidden)});
  } else {
    copy_rows(context_, args.x.data, hidden, gather, x, hidden, rows, static_cast<int>(hidden));
  }
  run_gemm(head, {.x = x,
                  .ldx = hidden,
                  .m = rows,
                  .y = w.sampler->logits(),
                  .ldy = head.matrix.n,
                  .y_is_f32 = true});
}

void CudaBackend::launch_head(const SampleArgs& args, int rows) {
  compute_logits({.head = args.head, .norm = args.norm, .x = args.x}, workspace_.step.sample_rows,
                 rows);
  workspace_.sampler->scan(context_, rows, as_cuda(args.head).matrix.n, sampled_step());
}

SampledStep CudaBackend::sampled_step() const {
  const StepArrays& step = workspace_.step;
  return {.slot = step_.slot,
          .device_slot = step.block_stride + 2,
          .token_ids = step.token_ids,
          .fed_rows = workspace_.fed_rows};
}

void CudaBackend::start_sample(const SampleArgs& args) {
  TM_CHECK(workspace_.sampler != nullptr, "sampling before reserve_workspace");
  step_.started_head = args.head;
  if (mode_ == Mode::sign) {
    sign({5, address(args.head), args.norm != nullptr ? address(args.norm->weight.data) : 0});
    sign_view(args.x.data, row_bytes(args.x));
    capacity_rows_ = std::min<int64_t>(capacity_rows_, workspace_.sampler->sizes().rows);
    return;
  }
  // Padding rows of a captured step repeat row 0.
  launch_head(args, graph_rows_ > 0 ? graph_rows_ : step_.rows);
}

SampledStep CudaBackend::ready_to_sample(const SampleArgs& args) {
  TM_CHECK(static_cast<int>(args.rows.size()) == step_.rows && workspace_.sampler != nullptr,
           "%zu sample rows for a step that wants %d", args.rows.size(), step_.rows);
  use_device();
  if (step_.started_head != args.head) launch_head(args, step_.rows);
  step_.started_head = args.head;
  return sampled_step();
}

void CudaBackend::sample(const SampleArgs& args) {
  TM_CHECK(args.results.size() == args.rows.size(), "%zu results for %zu rows", args.results.size(),
           args.rows.size());
  if (args.rows.empty()) return;
  const SampledStep step = ready_to_sample(args);
  workspace_.sampler->sample(context_, as_cuda(args.head).matrix.n, args.rows, args.results, step);
}

bool CudaBackend::launch_sample(const SampleArgs& args) {
  if (args.rows.empty()) return false;
  const SampledStep step = ready_to_sample(args);
  return workspace_.sampler->launch(context_, as_cuda(args.head).matrix.n, args.rows, step);
}

void CudaBackend::collect_sample(std::span<SampleResult> results) {
  use_device();
  workspace_.sampler->collect(results);
}

void CudaBackend::logits(const LogitsArgs& args, std::span<float> out) {
  const int64_t rows = args.x.dim(0);
  const int64_t vocab = as_cuda(args.head).matrix.n;
  TM_CHECK(static_cast<int64_t>(out.size()) == rows * vocab, "%zu logits for %lld rows of %lld",
           out.size(), static_cast<long long>(rows), static_cast<long long>(vocab));
  step_.started_head = nullptr;  // its logits are overwritten
  const int64_t room = workspace_.sampler->sizes().rows;
  for (int64_t begin = 0; begin < rows; begin += room) {
    const int64_t count = std::min(room, rows - begin);
    LogitsArgs part = args;
    part.x = args.x.rows(begin, count);
    compute_logits(part, nullptr, static_cast<int>(count));
    download(out.data() + begin * vocab,
             ConstTensorView(workspace_.sampler->logits(), DType::f32, {count, vocab}));
  }
}

}  // namespace turbomind::cuda
