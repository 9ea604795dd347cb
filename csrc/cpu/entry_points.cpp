// Entry points of the CPU backend. A block of logits is cut into tiles, which threads compute. Partial results are
// combined in the order of the tiles, so that no result depends on the number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "../fastclip.h"
#include "factors.h"
#include "guarded.h"
#include "thread_pool.h"
#include "tile.h"

namespace fastclip {
namespace {

const TileKernels* best_kernels() {
#ifdef FASTCLIP_X86
  if (__builtin_cpu_supports("avx512f")) return &kTileAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kTileAvx2;
#endif
  return &kTilePortable;
}

std::atomic<const TileKernels*>& selected_kernels() {
  static std::atomic<const TileKernels*> kernels{best_kernels()};
  return kernels;
}

struct Grid {  // tiles of a block
  int64_t M, N;
  explicit Grid(const fastclip_block& b) : M((b.M + kTileM - 1) / kTileM), N((b.N + kTileN - 1) / kTileN) {}
  int64_t size() const { return M * N; }
};

Tile tile_at(const fastclip_block& b, int64_t i, int64_t j) {
  return {b.dot + i * b.row_stride + j,
          b.row_stride,
          std::min(kTileM, b.M - i),
          std::min(kTileN, b.N - j),
          b.i0 + i + b.offset - b.j0 - j,
          b.exclude_self != 0,
          b.other == nullptr ? nullptr : b.other + i * b.row_stride + j};
}

bool valid(const fastclip_block* b) {
  return b != nullptr && b->dot != nullptr && b->M > 0 && b->N > 0 && b->row_stride >= b->N && b->i0 >= 0 && b->j0 >= 0;
}

// Partial results of one side of a block: `tiles` rows of `size` numbers, one row for each tile across.
struct Partials {
  int64_t size, tiles;
  std::vector<float> log_sums;  // maxima and sums over the negatives, with labels also over the positives
  std::vector<float> others;    // sums weighted by the cosines of other features, if there are any
  std::vector<double> pos;
  std::vector<float> tops;  // largest logits, if requested, of the negatives and with labels of the positives
  Partials(int64_t size, int64_t tiles, const fastclip_fwd_side& side)
      : size(size),
        tiles(tiles),
        log_sums((side.label != nullptr ? 4 : 2) * size * tiles),
        others(side.neg_other == nullptr ? 0 : size * tiles),
        pos(size * tiles),
        tops(side.neg_top == nullptr ? 0 : (side.label != nullptr ? 2 : 1) * size * tiles) {}
  LogSum log_sum(int64_t set, int64_t tile, int64_t k) {
    float* max = log_sums.data() + (2 * set * tiles + tile) * size + k;
    return {max, max + tiles * size, others.empty() ? nullptr : others.data() + tile * size + k};
  }
  double* pos_at(int64_t tile, int64_t k) { return pos.data() + tile * size + k; }
  float* top(int64_t set, int64_t tile, int64_t k) { return tops.data() + (set * tiles + tile) * size + k; }
  FwdSide side(const fastclip_fwd_side& all, int64_t begin, int64_t tile, int64_t k) {
    const bool labels = all.label != nullptr;
    const float* low = all.factor_low == nullptr ? nullptr : all.factor_low + begin + k;
    return {all.factor + begin + k,
            low,
            labels ? all.label + begin + k : nullptr,
            all.limit == nullptr ? nullptr : all.limit + begin + k,
            log_sum(0, tile, k),
            labels ? log_sum(1, tile, k) : LogSum{},
            pos_at(tile, k),
            all.neg_top != nullptr ? top(0, tile, k) : nullptr,
            all.neg_top != nullptr && labels ? top(1, tile, k) : nullptr,
            all.other_factor == nullptr ? nullptr : all.other_factor + begin + k};
  }
};

void add_log_sum(double* max, double* sum, double* other, LogSum part) {
  const double new_max = *part.max, new_sum = *part.sum;
  if (new_sum == 0.0) return;  // empty
  const double top = *sum == 0.0 || new_max > *max ? new_max : *max;
  const double before = *sum == 0.0 ? 0.0 : std::exp2(*max - top), now = std::exp2(new_max - top);
  *sum = *sum * before + new_sum * now;
  if (other != nullptr) *other = *other * before + *part.other * now;
  *max = top;
}

void reduce(Partials& partials, const fastclip_fwd_side& side, int64_t begin, int64_t k) {
  const int64_t at = begin + k;
  for (int64_t tile = 0; tile < partials.tiles; ++tile) {
    double* other = side.neg_other == nullptr ? nullptr : side.neg_other + at;
    add_log_sum(side.neg_max + at, side.neg_sum + at, other, partials.log_sum(0, tile, k));
    side.pos[at] += *partials.pos_at(tile, k);
    if (side.label != nullptr) add_log_sum(side.pos_max + at, side.pos_sum + at, nullptr, partials.log_sum(1, tile, k));
    if (side.neg_top == nullptr) continue;
    side.neg_top[at] = std::max(side.neg_top[at], *partials.top(0, tile, k));
    if (side.label != nullptr) side.pos_top[at] = std::max(side.pos_top[at], *partials.top(1, tile, k));
  }
}

void fwd(const fastclip_block& b, const fastclip_fwd_side& image, const fastclip_fwd_side& text, int num_threads) {
  const TileKernels& kernels = *selected_kernels().load();
  const Grid grid(b);
  Partials rows(b.M, grid.N, image), cols(b.N, grid.M, text);
  auto tile = [&](int64_t index) {
    const int64_t tile_i = index / grid.N, tile_j = index % grid.N, i = tile_i * kTileM, j = tile_j * kTileN;
    kernels.fwd(tile_at(b, i, j), rows.side(image, b.i0, tile_j, i), cols.side(text, b.j0, tile_i, j));
  };
  parallel_for(grid.size(), num_threads, tile);

  constexpr int64_t kReduce = 256;  // rows or columns per task
  const int64_t row_tasks = (b.M + kReduce - 1) / kReduce, col_tasks = (b.N + kReduce - 1) / kReduce;
  auto combine = [&](int64_t index) {
    const bool row = index < row_tasks;
    Partials& partials = row ? rows : cols;
    const int64_t begin = (row ? index : index - row_tasks) * kReduce;
    for (int64_t k = begin; k < std::min(begin + kReduce, partials.size); ++k)
      reduce(partials, row ? image : text, row ? b.i0 : b.j0, k);
  };
  parallel_for(row_tasks + col_tasks, num_threads, combine);
}

BwdSide bwd_side(const fastclip_bwd_side& s, int64_t k) {
  const auto at = [k](auto* p) { return p == nullptr ? nullptr : p + k; };
  return {at(s.factor), at(s.factor_low), at(s.inv_norm), at(s.label),   at(s.limit),
          at(s.neg),    at(s.d_neg),      at(s.d_pos),    at(s.pos_lse), at(s.d_pos_lse)};
}

void sigmoid_fwd(const fastclip_block& b, const fastclip_sigmoid& s, bool gradients, fastclip_sigmoid_sums* sums,
                 int num_threads) {
  const TileKernels& kernels = *selected_kernels().load();
  const Grid grid(b);
  std::vector<SigmoidSums> parts(static_cast<size_t>(grid.size()));
  std::vector<float> factor(static_cast<size_t>(b.M)), factor_low(factor), ones;
  if (s.image_inv_norm == nullptr) ones.assign(static_cast<size_t>(std::max(b.M, b.N)), 1.0f);
  const float* r = s.image_inv_norm == nullptr ? ones.data() : s.image_inv_norm + b.i0;
  const float* c = s.image_inv_norm == nullptr ? ones.data() : s.text_inv_norm + b.j0;
  scaled_factors(r, s.scale, b.M, factor.data(), factor_low.data());
  const auto at = [](auto* p, int64_t k) { return p == nullptr ? nullptr : p + k; };
  auto tile = [&](int64_t index) {
    const int64_t i = index / grid.N * kTileM, j = index % grid.N * kTileN;
    const SigmoidSide image{factor.data() + i, factor_low.data() + i, r + i, at(s.image_label, b.i0 + i),
                            at(s.image_limit, b.i0 + i)};
    const SigmoidSide text{c + j, nullptr, c + j, at(s.text_label, b.j0 + j), at(s.text_limit, b.j0 + j)};
    parts[index] = kernels.sigmoid(tile_at(b, i, j), image, text, s.bias, gradients);
  };
  parallel_for(grid.size(), num_threads, tile);
  for (const SigmoidSums& part : parts)
    sums->loss += part.loss, sums->d_scale += part.d_scale, sums->d_bias += part.d_bias;
}

void direction(const fastclip_block& b, const fastclip_direction& d, fastclip_direction_sums* sums, int num_threads) {
  constexpr int64_t kDirectionRows = 8;  // rows per task
  const TileKernels& kernels = *selected_kernels().load();
  std::vector<float> factor(static_cast<size_t>(b.M)), factor_low(factor), ones;
  if (d.image_inv_norm == nullptr) ones.assign(static_cast<size_t>(std::max(b.M, b.N)), 1.0f);
  const float* r = d.image_inv_norm == nullptr ? ones.data() : d.image_inv_norm + b.i0;
  const float* c = d.image_inv_norm == nullptr ? ones.data() : d.text_inv_norm;
  scaled_factors(r, d.scale * 1.44269504088896340736, b.M, factor.data(), factor_low.data());
  const bool labels = d.image_label != nullptr;
  const DirectionSide text{c, nullptr, c, d.text_label, nullptr};
  std::vector<DirectionSums> parts(static_cast<size_t>((b.M + kDirectionRows - 1) / kDirectionRows));
  auto rows = [&](int64_t index) {
    const int64_t i = index * kDirectionRows;
    Tile tile = tile_at(b, i, 0);
    tile.M = std::min(kDirectionRows, b.M - i), tile.N = b.N;
    const DirectionSide image{factor.data() + i, factor_low.data() + i, r + i,
                              labels ? d.image_label + b.i0 + i : nullptr, labels ? d.count + b.i0 + i : nullptr};
    parts[index] = kernels.direction(tile, image, text, d.row_factor == nullptr ? nullptr : d.row_factor + i);
  };
  parallel_for(static_cast<int64_t>(parts.size()), num_threads, rows);
  for (const DirectionSums& part : parts) sums->loss += part.loss, sums->d_scale += part.d_scale;
}

double bwd(const fastclip_block& b, const fastclip_bwd_side& image, const fastclip_bwd_side& text, int num_threads) {
  const TileKernels& kernels = *selected_kernels().load();
  const Grid grid(b);
  std::vector<double> d_scale(static_cast<size_t>(grid.size()));
  auto tile = [&](int64_t index) {
    const int64_t i = index / grid.N * kTileM, j = index % grid.N * kTileN;
    d_scale[index] = kernels.bwd(tile_at(b, i, j), bwd_side(image, b.i0 + i), bwd_side(text, b.j0 + j));
  };
  parallel_for(grid.size(), num_threads, tile);
  double total = 0.0;
  for (double part : d_scale) total += part;
  return total;
}

constexpr int64_t kRows = 64;  // rows per task
constexpr double kLargeNorm = 0x1p40;

template <class Task>
void for_rows(int64_t M, int num_threads, const Task& task) {  // task(first, rows)
  auto part = [&](int64_t index) { task(index * kRows, std::min(kRows, M - index * kRows)); };
  parallel_for((M + kRows - 1) / kRows, num_threads, part);
}

int64_t norms(const float* x, int64_t row_stride, int64_t M, int64_t D, float* inv_norm, float* outer,
              int num_threads) {
  const TileKernels& kernels = *selected_kernels().load();
  std::atomic<int64_t> large{0};
  for_rows(M, num_threads, [&](int64_t first, int64_t rows) {
    double norm[kRows];
    kernels.norms({x + first * row_stride, row_stride, rows, D}, norm);
    for (int64_t i = 0; i < rows; ++i) {
      const bool is_large = outer != nullptr && norm[i] > kLargeNorm;
      const float r = static_cast<float>(1.0 / (norm[i] < kSmallestNorm ? kSmallestNorm : norm[i]));
      inv_norm[first + i] = is_large ? 1.0f : r;
      if (outer != nullptr) outer[first + i] = is_large ? r : 1.0f;
      if (is_large) large.fetch_add(1, std::memory_order_relaxed);
    }
  });
  return large.load();
}

void finish(const Rows& all, const Finish& f, int num_threads) {
  const TileKernels& kernels = *selected_kernels().load();
  for_rows(all.M, num_threads, [&](int64_t first, int64_t rows) {
    const auto at = [first](const float* p) { return p == nullptr ? nullptr : p + first; };
    kernels.finish({all.x + first * all.x_stride, all.x_stride, rows, all.D},
                   {f.raw + first * f.raw_stride, f.raw_stride, at(f.inv_norm), at(f.outer), f.factor});
  });
}

}  // namespace
}  // namespace fastclip

