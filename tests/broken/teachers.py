"""Training with teachers."""

from __future__ import annotations

from broken import COST, PROCESSES, STOPS, TRAINING, Break, Promise

_STEP = "fastclip/training/step/distillation.py"
_TESTS = "training/test_distill.py::"

PROMISES = [
    Promise(
        TRAINING,
        "`--distill` adds the loss of frozen teachers, which may take images of another size, to that of the "
        "batch, also in micro-batches",
        tests=[
            f"{_TESTS}test_loss_is_the_sum_of_both_formulas",
            f"{_TESTS}test_micro_batches_equal_the_whole_batch",
            f"{_TESTS}test_teachers_are_frozen_and_students_learn_from_them",
            f"{_TESTS}test_teacher_is_not_compiled",
            f"{_TESTS}test_options_and_their_files",
        ],
        breaks=[
            Break(
                "texts of a teacher in the order of their lengths",
                _STEP,
                old="text_order.in_batch_order(text)",
                new="text",
            ),
            Break(
                "the student's normalisation for all",
                _STEP,
                old="PixelNormalization.of(model.config)",
                new="PixelNormalization((0.5,) * 3, (0.5,) * 3)",
            ),
            Break("the scale of a teacher is its logarithm", _STEP, old="scale.exp()", new="scale"),
            Break(
                "a teacher in training mode",
                _STEP,
                old="model.eval().requires_grad_(False)",
                new="model.requires_grad_(False)",
            ),
            Break(
                "no weight",
                "fastclip/training/step/update.py",
                old="both[0] + self.distillation.weight * both[1]",
                new="both[0] + both[1]",
            ),
            Break(
                "the last --distill alone",
                "fastclip/training/options.py",
                old='*joined("--distill", given)',
                new="*given",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Teachers that do not fit the student, or the other options, are refused by name before training",
        tests=[
            f"{_TESTS}test_mistakes_are_named_before_training",
            f"{_TESTS}test_teacher_with_broken_features_is_named",
        ],
        breaks=[
            Break(
                "another tokenizer",
                "fastclip/training/teachers.py",
                old="if _identity(theirs) != _identity(ours):",
                new="if False:",
            ),
            Break("a shorter context", "fastclip/training/teachers.py", old="if longest < length:", new="if False:"),
        ],
    ),
    Promise(
        STOPS,
        "A run with teachers resumes bit for bit, and says if a teacher has other weights than before",
        tests=[f"{_TESTS}test_resumed_run_is_the_run_that_never_stopped"],
        breaks=[
            Break(
                "the digest is not compared",
                "fastclip/training/doubts.py",
                old='if before.get("teachers", []) != list(teachers):',
                new="if False:",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "Two processes train a student of teachers as one does, with DDP and with FSDP2",
        tests=[f"{_TESTS}test_two_ranks_train_as_one"],
        breaks=[
            Break(
                "each process compares its own pairs only",
                "fastclip/training/teachers.py",
                old="group=world.group,",
                new="group=None,",
            ),
        ],
    ),
    Promise(
        COST,
        "`fastclip plan` and `--micro-batch auto` count the memory of teachers",
        tests=[f"{_TESTS}test_plan_counts_the_teachers", f"{_TESTS}test_micro_batch_auto_leaves_room_for_the_teachers"],
        breaks=[
            Break(
                "auto: teachers are forgotten",
                "fastclip/training/planning/choose.py",
                old="plan_teachers(teachers,",
                new="plan_teachers([],",
            ),
            Break(
                "plan: the features of teachers are forgotten",
                "fastclip/training/planning/teachers.py",
                old=" + pairs * self.features",
                new="",
            ),
        ],
    ),
]
