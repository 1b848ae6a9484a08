// Ops of the vision tower that are not linear or norm. Engine thread.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cuda_ops.h"

namespace turbomind::cuda {

void CudaBackend::patchify(const PatchifyArgs& args) {
  use_device();
  const size_t bytes = args.tiles.bytes();
  if (!tiles_ || tiles_->bytes() < bytes) {
    synchronize();
    tiles_.reset();
    tiles_ = pool_.allocate(bytes);
  }
  staged_upload_->copy(tiles_->data(), args.tiles.data, bytes, context_.stream);
  PatchifyLaunch launch_args{.tiles = static_cast<const uint8_t*>(tiles_->data()),
                             .patches = args.patches.data,
                             .num_tiles = static_cast<int>(args.tiles.dim(0)),
                             .image_size = static_cast<int>(args.tiles.dim(1)),
                             .patch_size = args.patch_size};
  std::copy_n(args.mean, 3, launch_args.mean);
  std::copy_n(args.std, 3, launch_args.std);
  cuda::patchify(context_, dtype_, launch_args);
}

void CudaBackend::vision_embed(const VisionEmbedArgs& args) {
  use_device();
  const auto tokens = static_cast<int>(args.x.dim(0) / args.num_tiles);
  cuda::vision_embed(context_, dtype_, args.patches.data, floats(args.cls), floats(args.positions),
                     args.x.data, args.num_tiles, tokens - 1,
                     static_cast<int>(args.x.row_elements()));
}

void CudaBackend::vision_attention(const VisionAttentionArgs& args) {
  use_device();
  const int64_t columns = static_cast<int64_t>(args.num_heads) * args.head_dim;
  const Norm* norms[2] = {args.q_norm, args.k_norm};
  for (int part = 0; part < 2; ++part) {
    if (norms[part] == nullptr) continue;
    void* x = static_cast<char*>(args.qkv.data) + part * columns * 2;
    cuda::norm(context_, dtype_,
               {.kind = norms[part]->kind,
                .weight = floats(norms[part]->weight),
                .bias = floats(norms[part]->bias),
                .eps = norms[part]->eps,
                .x = x,
                .y = x,
                .ldx = 3 * columns,
                .ldy = 3 * columns,
                .rows = static_cast<int>(args.qkv.dim(0)),
                .columns = static_cast<int>(columns)});
  }
  tile_attention(context_, dtype_,
                 {.qkv = args.qkv.data,
                  .y = args.y.data,
                  .num_tiles = args.num_tiles,
                  .tokens = args.tokens_per_tile,
                  .num_heads = args.num_heads,
                  .head_dim = args.head_dim,
                  .softmax_scale = softmax_scale(0.0F, args.head_dim)});
}

void CudaBackend::pixel_shuffle(const PixelShuffleArgs& args) {
  use_device();
  cuda::pixel_shuffle(context_, args.x.data, args.y.data, args.num_tiles, args.grid, args.factor,
                      static_cast<int>(args.x.row_elements()));
}

}  // namespace turbomind::cuda
