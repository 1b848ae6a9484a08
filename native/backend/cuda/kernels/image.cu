// The vision tower's data movement: pixels to normalised patch rows, class token and positions,
// pixel shuffle. Bound by memory bandwidth; all together under a percent of the tower's time.
#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {
namespace {

constexpr int kThreads = 256;

// One CTA a patch.
template <class T>
__global__ void patchify_kernel(const PatchifyLaunch args) {
  grid_dependency_wait();
  grid_dependency_launch();
  const int side = args.image_size / args.patch_size;
  const int patch = blockIdx.x % (side * side);
  const int tile = blockIdx.x / (side * side);
  const int area = args.patch_size * args.patch_size;
  const uint8_t* pixels =
      args.tiles + static_cast<int64_t>(tile) * args.image_size * args.image_size * 3;
  T* out = static_cast<T*>(args.patches) + static_cast<int64_t>(blockIdx.x) * 3 * area;
  for (int i = threadIdx.x; i < 3 * area; i += kThreads) {
    const int channel = i / area;
    const int y = patch / side * args.patch_size + i % area / args.patch_size;
    const int x = patch % side * args.patch_size + i % args.patch_size;
    const float value =
        static_cast<float>(pixels[(static_cast<int64_t>(y) * args.image_size + x) * 3 + channel]);
    out[i] = from_float<T>((value / 255.0F - args.mean[channel]) / args.std[channel]);
  }
}

// One CTA a row of x.
template <class T>
__global__ void vision_embed_kernel(const T* patches, const float* cls, const float* positions,
                                    T* x, int num_patches, int columns) {
  grid_dependency_wait();
  grid_dependency_launch();
  const int token = blockIdx.x % (num_patches + 1);
  const int64_t tile = blockIdx.x / (num_patches + 1);
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    const float value =
        token == 0 ? cls[i] : to_float(patches[(tile * num_patches + token - 1) * columns + i]);
    x[static_cast<int64_t>(blockIdx.x) * columns + i] =
        from_float<T>(value + positions[static_cast<int64_t>(token) * columns + i]);
  }
}

// One CTA an output token; 2-byte elements.
__global__ void pixel_shuffle_kernel(const uint16_t* x, uint16_t* y, int grid, int factor,
                                     int columns) {
  grid_dependency_wait();
  grid_dependency_launch();
  const int out_side = grid / factor;
  const int64_t tile = blockIdx.x / (out_side * out_side);
  const int token = blockIdx.x % (out_side * out_side);
  const int width = factor * factor * columns;
  for (int i = threadIdx.x; i < width; i += kThreads) {
    const int part = i / columns;
    const int row = token / out_side * factor + part / factor;
    const int column = token % out_side * factor + part % factor;
    const int64_t source = tile * (grid * grid + 1) + 1 + row * grid + column;
    y[static_cast<int64_t>(blockIdx.x) * width + i] = x[source * columns + i % columns];
  }
}

}  // namespace

void patchify(const LaunchContext& context, DType dtype, const PatchifyLaunch& args) {
  const int side = args.image_size / args.patch_size;
  visit_dtype(dtype, [&]<class T>() {
    launch(patchify_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(args.num_tiles * side * side)), .threads = kThreads},
           context.stream, context.programmatic, args);
  });
}

void vision_embed(const LaunchContext& context, DType dtype, const void* patches, const float* cls,
                  const float* positions, void* x, int num_tiles, int num_patches, int columns) {
  visit_dtype(dtype, [&]<class T>() {
    launch(
        vision_embed_kernel<T>,
        {.grid = dim3(static_cast<unsigned>(num_tiles * (num_patches + 1))), .threads = kThreads},
        context.stream, context.programmatic, static_cast<const T*>(patches), cls, positions,
        static_cast<T*>(x), num_patches, columns);
  });
}

void pixel_shuffle(const LaunchContext& context, const void* x, void* y, int num_tiles, int grid,
                   int factor, int columns) {
  const int out_side = grid / factor;
  launch(
      pixel_shuffle_kernel,
      {.grid = dim3(static_cast<unsigned>(num_tiles * out_side * out_side)), .threads = kThreads},
      context.stream, context.programmatic, static_cast<const uint16_t*>(x),
      static_cast<uint16_t*>(y), grid, factor, columns);
}

}  // namespace turbomind::cuda
