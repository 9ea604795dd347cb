// Tests of the native CPU code through its C interface alone, to be run under sanitizers. `test_cpu [group ...]` runs
// the named groups, or all without arguments. CMakeLists.txt registers each group.
#include <cstring>
#include <string>
#include <thread>
#include <utility>

#include "../cpu/thread_pool.h"
#include "contrastive.h"
#include "direction.h"
#include "loss.h"
#include "resize.h"
#include "sigmoid.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#define FASTCLIP_POSIX 1
#endif

namespace {

// Tiles are 64 x 512 and vectors have 8 or 16 columns: sizes on both sides of each edge.
constexpr std::pair<int64_t, int64_t> kShapes[] = {{1, 1},    {1, 3},    {7, 5},    {63, 511}, {64, 512},
                                                   {65, 513}, {3, 1030}, {130, 31}, {129, 17}};

template <class Body>
void for_each_isa(const Body& body) {
  for (const char* isa : {"avx512", "avx2", "portable"}) {
    if (fastclip_cpu_select_isa(isa) != FASTCLIP_OK) {
      std::printf("  skipped: this processor or build has no %s\n", isa);
      continue;
    }
    CHECK(std::strcmp(fastclip_cpu_isa(), isa) == 0, "%s runs", fastclip_cpu_isa());
    const int before = g_failures;
    body();
    if (g_failures != before) std::fprintf(stderr, "  with %s\n", isa);
  }
  CHECK(fastclip_cpu_select_isa("auto") == FASTCLIP_OK, "auto");
}

void check_contrastive(const ContrastiveCase& c) { ContrastiveRun(c).check(); }

void contrastive() {
  for_each_isa([] {
    for (const auto& [M, N] : kShapes)
      for (bool labels : {false, true})
        for (bool maxima : {false, true}) {
          ContrastiveCase c{M, N, labels};
          c.maxima = maxima, c.others = maxima && !labels;
          check_contrastive(c);
          c.exclude_self = true;  // has no meaning without labels
          check_contrastive(c);
          c.limits = true;
          check_contrastive(c);
        }
  });
}

void logits_far_apart() {  // one exponential per logit is not accurate here, so the repair runs
  for_each_isa([] {
    for (double scale : {200.0, 900.0})
      for (bool labels : {false, true}) {
        ContrastiveCase c{66, 530, labels};
        c.scale = scale, c.others = !labels;
        check_contrastive(c);
        c.limits = true;
        check_contrastive(c);
      }
    ContrastiveCase c{66, 530};
    c.rows_far_apart = true;
    check_contrastive(c);
  });
}

void offsets_and_blocks() {
  for (int64_t offset : {-70, -3, 0, 5, 600, 10000})
    for (bool labels : {false, true})
      for (int64_t block : {int64_t{1} << 20, int64_t{50}}) {
        ContrastiveCase c{70, 570, labels, /*exclude_self=*/true};
        c.offset = offset, c.block_m = block, c.block_n = 7 * block, c.others = !labels;
        check_contrastive(c);
      }
}

void bitwise_over_threads() {
  for (const char* kind : {"borrowed", "pool"}) {
    CHECK(fastclip_cpu_select_threads(kind) == FASTCLIP_OK, "%s", kind);
    for (bool labels : {false, true}) {
      ContrastiveCase c{300, 1100, labels};
      c.threads = 1, c.others = !labels;
      ContrastiveRun first(c);
      first.run();
      for (int threads : {2, 3, 8}) {
        c.threads = threads;
        ContrastiveRun other(c);
        other.run();
        CHECK(first.equals(other), "%d threads, %s", threads, kind);
      }
    }
  }
}

void nan_and_infinity_stay() {
  for_each_isa([] {
    for (float value : {std::nanf(""), HUGE_VALF, 3e38f})  // 3e38 overflows to infinity in the logit
      for (bool labels : {false, true}) {
        if (labels && !std::isnan(value)) continue;  // the sum of positives is a double, in which 3e38 stays finite
        ContrastiveCase c{66, 530, labels};
        ContrastiveRun run(c);
        run.dot.at(65, 529) = value;
        run.run();
        const auto stays = [](const ContrastiveSide& side, size_t k) {
          return !std::isfinite(side.neg_max[k] + std::log2(side.neg_sum[k]) + side.pos[k]);
        };
        CHECK(stays(run.image, 65), "row, %g", value);
        CHECK(stays(run.text, 529), "column, %g", value);
        CHECK(!std::isfinite(run.weights.at(65, 529)), "weight %g, %g", run.weights.at(65, 529), value);
        CHECK(!std::isfinite(run.d_scale), "d_scale %g, %g", run.d_scale, value);
        CHECK(!stays(run.image, 64) && !stays(run.text, 0), "others are not finite either, %g", value);
      }
  });
}

void sigmoid() {
  for_each_isa([] {
    for (const auto& [M, N] : kShapes) SigmoidRun(M, N, 10.0, -10.0, 0).check(10.0);
    SigmoidRun(66, 530, 5.0, -45.0, 3).check(5.0);  // losses of 1e-18 at negatives and 45 at positives
    SigmoidRun(66, 530, 5.0, 45.0, 10000).check(5.0);
    SigmoidRun(66, 530, 10.0, 0.0, -5).check(10.0);
    for (const auto& [M, N] : kShapes) {
      SigmoidRun(M, N, 10.0, -4.0, 0).with_limits().check(10.0);
      SigmoidRun(M, N, 10.0, -4.0, 0).with_labels(false).check(10.0);
      SigmoidRun(M, N, 10.0, -4.0, 1).with_labels(true).with_limits().check(10.0);
    }
  });
  SigmoidRun first(300, 1100, 10.0, -9.0, 0);
  first.run(true, 1);
  for (int threads : {2, 3, 8}) {
    SigmoidRun other(300, 1100, 10.0, -9.0, 0);
    other.run(true, threads);
    CHECK(other.out.data == first.out.data && std::memcmp(&other.sums, &first.sums, sizeof first.sums) == 0,
          "%d threads", threads);
  }
}

void direction() {
  for_each_isa([] { direction_accurate(kShapes); });
  direction_threads();
  direction_refusals();
}

void threads() {
  CHECK(fastclip_cpu_select_threads("pool") == FASTCLIP_OK, "pool");
  for (int64_t count : {0, 1, 2, 1000}) {
    std::vector<int> hits(static_cast<size_t>(count), 0);
    auto task = [&](int64_t index) { ++hits[static_cast<size_t>(index)]; };
    fastclip::parallel_for(count, 4, task);
    for (int hit : hits) CHECK(hit == 1, "an index ran %d times", hit);
  }
  ContrastiveCase c{130, 1100, true};
  ContrastiveRun expected(c);
  expected.run();
  std::vector<std::thread> callers;
  std::vector<int> wrong(4, 0);
  for (size_t k = 0; k < wrong.size(); ++k)
    callers.emplace_back([&, k] {
      for (int round = 0; round < 5; ++round) {
        ContrastiveRun mine(c);
        mine.run();
        wrong[k] += !mine.equals(expected);
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (int count : wrong) CHECK(count == 0, "%d runs beside others differ", count);
}

void after_fork() {
#if defined(FASTCLIP_POSIX) && !defined(__SANITIZE_THREAD__)  // ThreadSanitizer cannot follow threads into a child
  CHECK(fastclip_cpu_select_threads("pool") == FASTCLIP_OK, "pool");
  ContrastiveCase c{130, 1100, true};
  ContrastiveRun expected(c);
  expected.run();  // the parent's workers exist before the fork
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // a hang becomes a failure
    ContrastiveRun mine(c);
    mine.run();
    _exit(mine.equals(expected) ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "child: %d", status);
#else
  std::printf("  skipped: no fork here\n");
#endif
}

// Not under ThreadSanitizer, whose shadow memory would take 34 GB.
#if defined(FASTCLIP_POSIX) && defined(MAP_NORESERVE) && !defined(__SANITIZE_THREAD__)
void rows_far_apart(int64_t rows, int64_t stride) {
  constexpr int64_t kColumns = 20;
  const size_t bytes = static_cast<size_t>(stride * (rows - 1) + kColumns) * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::printf("  skipped: the system does not lend %zu bytes of address space\n", bytes);
    return;
  }
  float* far = static_cast<float*>(memory);  // only the touched pages exist
  ContrastiveCase c{rows, kColumns};
  ContrastiveRun expected(c), run(c);
  expected.run();
  for (int64_t i = 0; i < rows; ++i) std::memcpy(far + i * stride, &run.dot.at(i, 0), kColumns * sizeof(float));
  const fastclip_block block{far, stride, rows, kColumns, 0, 0, 0, 0, nullptr};
  const fastclip_fwd_side f_image = run.image.fwd(c, true), f_text = run.text.fwd(c, false);
  CHECK(fastclip_cpu_contrastive_fwd(&block, &f_image, &f_text, 1) == FASTCLIP_OK, "forward");
  const fastclip_bwd_side b_image = run.image.bwd(c, true), b_text = run.text.bwd(c, false);
  CHECK(fastclip_cpu_contrastive_bwd(&block, &b_image, &b_text, &run.d_scale, 1) == FASTCLIP_OK, "backward");
  for (int64_t i = 0; i < rows; ++i) std::memcpy(&run.weights.at(i, 0), far + i * stride, kColumns * sizeof(float));
  CHECK(run.equals(expected), "rows far apart give other results");
  munmap(memory, bytes);
}
#endif

void rows_beyond_2_to_the_31() {
#if defined(FASTCLIP_POSIX) && defined(MAP_NORESERVE) && !defined(__SANITIZE_THREAD__)
  rows_far_apart(3, (int64_t{1} << 30) + 64);   // the rows of one tile
  rows_far_apart(66, (int64_t{1} << 25) + 64);  // the second tile
#else
  std::printf("  skipped: no sparse memory here\n");
#endif
}

void invalid_arguments() {
  ContrastiveCase c{4, 5, true};
  ContrastiveRun run(c);
  const fastclip_fwd_side f_image = run.image.fwd(c, true), f_text = run.text.fwd(c, false);
  const fastclip_block good{run.dot.data.data(), run.dot.stride, 4, 5, 0, 0, 0, 0, nullptr};
  const auto fwd = [&](fastclip_block block) { return fastclip_cpu_contrastive_fwd(&block, &f_image, &f_text, 1); };
  const auto with = [&](auto member, auto value) {
    fastclip_block block = good;
    block.*member = value;
    return block;
  };
  constexpr int kInvalid = FASTCLIP_INVALID_ARGUMENT;
  CHECK(fwd(good) == FASTCLIP_OK, "good");
  CHECK(fwd(with(&fastclip_block::dot, static_cast<float*>(nullptr))) == kInvalid, "no dots");
  CHECK(fwd(with(&fastclip_block::M, int64_t{0})) == kInvalid, "M");
  CHECK(fwd(with(&fastclip_block::N, int64_t{-1})) == kInvalid, "N");
  CHECK(fwd(with(&fastclip_block::row_stride, int64_t{4})) == kInvalid, "row_stride");
  CHECK(fwd(with(&fastclip_block::i0, int64_t{-1})) == kInvalid, "i0");
  CHECK(fwd(with(&fastclip_block::other, static_cast<const float*>(good.dot))) == kInvalid, "others without factors");
  CHECK(fastclip_cpu_contrastive_fwd(nullptr, &f_image, &f_text, 1) == kInvalid, "no block");
  CHECK(fastclip_cpu_contrastive_fwd(&good, nullptr, &f_text, 1) == kInvalid, "no images");
  fastclip_fwd_side one = f_text;
  one.label = nullptr;
  CHECK(fastclip_cpu_contrastive_fwd(&good, &f_image, &one, 1) == kInvalid, "labels on one side");
  one = f_text, one.neg_top = nullptr;
  CHECK(fastclip_cpu_contrastive_fwd(&good, &f_image, &one, 1) == kInvalid, "maxima on one side");
  const fastclip_bwd_side b_image = run.image.bwd(c, true), b_text = run.text.bwd(c, false);
  CHECK(fastclip_cpu_contrastive_bwd(&good, &b_image, &b_text, nullptr, 1) == kInvalid, "no d_scale");
  fastclip_sigmoid_sums sums{};
  float x[4] = {};
  const int32_t y[4] = {};
  const fastclip_sigmoid plain{nullptr, nullptr, 1.0, 0.0f, nullptr, nullptr, nullptr, nullptr};
  fastclip_sigmoid one_norm = plain, one_label = plain, one_limit = plain;
  one_norm.text_inv_norm = x, one_label.image_label = y, one_limit.text_limit = x;
  CHECK(fastclip_cpu_sigmoid_fwd(&good, &one_norm, 1, &sums, 1) == kInvalid, "norms on one side");
  CHECK(fastclip_cpu_sigmoid_fwd(&good, &one_label, 1, &sums, 1) == kInvalid, "labels on one side");
  CHECK(fastclip_cpu_sigmoid_fwd(&good, &one_limit, 1, &sums, 1) == kInvalid, "limits on one side");
  CHECK(fastclip_cpu_sigmoid_fwd(&good, &plain, 1, nullptr, 1) == kInvalid, "no sums");
  CHECK(fastclip_cpu_sigmoid_fwd(&good, nullptr, 1, &sums, 1) == kInvalid, "no problem");
  std::vector<double> saved(FASTCLIP_LOSS_HEADER + 5 * FASTCLIP_LOSS_ROW);
  const fastclip_loss loss{4, 0, 1.0, 0.5, saved.data()};
  double value = 0.0;
  CHECK(fastclip_cpu_loss_fwd(&loss, &good, &value, 1) == kInvalid, "a block that is larger than the problem");
  CHECK(fastclip_cpu_loss_fwd(&loss, nullptr, &value, 1) == kInvalid, "no block");
  CHECK(fastclip_cpu_loss_bwd(nullptr, &good, &value, 1) == kInvalid, "no loss");
  const fastclip_loss no_room{5, 0, 1.0, 0.5, nullptr};
  CHECK(fastclip_cpu_loss_fwd(&no_room, &good, &value, 1) == kInvalid, "nothing saved");
  int64_t large = 0;
  CHECK(fastclip_cpu_norms(x, 2, 2, 0, x, nullptr, &large, 1) == kInvalid, "D");
  CHECK(fastclip_cpu_norms(nullptr, 2, 2, 2, x, nullptr, &large, 1) == kInvalid, "no rows");
  CHECK(fastclip_cpu_finish(nullptr, 2, x, 2, 2, 2, nullptr, nullptr, 1.0f, 1) == kInvalid, "no products");
  CHECK(fastclip_cpu_select_isa("mmx") == FASTCLIP_UNSUPPORTED_ISA, "mmx");
  CHECK(fastclip_cpu_select_isa(nullptr) == kInvalid, "no name");
  CHECK(fastclip_cpu_select_threads("many") == kInvalid, "many");
}

void loss_of_pairs() {
  for_each_isa([] {
    for (const auto& [N, D] : {std::pair<int64_t, int64_t>{1, 8}, {2, 1}, {7, 3}, {64, 33}, {130, 40}, {9, 4200}})
      for (bool normalize : {false, true}) {
        LossCase c{N, D, normalize};
        if (!normalize) c.scale /= static_cast<double>(D);
        LossRun(c).check();
      }
    LossCase c{130, 16};
    c.image_weight = 0.75, c.block_m = 50, c.block_n = 70;
    LossRun(c).check();
    c.large_row = 0x1p80f;
    LossRun(c).check();
    LossCase solved{40, 64};
    solved.solved = true, solved.scale = 100.0;
    LossRun(solved).check();
    LossCase negative{40, 64};
    negative.scale = -20.0;
    LossRun(negative).check();
  });
  for (const char* kind : {"borrowed", "pool"}) {
    CHECK(fastclip_cpu_select_threads(kind) == FASTCLIP_OK, "%s", kind);
    LossCase c{600, 6};
    c.threads = 1;
    LossRun first(c);
    first.run();
    for (int threads : {2, 3, 8}) {
      c.threads = threads;
      LossRun other(c);
      other.run();
      CHECK(first.equals(other), "%d threads, %s", threads, kind);
    }
  }
}

struct Group {
  const char* name;
  void (*run)();
};
constexpr Group kGroups[] = {{"contrastive", contrastive},
                             {"logits_far_apart", logits_far_apart},
                             {"offsets_and_blocks", offsets_and_blocks},
                             {"bitwise_over_threads", bitwise_over_threads},
                             {"nan_and_infinity_stay", nan_and_infinity_stay},
                             {"sigmoid", sigmoid},
                             {"direction", direction},
                             {"loss_of_pairs", loss_of_pairs},
                             {"threads", threads},
                             {"after_fork", after_fork},
                             {"rows_beyond_2_to_the_31", rows_beyond_2_to_the_31},
                             {"resize", resize},
                             {"invalid_arguments", invalid_arguments}};

}  // namespace

int main(int argc, char** argv) {
  int ran = 0;
  for (const Group& group : kGroups) {
    bool wanted = argc == 1;
    for (int k = 1; k < argc; ++k) wanted |= std::string(argv[k]) == group.name;
    if (!wanted) continue;
    const int before = g_failures;
    group.run();
    ++ran;
    std::printf("%s %s\n", g_failures == before ? "ok    " : "FAILED", group.name);
  }
  if (ran == 0) std::fprintf(stderr, "no such group\n");
  return g_failures != 0 || ran == 0 ? 1 : 0;
}
