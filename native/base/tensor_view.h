// A typed pointer with a shape: never owns, always row-major and contiguous. `data` is a device
// pointer when it came from a device backend; only that backend may dereference it.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "base/error.h"
#include "base/types.h"

namespace turbomind {

template <class Pointer>
struct BasicTensorView {
  Pointer data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  std::array<int64_t, 4> shape{};

  BasicTensorView() = default;
  BasicTensorView(Pointer pointer, DType type, std::initializer_list<int64_t> dims)
      : data(pointer), dtype(type), rank(static_cast<int>(dims.size())) {
    TM_CHECK(dims.size() <= 4, "tensor rank %zu exceeds 4", dims.size());
    int i = 0;
    for (int64_t dim : dims) shape[i++] = dim;
  }
  // A mutable view converts to a const one.
  template <class Other>
    requires(!std::is_same_v<Other, Pointer>)
  BasicTensorView(const BasicTensorView<Other>& other)  // NOLINT(google-explicit-constructor)
      : data(other.data), dtype(other.dtype), rank(other.rank), shape(other.shape) {}

  explicit operator bool() const { return data != nullptr; }
  int64_t dim(int i) const { return i < rank ? shape[i] : 1; }
  int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  size_t bytes() const { return static_cast<size_t>(elements()) * dtype_bytes(dtype); }
  int64_t row_elements() const { return rank == 0 || shape[0] == 0 ? 0 : elements() / shape[0]; }

  // Rows [begin, begin + count) of the first dimension.
  BasicTensorView rows(int64_t begin, int64_t count) const {
    TM_CHECK(rank > 0 && begin >= 0 && count >= 0 && begin + count <= shape[0],
             "rows [%lld, %lld) of a tensor with %lld rows", static_cast<long long>(begin),
             static_cast<long long>(begin + count), static_cast<long long>(dim(0)));
    BasicTensorView part = *this;
    using Byte =
        std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    part.data = static_cast<Byte*>(data) + begin * row_elements() * dtype_bytes(dtype);
    part.shape[0] = count;
    return part;
  }
  template <class T>
  auto as() const {
    using Out = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const T, T>;
    return static_cast<Out*>(data);
  }
};

using TensorView = BasicTensorView<void*>;
using ConstTensorView = BasicTensorView<const void*>;

}  // namespace turbomind