extern "C" {

int fastclip_cpu_contrastive_fwd(const fastclip_block* block, const fastclip_fwd_side* image,
                                 const fastclip_fwd_side* text, int num_threads) {
  if (!fastclip::valid(block) || image == nullptr || text == nullptr) return FASTCLIP_INVALID_ARGUMENT;
  if ((image->label == nullptr) != (text->label == nullptr)) return FASTCLIP_INVALID_ARGUMENT;
  if ((image->limit == nullptr) != (text->limit == nullptr)) return FASTCLIP_INVALID_ARGUMENT;
  if ((image->neg_top == nullptr) != (text->neg_top == nullptr)) return FASTCLIP_INVALID_ARGUMENT;
  for (const fastclip_fwd_side* side : {image, text}) {
    const bool given = side->other_factor != nullptr && side->neg_other != nullptr && side->label == nullptr;
    const bool absent = side->other_factor == nullptr && side->neg_other == nullptr;
    if (!(block->other == nullptr ? absent : given)) return FASTCLIP_INVALID_ARGUMENT;
  }
  return fastclip::guarded([&] { fastclip::fwd(*block, *image, *text, num_threads); });
}

int fastclip_cpu_contrastive_bwd(const fastclip_block* block, const fastclip_bwd_side* image,
                                 const fastclip_bwd_side* text, double* d_scale, int num_threads) {
  if (!fastclip::valid(block) || image == nullptr || text == nullptr || d_scale == nullptr)
    return FASTCLIP_INVALID_ARGUMENT;
  if ((image->label == nullptr) != (text->label == nullptr)) return FASTCLIP_INVALID_ARGUMENT;
  if ((image->limit == nullptr) != (text->limit == nullptr)) return FASTCLIP_INVALID_ARGUMENT;
  return fastclip::guarded([&] { *d_scale = fastclip::bwd(*block, *image, *text, num_threads); });
}

int fastclip_cpu_sigmoid_fwd(const fastclip_block* block, const fastclip_sigmoid* sigmoid, int gradients,
                             fastclip_sigmoid_sums* sums, int num_threads) {
  if (!fastclip::valid(block) || sigmoid == nullptr || sums == nullptr) return FASTCLIP_INVALID_ARGUMENT;
  const fastclip_sigmoid& s = *sigmoid;
  if ((s.image_inv_norm == nullptr) != (s.text_inv_norm == nullptr)) return FASTCLIP_INVALID_ARGUMENT;
  if ((s.image_label == nullptr) != (s.text_label == nullptr)) return FASTCLIP_INVALID_ARGUMENT;
  if ((s.image_limit == nullptr) != (s.text_limit == nullptr)) return FASTCLIP_INVALID_ARGUMENT;
  return fastclip::guarded([&] { fastclip::sigmoid_fwd(*block, s, gradients != 0, sums, num_threads); });
}

int fastclip_cpu_direction(const fastclip_block* block, const fastclip_direction* direction,
                           fastclip_direction_sums* sums, int num_threads) {
  if (!fastclip::valid(block) || direction == nullptr || sums == nullptr || block->j0 != 0)
    return FASTCLIP_INVALID_ARGUMENT;
  const fastclip_direction& d = *direction;
  if ((d.image_inv_norm == nullptr) != (d.text_inv_norm == nullptr)) return FASTCLIP_INVALID_ARGUMENT;
  if ((d.image_label == nullptr) != (d.text_label == nullptr) || (d.image_label == nullptr) != (d.count == nullptr))
    return FASTCLIP_INVALID_ARGUMENT;
  return fastclip::guarded([&] { fastclip::direction(*block, d, sums, num_threads); });
}

int fastclip_cpu_norms(const float* x, int64_t row_stride, int64_t M, int64_t D, float* inv_norm, float* outer,
                       int64_t* large, int num_threads) {
  if (x == nullptr || inv_norm == nullptr || large == nullptr || M < 1 || D < 1) return FASTCLIP_INVALID_ARGUMENT;
  return fastclip::guarded([&] { *large = fastclip::norms(x, row_stride, M, D, inv_norm, outer, num_threads); });
}

int fastclip_cpu_finish(float* raw, int64_t raw_stride, const float* x, int64_t x_stride, int64_t M, int64_t D,
                        const float* inv_norm, const float* outer, float factor, int num_threads) {
  if (raw == nullptr || x == nullptr || M < 1 || D < 1) return FASTCLIP_INVALID_ARGUMENT;
  return fastclip::guarded(
      [&] { fastclip::finish({x, x_stride, M, D}, {raw, raw_stride, inv_norm, outer, factor}, num_threads); });
}

int fastclip_cpu_select_isa(const char* name) {
  using fastclip::TileKernels;
  if (name == nullptr) return FASTCLIP_INVALID_ARGUMENT;
  const TileKernels* chosen = nullptr;
  if (std::strcmp(name, "auto") == 0) chosen = fastclip::best_kernels();
  if (std::strcmp(name, "portable") == 0) chosen = &fastclip::kTilePortable;
#ifdef FASTCLIP_X86
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    chosen = &fastclip::kTileAvx2;
  if (std::strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f")) chosen = &fastclip::kTileAvx512;
#endif
  if (chosen == nullptr) return FASTCLIP_UNSUPPORTED_ISA;
  fastclip::selected_kernels().store(chosen);
  return FASTCLIP_OK;
}

const char* fastclip_cpu_isa(void) { return fastclip::selected_kernels().load()->name; }

int fastclip_cpu_select_threads(const char* name) {
  if (name == nullptr) return FASTCLIP_INVALID_ARGUMENT;
  if (std::strcmp(name, "borrowed") == 0) {
    fastclip::use_threads(fastclip::Threads::kBorrowed);
  } else if (std::strcmp(name, "pool") == 0) {
    fastclip::use_threads(fastclip::Threads::kPool);
  } else {
    return FASTCLIP_INVALID_ARGUMENT;
  }
  return FASTCLIP_OK;
}

const char* fastclip_cpu_threads(void) {
  return fastclip::threads_in_use() == fastclip::Threads::kBorrowed ? "borrowed" : "pool";
}

}  // extern "C"
