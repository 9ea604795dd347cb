"""The trainer: resumed and repeated runs, what is saved, options."""

from __future__ import annotations

from broken import MACHINE, PROCESSES, STOPS, TRAINING, Break, Promise

PROMISES = [
    Promise(
        STOPS,
        "A resumed run has the losses and metrics of one that never stopped, bit for bit",
        tests=[
            "training/test_trainer.py::test_resumed_run_is_the_run_that_never_stopped",
            "training/test_trainer.py::test_resumed_run_has_the_optimisers_options_it_is_given",
            "training/test_trainer.py::test_resume_names_what_changed_and_what_does_not_fit",
        ],
        breaks=[
            Break(
                "trainer: the checkpoint's weight decay stays",
                "fastclip/training/checkpoint.py",
                old="group.update(options)",
                new="pass",
            ),
            Break(
                "trainer: dropout goes on where it was",
                "fastclip/training/trainer.py",
                old="seed_step(options.seed, step, world.rank)",
                new="",
            ),
            Break(
                "trainer: the average begins anew",
                "fastclip/training/checkpoint.py",
                old='ema.updates = state["ema_updates"]',
                new="",
            ),
            Break(
                "trainer: lines after the checkpoint stay",
                "fastclip/training/metrics.py",
                old='if int(parse_json(line, str(file))["step"]) <= step:',
                new="if parse_json(line, str(file)):",
            ),
            Break(
                "trainer: changes are not named",
                "fastclip/training/trainer.py",
                old="for change in _changes(",
                new="for change in () and _changes(",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "Processes that see different data raise an error",
        tests=[
            "training/test_ranks.py::test_ranks_that_see_different_data_are_told",
        ],
        breaks=[
            Break(
                "trainer: every rank has data of its own",
                "fastclip/training/trainer.py",
                old="if len(set(told)) > 1:",
                new="if len(told) < 1:",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A resumed run says that its data changed since the checkpoint",
        tests=[
            "training/test_faults.py::test_data_that_changed_since_the_checkpoint_is_told",
        ],
        breaks=[
            Break(
                "trainer: other data in silence",
                "fastclip/training/trainer.py",
                old='if (samples := state["samples"]) != len(self.source):',
                new='if (samples := state["samples"]) < 0:',
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Runs with the same options are equal bit for bit, whatever their number of workers",
        tests=[
            "training/test_trainer.py::test_run_repeats_bit_by_bit",
        ],
        breaks=[
            Break(
                "trainer: weights from whatever was drawn before",
                "fastclip/training/building.py",
                old="torch.manual_seed(options.seed)",
                new="",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "A loss or gradient that is not finite ends the run before the update, with step and samples",
        tests=[
            "training/test_step.py::test_pixels_that_are_not_finite_stop_before_the_update",
            "training/test_step.py::test_gradient_that_is_not_finite_stops_before_the_update",
            "training/test_step.py::test_weights_and_features_that_are_not_finite_are_named",
        ],
        breaks=[
            Break(
                "trainer: the loss is not looked at",
                "fastclip/training/step.py",
                old="if not math.isfinite(whole):",
                new="if whole != whole and step < 0:",
            ),
            Break(
                "trainer: the gradient is not looked at",
                "fastclip/training/step.py",
                old="if not norm.isfinite():",
                new="if step < 0:",
            ),
            Break(
                "trainer: text features are the images'",
                "fastclip/training/step.py",
                old="named(features[1:2])",
                new="named(features[:1])",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "The model that is saved is the one that was validated, the moving average where there is one",
        tests=[
            "training/test_trainer.py::test_saved_model_is_the_one_that_was_validated",
            "training/test_trainer.py::test_average_is_what_is_saved",
        ],
        breaks=[
            Break(
                "trainer: the weights themselves are saved",
                "fastclip/training/trainer.py",
                old="with self._averaged():",
                new="if True:",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Weight decay is applied to matrices and to nothing else",
        tests=[
            "training/test_step.py::test_matrices_decay_and_nothing_else",
            "training/test_step.py::test_update_decays_matrices_only",
        ],
        breaks=[
            Break(
                "trainer: the class token decays",
                "fastclip/training/optim.py",
                old="sum(size > 1 for size in p.shape) >= 2",
                new="p.dim() >= 2",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Options of the command line win over those of files, and later files over earlier ones",
        tests=[
            "training/test_options.py::test_options_of_files_yield_to_later_files_and_to_the_command_line",
        ],
        breaks=[
            Break(
                "trainer: files win",
                "fastclip/training/options.py",
                old="args=[*from_files, *given]",
                new="args=[*given, *from_files]",
            ),
        ],
    ),
    Promise(
        MACHINE,
        "`fastclip train --help` needs no torch",
        tests=[
            "training/test_options.py::test_help_names_every_option_and_loads_no_torch",
        ],
        breaks=[
            Break(
                "trainer: options import torch",
                "fastclip/training/options.py",
                old="import difflib",
                new="import difflib; import torch",
            ),
        ],
    ),
]
