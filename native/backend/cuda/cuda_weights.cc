// Loading: checkpoint arrays through pinned staging to the device, converted or repacked there.
// Engine thread (or the thread that opens the pipeline), before the first step.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "backend/cuda/cuda_backend.h"

namespace turbomind::cuda {
namespace {

constexpr size_t kDenseChunkBytes = size_t{64} << 20;

bool is_float(DType dtype) {
  return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
}

[[noreturn]] void mismatch(const LinearSource& source, const std::string& what) {
  throw Error(ErrorCode::tensor_mismatch, format("%s: %s", source.name.c_str(), what.c_str()));
}

void check_shape(const LinearSource& source, ConstTensorView view, const char* what, int64_t rows,
                 int64_t columns) {
  if (view.rank == 2 && view.dim(0) == rows && view.dim(1) == columns) return;
  mismatch(source, format("%s is [%lld, %lld]; expected [%lld, %lld]", what,
                          static_cast<long long>(view.dim(0)), static_cast<long long>(view.dim(1)),
                          static_cast<long long>(rows), static_cast<long long>(columns)));
}

void check_source(const LinearSource& source) {
  if (source.parts.empty() || source.parts.size() > kMaxParts) {
    mismatch(source, format("%zu parts; expected 1 to %d", source.parts.size(), kMaxParts));
  }
  const int64_t k = source.in_features;
  const int64_t g = source.group_size;
  for (const LinearPart& part : source.parts) {
    const int64_t n = part.out_features;
    if (part.kind != source.kind()) mismatch(source, "parts of different kinds");
    if (part.kind == WeightKind::dense) {
      check_shape(source, part.weight, "weight", n, k);
      if (!is_float(part.weight.dtype)) mismatch(source, "weight is not f32, f16 or bf16");
    } else {
      if ((g != 32 && g != 64 && g != 128) || k % g != 0 || n % 8 != 0) {
        throw Error(ErrorCode::unsupported_quantization,
                    format("%s: awq with group_size %lld, K %lld, N %lld; expected a group size of "
                           "32, 64 or 128 that divides K, and N a multiple of 8",
                           source.name.c_str(), static_cast<long long>(g),
                           static_cast<long long>(k), static_cast<long long>(n)));
      }
      check_shape(source, part.qweight, "qweight", k, n / 8);
      check_shape(source, part.qzeros, "qzeros", k / g, n / 8);
      check_shape(source, part.scales, "scales", k / g, n);
      if (!is_float(part.scales.dtype) || part.scales.dtype != source.parts[0].scales.dtype) {
        mismatch(source, "scales are not all f16, bf16 or f32");
      }
    }
    if (part.bias && (part.bias.elements() != n || !is_float(part.bias.dtype))) {
      mismatch(source,
               format("bias of %lld elements; expected %lld floats",
                      static_cast<long long>(part.bias.elements()), static_cast<long long>(n)));
    }
  }
  if (source.order != PartOrder::gate_up) return;
  if (source.parts.size() != 2 || source.parts[0].out_features != source.parts[1].out_features ||
      source.parts[0].out_features % 8 != 0) {
    mismatch(source, "gate and up need two parts of one size, a multiple of 8");
  }
}

// Lets the kernel reclaim the pages just read before others; a hint, safe for memory that is not a
// file's. Not MADV_PAGEOUT: it takes longer than the upload and empties the page cache, so that the
// next start would read the disk again.
void drop_pages(ConstTensorView view) {
#ifdef MADV_COLD
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(view.data), page);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(view.data) + view.bytes()) / page * page;
  if (end <= begin || end - begin < (size_t{1} << 20)) return;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_COLD);
#endif
}

RowMap row_map(const LinearSource& source, size_t part) {
  if (source.order != PartOrder::gate_up) return RowMap::plain;
  return part == 0 ? RowMap::gate : RowMap::up;
}

// The row of W that row `row` of a part becomes.
PackedMatrix make_matrix(const LinearSource& source, DType dtype) {
  PackedMatrix matrix;
  matrix.kind = source.kind();
  matrix.dtype = dtype;
  matrix.n = source.out_features();
  matrix.k = source.in_features;
  matrix.n_padded = round_up<int64_t>(matrix.n, kPackRows);
  matrix.k_padded =
      round_up<int64_t>(matrix.k, matrix.kind == WeightKind::awq ? kChunkColumns : kPackColumns);
  matrix.group_size = source.group_size;
  matrix.gate_up = source.order == PartOrder::gate_up;
  matrix.segments = choose_segments(matrix.kind, matrix.n, matrix.k);
  return matrix;
}

}  // namespace

