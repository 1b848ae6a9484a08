// See pointwise.h.
#include "backend/cpu/pointwise.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "backend/cpu/kernels/float_formats.h"
#include "backend/cpu/kernels/row_norm.h"

namespace turbomind::cpu {
namespace {

constexpr int64_t kRowGrain = 8;

}  // namespace

void normalize_rows(const Norm& norm, const float* x, float* y, int64_t rows, int64_t n, Isa isa,
                    ThreadPool& pool) {
  const RowNorm row = row_norm_of(norm, n);
  pool.parallel_for(rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row_norm(row, x + r * n, y + r * n, n, isa);
  });
}

void to_float(const void* from, DType dtype, int64_t count, float* to) {
  const auto* halves = static_cast<const uint16_t*>(from);
  switch (dtype) {
    case DType::f32:
      std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
      return;
    case DType::bf16:
      for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_f32(halves[i]);
      return;
    case DType::f16:
      for (int64_t i = 0; i < count; ++i) to[i] = f16_to_f32(halves[i]);
      return;
    default:
      break;
  }
  throw Error(ErrorCode::tensor_mismatch,
              format("a tensor of dtype %s cannot be read as numbers; expected f32, f16 or bf16",
                     std::string(to_string(dtype)).c_str()));
}

CpuEmbedding::CpuEmbedding(ConstTensorView table) : table_(table) {
  const bool number =
      table.dtype == DType::f32 || table.dtype == DType::f16 || table.dtype == DType::bf16;
  if (number && table.rank == 2 && table.shape[0] > 0 && table.shape[1] > 0) {
    rows_ = FileRows(table.data, table.bytes());
    return;
  }
  throw Error(ErrorCode::tensor_mismatch,
              format("the embedding table has rank %d and dtype %s; expected [V, H] of f32, f16 "
                     "or bf16",
                     table.rank, std::string(to_string(table.dtype)).c_str()));
}

bool CpuEmbedding::read_row(TokenId id, float* to) const {
  constexpr int64_t kChunk = 2048;
  alignas(64) uint8_t bytes[kChunk * sizeof(float)];
  const int64_t hidden = table_.shape[1];
  const size_t width = dtype_bytes(table_.dtype);
  for (int64_t i = 0; i < hidden; i += kChunk) {
    const int64_t count = std::min(kChunk, hidden - i);
    const size_t offset = static_cast<size_t>(id * hidden + i) * width;
    if (!rows_.read(offset, static_cast<size_t>(count) * width, bytes)) return false;
    to_float(bytes, table_.dtype, count, to + i);
  }
  return true;
}

void embed(const EmbedArgs& args, std::span<const TokenId> token_ids, ThreadPool& pool) {
  const auto* table = dynamic_cast<const CpuEmbedding*>(args.table);
  TM_CHECK(table != nullptr, "embed needs a table made by load_embedding");
  const int64_t hidden = table->in_features();
  const auto tokens = static_cast<int64_t>(token_ids.size());
  TM_CHECK(args.x.dtype == DType::f32 && args.x.elements() == tokens * hidden,
           "embed output holds %lld values, %lld tokens of %lld are needed",
           static_cast<long long>(args.x.elements()), static_cast<long long>(tokens),
           static_cast<long long>(hidden));
  for (TokenId id : token_ids) {
    TM_CHECK(id >= 0 && id < table->out_features(), "token id %d, vocabulary of %lld", id,
             static_cast<long long>(table->out_features()));
  }
  float* x = args.x.as<float>();
  std::atomic<bool> unreadable = false;
  pool.parallel_for(tokens, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (!table->read_row(token_ids[t], x + t * hidden)) unreadable = true;
    }
  });
  if (unreadable) throw file_changed_error("the embedding table");
  for (const EmbeddingOverride& part : args.overrides) {
    const int64_t rows = part.embeddings.dim(0);
    TM_CHECK(part.embeddings.dtype == DType::f32 && part.embeddings.elements() == rows * hidden &&
                 part.row >= 0 && part.row + rows <= tokens,
             "embedding override of rows [%d, %lld) over %lld tokens", part.row,
             static_cast<long long>(part.row + rows), static_cast<long long>(tokens));
    std::memcpy(x + part.row * hidden, part.embeddings.data, part.embeddings.bytes());
  }
}

}  // namespace turbomind::cpu
