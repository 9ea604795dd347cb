"""The distillation loss."""

from __future__ import annotations

from broken import COST, KEEP, NUMBERS, PROCESSES, TORCH, Break, Promise

PROMISES = [
    Promise(
        NUMBERS,
        "The distillation loss of any number of teachers is within 1e-5 of float64, gradients within 3e-5, also near 0",
        tests=[
            "losses/test_distillation.py::test_loss_and_gradients_accurate",
            "losses/test_distillation.py::test_confident_loss_keeps_digits",
            "losses/test_distillation.py::test_accurate_in_many_blocks",
            "losses/test_distillation.py::test_accurate_on_every_instruction_set",
        ],
        breaks=[
            Break(
                "the mean of a column lacks the factor of its text",
                "csrc/cpu/contrastive_fwd_tile.h",
                old="col_sums.other[j] *= text.other_factor[j], good",
                new="good",
            ),
            Break(
                "means of blocks are added without their maxima",
                "csrc/cpu/entry_points.cpp",
                old="*other = *other * before + *part.other * now",
                new="*other += *part.other * now",
            ),
            Break(
                "a teacher's weights replace those before",
                "fastclip/_backends/cpu/distillation.py",
                old="total.add_(weight)",
                new="total.copy_(weight)",
            ),
            Break(
                "a teacher weighs by its own norms",
                "fastclip/_backends/cpu/distillation.py",
                old="sides = zip(other.factors, student.inv_norms, of_teachers, d_cosine)",
                new="sides = zip(other.factors, other.inv_norms, of_teachers, d_cosine)",
            ),
        ],
    ),
    Promise(
        COST,
        "Distillation from a teacher of the same D takes at most 12 M N D operations, in one workspace of fixed size",
        tests=["losses/test_distillation.py::test_work_is_six_products_at_most"],
        breaks=[
            Break(
                "the second block is not counted",
                "fastclip/_backends/cpu/blocks.py",
                old="floats //= parts",
                new="floats //= 1",
            ),
            Break(
                "the product of the teacher is made twice",
                "fastclip/_backends/cpu/blocks.py",
                old="        return dot, (dot.data_ptr(), *dots[1:])\n",
                new=(
                    "        torch.mm(image.rows(i0, i0 + M), text.rows(j0, j0 + N).T, out=dot)\n"
                    "        return dot, (dot.data_ptr(), *dots[1:])\n"
                ),
            ),
        ],
    ),
    Promise(
        TORCH,
        "The distillation loss works with torch.compile, autocast, checkpointing and torch.func",
        tests=[
            "losses/test_distillation_torch.py::test_ops_pass_opcheck",
            "losses/test_distillation_torch.py::test_compiles_whole",
            "losses/test_distillation_torch.py::test_autocast_rounds_features_and_not_the_scales",
            "losses/test_distillation_torch.py::test_recorded_and_simulated_calls",
            "losses/test_distillation_torch.py::test_reference_gradcheck_twice",
        ],
        breaks=[
            Break(
                "the fake means have another shape",
                "fastclip/ops/distillation.py",
                old="image.new_empty((K, size), dtype=wide)",
                new="image.new_empty(size, dtype=wide)",
            ),
            Break(
                "scales are rounded under autocast",
                "fastclip/losses/distillation.py",
                old="image, text, scale = autocast_features(*tensors)",
                new="image, text, scale = (x.to(autocast_features(image, text)[0].dtype) for x in tensors)",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "The distillation loss over the shards of several processes is that of one process",
        tests=[
            "distributed/test_distillation.py::test_loss_and_gradients_accurate",
            "distributed/test_distillation.py::test_none_is_the_ranks_own_losses",
            "distributed/test_distillation.py::test_ranks_that_disagree_raise_everywhere",
        ],
        breaks=[
            Break(
                "the means of the ranks count the same",
                "fastclip/distributed/statistics.py",
                old="(shares * cosines).sum(0)",
                new="cosines.mean(0)",
            ),
            Break(
                "scales of teachers are not compared",
                "fastclip/losses/distillation.py",
                old='"teacher_logit_scale": scales}',
                new='"teacher_logit_scale": 0 * scales}',
            ),
        ],
    ),
    Promise(
        KEEP,
        "`DistillClipLoss` has open_clip's signature, values and gradients, in one process and in several",
        tests=[
            "losses/test_distillation_torch.py::test_module_has_open_clip_signature",
            "losses/test_distillation_torch.py::test_module_equals_open_clip",
            "distributed/test_distillation.py::test_module_is_open_clips",
            "integrations/test_integrations.py::test_open_clip_losses_are_the_same",
            "integrations/test_overrides.py::test_changed_loss_of_open_clip_keeps_its_numbers",
        ],
        breaks=[
            Break(
                "the two losses change places",
                "fastclip/losses/distillation.py",
                old="    return contrastive, distillation\n",
                new="    return distillation, contrastive\n",
            ),
            Break(
                "patches: a teacher that learns is not seen",
                "fastclip/integrations/open_clip.py",
                old="ours is distill_clip_loss and _teacher_learns(args, kwargs)",
                new="False",
            ),
            Break(
                "patches: inherited methods are not watched",
                "fastclip/integrations/patching.py",
                old="inspect.getattr_static(self.owner, name, None)",
                new="vars(self.owner).get(name)",
            ),
        ],
    ),
]