size_t CudaLinear::bytes() const {
  return weights->bytes() + (meta ? meta->bytes() : 0) + (bias ? bias->bytes() : 0);
}

size_t CudaBackend::weight_bytes(const LinearSource& source, WeightUse use) const {
  check_source(source);
  const PackedMatrix matrix = make_matrix(source, dtype_);
  const auto cells = static_cast<size_t>(matrix.n_padded * matrix.k_padded);
  size_t bytes = 0;
  if (matrix.kind == WeightKind::awq) {
    const auto groups = static_cast<size_t>(matrix.k_padded / matrix.group_size);
    bytes = buffer_bytes(cells / 2) +
            buffer_bytes(static_cast<size_t>(matrix.n_padded) * groups * sizeof(uint32_t));
  } else if (use != WeightUse::tied_head) {  // which shares the embedding's rows
    bytes = buffer_bytes(cells * 2);
  }
  const bool any = std::any_of(source.parts.begin(), source.parts.end(),
                               [](const LinearPart& part) { return static_cast<bool>(part.bias); });
  return any ? bytes + buffer_bytes(static_cast<size_t>(matrix.n_padded) * sizeof(float)) : bytes;
}

void* CudaBackend::load_scratch(size_t bytes) {
  if (!load_scratch_ || load_scratch_->bytes() < bytes) {
    synchronize();  // kernels may still read the old one
    load_scratch_.reset();
    load_scratch_ = pool_.allocate(bytes);
  }
  return load_scratch_->data();
}

void CudaBackend::release_load_scratch() {
  if (!load_scratch_ && !staged_upload_) return;
  synchronize();
  load_scratch_.reset();
  pool_.trim();
}

const void* CudaBackend::stage_to_scratch(ConstTensorView source, char*& cursor) {
  char* at = cursor;
  staged_upload_->copy(at, source.data, source.bytes(), context_.stream);
  drop_pages(source);
  cursor += round_up<size_t>(source.bytes(), 256);
  return at;
}

void CudaBackend::load_bias(const LinearSource& source, CudaLinear& linear) {
  const bool any = std::any_of(source.parts.begin(), source.parts.end(),
                               [](const LinearPart& part) { return static_cast<bool>(part.bias); });
  if (!any) return;
  linear.bias = zeroed(static_cast<size_t>(linear.matrix.n_padded) * sizeof(float));
  linear.matrix.bias = static_cast<const float*>(linear.bias->data());
  int64_t base = 0;
  for (size_t i = 0; i < source.parts.size(); ++i) {
    const LinearPart& part = source.parts[i];
    if (part.bias) {
      char* cursor = static_cast<char*>(load_scratch(part.bias.bytes() + 256));
      const void* staged = stage_to_scratch(part.bias, cursor);
      convert_vector(context_, staged, part.bias.dtype, static_cast<float*>(linear.bias->data()),
                     part.out_features, row_map(source, i), base);
    }
    base += part.out_features;
  }
}

std::unique_ptr<CudaLinear> CudaBackend::load_dense(const LinearSource& source) {
  auto linear = std::make_unique<CudaLinear>();
  linear->matrix = make_matrix(source, dtype_);
  PackedMatrix& matrix = linear->matrix;
  // An embedding table and a tied head come from the same bytes: one copy on the device.
  const void* key = source.parts[0].weight.data;
  const bool whole = source.parts.size() == 1 && !matrix.gate_up;
  if (const auto known = dense_by_source_.find(key); whole && known != dense_by_source_.end()) {
    linear->weights = known->second.lock();
    const size_t bytes = static_cast<size_t>(matrix.n_padded * matrix.k_padded) * 2;
    if (linear->weights && linear->weights->bytes() != bytes) linear->weights = nullptr;
  }
  if (!linear->weights) {
    linear->weights = zeroed(static_cast<size_t>(matrix.n_padded * matrix.k_padded) * 2);
    if (whole) dense_by_source_[key] = linear->weights;
    int64_t base = 0;
    for (size_t i = 0; i < source.parts.size(); ++i) {
      const LinearPart& part = source.parts[i];
      const int64_t row_bytes =
          part.weight.row_elements() * static_cast<int64_t>(dtype_bytes(part.weight.dtype));
      // Pieces of whole octets, so that the gate and up mapping of a piece starts at its row 0.
      const int64_t step = std::max<int64_t>(
          8, static_cast<int64_t>(kDenseChunkBytes) / std::max<int64_t>(1, row_bytes) / 8 * 8);
      for (int64_t row = 0; row < part.out_features; row += step) {
        const ConstTensorView piece =
            part.weight.rows(row, std::min(step, part.out_features - row));
        char* cursor = static_cast<char*>(load_scratch(piece.bytes() + 256));
        const void* staged = stage_to_scratch(piece, cursor);
        const int64_t first = matrix.gate_up ? 2 * row : base + row;
        convert_matrix(context_, staged, piece.dtype,
                       static_cast<char*>(linear->weights->data()) +
                           (matrix.gate_up ? first * matrix.k_padded * 2 : 0),
                       dtype_, piece.dim(0), matrix.k, matrix.k_padded, row_map(source, i),
                       matrix.gate_up ? 0 : first);
      }
      base += part.out_features;
    }
  }
  matrix.weights = linear->weights->data();
  return linear;
}

