#include "simd_avx512.h"
// clang-format off: the vector type comes first
#include "contrastive_bwd_tile.h"
#include "contrastive_fwd_tile.h"
#include "direction_tile.h"
#include "rows_tile.h"
#include "sigmoid_fwd_tile.h"
// clang-format on

namespace fastclip {
extern const TileKernels kTileAvx512{"avx512",       contrastive_fwd_tile, contrastive_bwd_tile, sigmoid_fwd_tile,
                                     direction_tile, norms_of_rows,        finish_rows};
}  // namespace fastclip
