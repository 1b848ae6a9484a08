// Loading: checkpoint arrays go to the device through cuda_upload.h and are converted or repacked there.
// A weight's memory is taken at once and filled later, in stream order, by the time reserve_workspace
// returns. Engine thread (or the thread that opens the pipeline), before the first step.
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

bool has_bias(const LinearSource& source) {
  return std::any_of(source.parts.begin(), source.parts.end(),
                     [](const LinearPart& part) { return static_cast<bool>(part.bias); });
}

size_t staged_bytes(ConstTensorView view) { return round_up<size_t>(view.bytes(), 256); }

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
  return has_bias(source)
             ? bytes + buffer_bytes(static_cast<size_t>(matrix.n_padded) * sizeof(float))
             : bytes;
}

WeightUpload& CudaBackend::weight_upload() {
  if (!weight_upload_) {
    weight_upload_ = std::make_unique<WeightUpload>(device_, pool_, context_.stream);
  }
  return *weight_upload_;
}

// Waits for the device too: the raw arrays are in memory that goes back to the driver.
void CudaBackend::finish_loading() {
  if (!weight_upload_) return;
  weight_upload_->finish();
  weight_upload_.reset();
  pool_.trim();
  split_norms_.read_peaks(context_.stream);
}

void CudaBackend::load_bias(const LinearSource& source, CudaLinear& linear) {
  if (!has_bias(source)) return;
  linear.bias = zeroed(static_cast<size_t>(linear.matrix.n_padded) * sizeof(float));
  auto* out = static_cast<float*>(linear.bias->data());
  linear.matrix.bias = out;
  size_t bytes = 0;
  for (const LinearPart& part : source.parts) bytes += part.bias ? staged_bytes(part.bias) : 0;
  struct Piece {
    const void* staged;
    DType dtype;
    int64_t count;
    RowMap map;
    int64_t base;
  };
  std::vector<Piece> pieces;
  WeightUpload& upload = weight_upload();
  upload.begin(bytes);
  int64_t base = 0;
  for (size_t i = 0; i < source.parts.size(); ++i) {
    const LinearPart& part = source.parts[i];
    if (part.bias) {
      pieces.push_back(
          {upload.add(part.bias), part.bias.dtype, part.out_features, row_map(source, i), base});
    }
    base += part.out_features;
  }
  upload.end([context = context_, pieces = std::move(pieces), owner = linear.bias, out] {
    for (const Piece& piece : pieces) {
      convert_vector(context, piece.staged, piece.dtype, out, piece.count, piece.map, piece.base);
    }
  });
}

// Rows of a part go in pieces of whole octets, so that the gate and up mapping of a piece starts at its
// row 0.
void CudaBackend::load_dense_part(const LinearSource& source, size_t part_idx, int64_t base,
                                  const CudaLinear& linear) {
  const PackedMatrix& matrix = linear.matrix;
  const ConstTensorView weight = source.parts[part_idx].weight;
  const int64_t row_bytes = weight.row_elements() * static_cast<int64_t>(dtype_bytes(weight.dtype));
  const int64_t step = std::max<int64_t>(
      8, static_cast<int64_t>(kDenseChunkBytes) / std::max<int64_t>(1, row_bytes) / 8 * 8);
  for (int64_t row = 0; row < weight.dim(0); row += step) {
    const ConstTensorView piece = weight.rows(row, std::min(step, weight.dim(0) - row));
    const int64_t first = matrix.gate_up ? 2 * row : base + row;
    char* out = static_cast<char*>(linear.weights->data()) +
                (matrix.gate_up ? first * matrix.k_padded * 2 : 0);
    WeightUpload& upload = weight_upload();
    upload.begin(staged_bytes(piece));
    const void* staged = upload.add(piece);
    upload.end([context = context_, staged, dtype = piece.dtype, out, owner = linear.weights,
                out_dtype = dtype_, rows = piece.dim(0), k = matrix.k, ld = matrix.k_padded,
                map = row_map(source, part_idx), to = matrix.gate_up ? 0 : first] {
      convert_matrix(context, staged, dtype, out, out_dtype, rows, k, ld, map, to);
    });
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
      load_dense_part(source, i, base, *linear);
      base += source.parts[i].out_features;
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
      raw_bytes += staged_bytes(view);
    }
  }
  linear->weights = pool_.allocate(static_cast<size_t>(matrix.n_padded * matrix.k_padded / 2));
  linear->meta = pool_.allocate(
      static_cast<size_t>(matrix.n_padded * (matrix.k_padded / matrix.group_size)) * 4);
  matrix.weights = linear->weights->data();
  matrix.meta = static_cast<const uint32_t*>(linear->meta->data());

  AwqPackArgs args;
  args.num_parts = static_cast<int>(source.parts.size());
  args.scale_type = source.parts[0].scales.dtype;
  args.matrix = matrix;
  args.weights = static_cast<uint32_t*>(linear->weights->data());
  args.meta = static_cast<uint32_t*>(linear->meta->data());
  WeightUpload& upload = weight_upload();
  upload.begin(raw_bytes);
  int64_t base = 0;
  for (int i = 0; i < args.num_parts; ++i) {
    const LinearPart& part = source.parts[static_cast<size_t>(i)];
    AwqPart& out = args.parts[i];
    out.qweight = static_cast<const uint32_t*>(upload.add(part.qweight));
    out.qzeros = static_cast<const uint32_t*>(upload.add(part.qzeros));
    out.scales = upload.add(part.scales);
    out.n = part.out_features;
    out.base = base;
    base += part.out_features;
  }
  upload.end([context = context_, args, weights = linear->weights, meta = linear->meta] {
    pack_awq(context, args);
  });
  return linear;
}

std::unique_ptr<LinearWeight> CudaBackend::load_linear(const LinearSource& source) {
  use_device();
  check_source(source);
  std::unique_ptr<CudaLinear> linear =
      source.kind() == WeightKind::awq ? load_awq(source) : load_dense(source);
  load_bias(source, *linear);
  if (is_ready()) finish_loading();
  return linear;
}

std::unique_ptr<LinearWeight> CudaBackend::load_embedding(ConstTensorView table) {
  return load_linear(embedding_source(table));
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
  std::shared_ptr<Buffer> buffer = pool_.allocate(static_cast<size_t>(count) * sizeof(float));
  WeightUpload& upload = weight_upload();
  upload.begin(staged_bytes(source));
  const void* staged = upload.add(source);
  upload.end([context = context_, staged, dtype = source.dtype, buffer, count] {
    convert_vector(context, staged, dtype, static_cast<float*>(buffer->data()), count,
                   RowMap::plain, 0);
  });
  std::unique_ptr<Buffer> vector = split_norms_.track(std::move(buffer), count);
  if (is_ready()) finish_loading();
  return vector;
}

}  // namespace turbomind::cuda