std::unique_ptr<CudaLinear> CudaBackend::load_awq(const LinearSource& source) {
  auto linear = std::make_unique<CudaLinear>();
  linear->matrix = make_matrix(source, dtype_);
  PackedMatrix& matrix = linear->matrix;
  size_t raw_bytes = 0;
  for (const LinearPart& part : source.parts) {
    for (const ConstTensorView& view : {part.qweight, part.qzeros, part.scales}) {
      raw_bytes += round_up<size_t>(view.bytes(), 256);
    }
  }
  linear->weights = pool_.allocate(static_cast<size_t>(matrix.n_padded * matrix.k_padded / 2));
  linear->meta = pool_.allocate(
      static_cast<size_t>(matrix.n_padded * (matrix.k_padded / matrix.group_size)) * 4);
  matrix.weights = linear->weights->data();
  matrix.meta = static_cast<const uint32_t*>(linear->meta->data());
  matrix.scale_is_bf16 = source.parts[0].scales.dtype == DType::bf16;

  AwqPackArgs args;
  args.num_parts = static_cast<int>(source.parts.size());
  args.scale_type = source.parts[0].scales.dtype;
  args.matrix = matrix;
  args.weights = static_cast<uint32_t*>(linear->weights->data());
  args.meta = static_cast<uint32_t*>(linear->meta->data());
  char* cursor = static_cast<char*>(load_scratch(raw_bytes));
  int64_t base = 0;
  for (int i = 0; i < args.num_parts; ++i) {
    const LinearPart& part = source.parts[static_cast<size_t>(i)];
    AwqPart& out = args.parts[i];
    out.qweight = static_cast<const uint32_t*>(stage_to_scratch(part.qweight, cursor));
    out.qzeros = static_cast<const uint32_t*>(stage_to_scratch(part.qzeros, cursor));
    out.scales = stage_to_scratch(part.scales, cursor);
    out.n = part.out_features;
    out.base = base;
    base += part.out_features;
  }
  pack_awq(context_, args);
  return linear;
}

std::unique_ptr<LinearWeight> CudaBackend::load_linear(const LinearSource& source) {
  use_device();
  check_source(source);
  std::unique_ptr<CudaLinear> linear =
      source.kind() == WeightKind::awq ? load_awq(source) : load_dense(source);
  load_bias(source, *linear);
  return linear;
}

std::unique_ptr<LinearWeight> CudaBackend::load_embedding(ConstTensorView table) {
  LinearPart part;
  part.out_features = table.dim(0);
  part.weight = table;
  LinearSource source;
  source.name = "the embedding table";
  source.in_features = table.dim(1);
  source.parts = {part};
  return load_linear(source);
}

std::unique_ptr<LinearWeight> CudaBackend::load_head(const LinearSource& source) {
  return load_linear(source);
}

std::unique_ptr<Buffer> CudaBackend::load_vector(ConstTensorView source) {
  use_device();
  if (!is_float(source.dtype)) {
    throw Error(ErrorCode::tensor_mismatch, format("a vector of %s; expected f32, f16 or bf16",
                                                   to_string(source.dtype).data()));
  }
  const int64_t count = source.elements();
  std::unique_ptr<Buffer> buffer = pool_.allocate(static_cast<size_t>(count) * sizeof(float));
  char* cursor = static_cast<char*>(load_scratch(source.bytes() + 256));
  const void* staged = stage_to_scratch(source, cursor);
  convert_vector(context_, staged, source.dtype, static_cast<float*>(buffer->data()), count,
                 RowMap::plain, 0);
  return buffer;
}

}  // namespace turbomind::cuda
