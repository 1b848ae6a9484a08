// Ops of the decoder but for its products: embedding, norm, attention. Engine thread.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cuda_ops.h"

namespace turbomind::cuda {
namespace {

RopeArgs rope_args(const AttentionArgs& args) {
  return {.inv_freq = floats(args.rope.inv_freq),
          .attention_scaling = args.rope.attention_scaling,
          .q_norm = args.q_norm != nullptr ? floats(args.q_norm->weight) : nullptr,
          .k_norm = args.k_norm != nullptr ? floats(args.k_norm->weight) : nullptr,
          .q_norm_eps = args.q_norm != nullptr ? args.q_norm->eps : 0.0F,
          .k_norm_eps = args.k_norm != nullptr ? args.k_norm->eps : 0.0F};
}

}  // namespace

void CudaBackend::embed(const EmbedArgs& args) {
  const CudaLinear& table = as_cuda(args.table);
  if (mode_ == Mode::sign) {
    sign({1, address(args.table)});
    sign_view(args.x.data, row_bytes(args.x));
    capturable_ = capturable_ && args.overrides.empty();
    return;
  }
  split_norms_.forget(args.x.data);
  cuda::embed(context_, table.matrix.weights, table.matrix.k_padded, table.matrix.n,
              workspace_.step.token_ids, args.x.data, launch_rows(args.x.dim(0)),
              static_cast<int>(args.x.dim(1)));
  for (const EmbeddingOverride& image : args.overrides) {
    const TensorView rows = args.x.rows(image.row, image.embeddings.dim(0));
    cuda_check(cudaMemcpyAsync(rows.data, image.embeddings.data, rows.bytes(),
                               cudaMemcpyDeviceToDevice, context_.stream),
               "placing image embeddings");
  }
}

void CudaBackend::norm(const Norm& norm, ConstTensorView x, TensorView y) {
  if (mode_ == Mode::sign) {
    sign({2, address(norm.weight.data)});
    sign_view(x.data, row_bytes(x));
    sign_view(y.data, row_bytes(y));
    return;
  }
  split_norms_.forget(y.data);
  const int64_t columns = x.row_elements();
  cuda::norm(context_, dtype_,
             {.kind = norm.kind,
              .weight = floats(norm.weight),
              .bias = floats(norm.bias),
              .eps = norm.eps,
              .x = x.data,
              .y = y.data,
              .ldx = columns,
              .ldy = columns,
              .rows = launch_rows(x.dim(0)),
              .columns = static_cast<int>(columns)});
}

void CudaBackend::attention(const AttentionArgs& args) {
  const auto& cache = static_cast<const CudaKvCache&>(*args.cache);
  if (mode_ == Mode::sign) {
    sign({4, address(args.cache), static_cast<uint64_t>(args.layer),
          args.q_norm != nullptr ? address(args.q_norm->weight.data) : 0,
          args.k_norm != nullptr ? address(args.k_norm->weight.data) : 0,
          address(args.rope.inv_freq.data)});
    sign_view(args.qkv.data, row_bytes(args.qkv));
    sign_view(args.y.data, row_bytes(args.y));
    return;
  }
  Workspace& w = workspace_;
  TM_CHECK(args.num_heads <= w.spec.max_heads && args.head_dim <= w.spec.max_head_dim &&
               args.num_heads % args.num_kv_heads == 0,
           "attention with %d heads of %d; the workspace was made for %d of %d", args.num_heads,
           args.head_dim, w.spec.max_heads, w.spec.max_head_dim);
  void* layer = cache.layer(args.layer);
  const int bits = cache.spec().bits;
  const float scale = softmax_scale(args.softmax_scale, args.head_dim);
  const RopeArgs rope = rope_args(args);
  const bool fused = step_.tiles == 0;  // the decode kernel takes every row
  if (!fused) {
    rope_kv(context_, dtype_,
            {.qkv = args.qkv.data,
             .cache = layer,
             .kv_bits = bits,
             .rope = rope,
             .positions = w.step.positions,
             .slots = w.step.slots,
             .tokens = launch_rows(args.qkv.dim(0)),
             .num_heads = args.num_heads,
             .num_kv_heads = args.num_kv_heads,
             .head_dim = args.head_dim});
  }
  decode_attention(context_, dtype_,
                   {.qkv = args.qkv.data,
                    .y = args.y.data,
                    .cache = layer,
                    .kv_bits = bits,
                    .rope = fused ? rope : RopeArgs{},
                    .step = w.step,
                    .num_items = graph_rows_ > 0 ? step_.padded_items : step_.items,
                    .max_rows = std::max(step_.decode_rows, 1),
                    .records = static_cast<uint32_t*>(w.attention_records->data()),
                    .num_heads = args.num_heads,
                    .num_kv_heads = args.num_kv_heads,
                    .head_dim = args.head_dim,
                    .softmax_scale = scale});
  prefill_attention(context_, dtype_,
                    {.qkv = args.qkv.data,
                     .y = args.y.data,
                     .cache = layer,
                     .kv_bits = bits,
                     .step = w.step,
                     .tokens = static_cast<int>(args.qkv.dim(0)),
                     .num_tiles = step_.tiles,
                     .num_heads = args.num_heads,
                     .num_kv_heads = args.num_kv_heads,
                     .head_dim = args.head_dim,
                     .softmax_scale = scale});
}

}  // namespace turbomind::cuda
