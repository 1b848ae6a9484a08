// linear: where its input comes from (as it is, padded, normed here or by the product before), which GEMM
// runs, and what it leaves for the norm behind it. Engine thread.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cuda_ops.h"

namespace turbomind::cuda {

const void* CudaBackend::padded_input(const CudaLinear& weight, const void* x, int rows,
                                      int64_t* ldx) {
  *ldx = weight.matrix.k;
  if (weight.matrix.k % 8 == 0) return x;
  // Rows that 16-byte copies cannot reach (a patch of 3 * 14 * 14 values): copied to aligned ones.
  split_norms_.forget();
  *ldx = weight.matrix.k_padded;
  TM_CHECK(static_cast<size_t>(rows) * static_cast<size_t>(*ldx) * 2 <= workspace_.scratch->bytes(),
           "%d rows of %lld exceed the workspace", rows, static_cast<long long>(*ldx));
  copy_rows(context_, x, weight.matrix.k, nullptr, workspace_.scratch->data(), *ldx, rows,
            static_cast<int>(weight.matrix.k));
  return workspace_.scratch->data();
}

void CudaBackend::run_gemm(const CudaLinear& weight, GemmArgs args) {
  if (args.m == 0) return;
  args.w = &weight.matrix;
  args.partials = static_cast<float*>(workspace_.gemm_partials->data());
  args.partial_floats = workspace_.gemm_partials->bytes() / sizeof(float);
  args.tickets = static_cast<uint32_t*>(workspace_.gemm_tickets->data());
  args.num_tickets = workspace_.gemm_tickets->bytes() / sizeof(uint32_t);
  const bool forced =
      std::any_of(gemm_table().begin(), gemm_table().end(), [&](const GemmKernel& row) {
        return row.name == forced_gemm_ && context_.sm >= row.min_sm && context_.sm <= row.max_sm &&
               row.supports(args, context_);
      });
  select_gemm(args, context_, forced ? forced_gemm_ : std::string_view{}).run(args, context_);
}

void CudaBackend::linear(const LinearArgs& args) {
  const CudaLinear& weight = as_cuda(args.weight);
  if (mode_ == Mode::sign) {
    sign({3, address(args.weight), args.norm != nullptr ? address(args.norm->weight.data) : 0,
          static_cast<uint64_t>(args.epilogue), address(args.scale.data),
          args.next_norm != nullptr ? address(args.next_norm->weight.data) : 0});
    sign_view(args.x.data, row_bytes(args.x));
    sign_view(args.y.data, row_bytes(args.y));
    return;
  }
  const int64_t k = weight.matrix.k;
  TM_CHECK(workspace_.scratch != nullptr, "linear before reserve_workspace");
  TM_CHECK(args.x.row_elements() == k && args.y.dim(0) == args.x.dim(0) &&
               args.y.row_elements() ==
                   (args.epilogue == Epilogue::silu_mul ? weight.matrix.n / 2 : weight.matrix.n) &&
               (args.epilogue == Epilogue::silu_mul) == weight.matrix.gate_up,
           "linear: x [%lld, %lld], y [%lld, %lld], W [%lld, %lld]",
           static_cast<long long>(args.x.dim(0)), static_cast<long long>(args.x.row_elements()),
           static_cast<long long>(args.y.dim(0)), static_cast<long long>(args.y.row_elements()),
           static_cast<long long>(weight.matrix.n), static_cast<long long>(k));
  const int rows = launch_rows(args.x.dim(0));
  const void* x = args.x.data;
  void* scratch = workspace_.scratch->data();
  int64_t ldx = k;
  InputNorm input_norm;
  if (args.norm != nullptr && split_norms_.has(x, args.x.dim(0), *args.norm)) {
    input_norm = split_norms_.input(context_, k, rows);
    x = scratch;
  } else if (args.norm != nullptr) {
    split_norms_.forget();
    const int64_t padded = round_up<int64_t>(k, 8);
    TM_CHECK(k % 8 == 0 && static_cast<size_t>(rows) * static_cast<size_t>(padded) * 2 <=
                               workspace_.scratch->bytes(),
             "a norm over %lld columns and %d rows", static_cast<long long>(k), rows);
    cuda::norm(context_, dtype_,
               {.kind = args.norm->kind,
                .weight = floats(args.norm->weight),
                .bias = floats(args.norm->bias),
                .eps = args.norm->eps,
                .x = x,
                .y = scratch,
                .ldx = k,
                .ldy = k,
                .rows = rows,
                .columns = static_cast<int>(k)});
    x = scratch;
  } else {
    x = padded_input(weight, x, rows, &ldx);
  }
  // z goes to scratch, unless this product reads from there.
  NextNorm next_norm;
  if (args.next_norm != nullptr && args.epilogue == Epilogue::residual && x != scratch) {
    const int64_t columns = weight.matrix.n;
    next_norm = split_norms_.next(*args.next_norm, weight.matrix.kind, columns, rows, scratch);
    TM_CHECK(next_norm.weight == nullptr ||
                 static_cast<size_t>(rows * columns) * 2 <= workspace_.scratch->bytes(),
             "a norm over %lld columns and %d rows", static_cast<long long>(columns), rows);
  }
  run_gemm(weight, {.x = x,
                    .ldx = ldx,
                    .m = rows,
                    .y = args.y.data,
                    .ldy = args.y.row_elements(),
                    .epilogue = args.epilogue,
                    .scale = floats(args.scale),
                    .input_norm = input_norm,
                    .next_norm = next_norm});
  split_norms_.forget(args.y.data);
  if (next_norm.weight != nullptr) {
    split_norms_.left(args.y.data, args.y.dim(0), *args.next_norm, next_norm);
  }
}

}  // namespace turbomind::cuda
