"""The trainer: resumed and repeated runs, saved files, options."""

from __future__ import annotations

from broken import MACHINE, PROCESSES, STOPS, TRAINING, Break, Promise

PROMISES = [
    Promise(
        STOPS,
        "A resumed run has, bit for bit, the results of an uninterrupted run (on a GPU with `--deterministic`)",
        tests=[
            "training/test_trainer.py::test_resumed_run_is_the_run_that_never_stopped",
            "training/test_trainer.py::test_resumed_run_has_the_optimisers_options_it_is_given",
            "training/test_trainer.py::test_resume_names_what_changed_and_what_does_not_fit",
        ],
        breaks=[
            Break(
                "trainer: the checkpoint's weight decay stays",
                "fastclip/training/run/checkpoints.py",
                old="group.update(options)",
                new="pass",
            ),
            Break(
                "trainer: dropout goes on where it was",
                "fastclip/training/run/loop.py",
                old="seed_step(self.options.seed, step, self.world.rank)",
                new="",
            ),
            Break(
                "trainer: the average begins anew",
                "fastclip/training/run/checkpoints.py",
                old='ema.updates = state["ema_updates"]',
                new="",
            ),
            Break(
                "trainer: lines after the checkpoint stay",
                "fastclip/training/run/metrics.py",
                old='if (made := int(values["step"])) <= step:',
                new='if (made := int(values["step"])):',
            ),
            Break(
                "trainer: changes are not named",
                "fastclip/training/doubts.py",
                old="if name not in _MAY_CHANGE and then != now:",
                new="if name in _MAY_CHANGE and then != now:",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Before training, one log line each warns about settings that prevent learning or are probably not intended",
        tests=[
            "training/test_doubts.py::test_setting_that_ruins_a_run_is_told",
            "training/test_doubts.py::test_doubts_are_in_the_log_once",
            "training/test_doubts.py::test_labels_of_one_class_leave_nothing_to_learn",
            "training/test_doubts.py::test_gpus_that_stay_idle_are_told",
        ],
        breaks=[
            Break(
                "trainer: doubts are not told",
                "fastclip/training/trainer.py",
                old='        logger.warning("%s", message)',
                new="        pass",
            ),
            Break(
                "trainer: doubts of the warm-up are not had",
                "fastclip/training/doubts.py",
                old="if warmup >= steps:",
                new="if warmup < 0:",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "train() and finetune() restore PyTorch's settings, the random generators and the environment when they return",
        tests=[
            "training/test_doubts.py::test_training_leaves_the_process_as_it_was",
            "training/test_doubts.py::test_fine_tuning_leaves_the_process_and_an_embedder_in_eval_mode",
        ],
        breaks=[
            Break(
                "trainer: leaves the process deterministic",
                "fastclip/training/run/torch_settings.py",
                old="            torch.use_deterministic_algorithms(before[0], warn_only=before[1])\n",
                new="",
            ),
            Break(
                "trainer: leaves the process with its random numbers",
                "fastclip/training/run/torch_settings.py",
                old="torch.random.fork_rng(gpus), ",
                new="",
            ),
            Break(
                "finetune: leaves the process's model in training mode",
                "fastclip/training/finetune.py",
                old="            self.classifier.eval()",
                new="            pass",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "An error is raised if processes read different data",
        tests=[
            "training/test_ranks.py::test_ranks_that_see_different_data_are_told",
        ],
        breaks=[
            Break(
                "trainer: every rank has data of its own",
                "fastclip/training/trainer.py",
                old="if len(set(views)) > 1:",
                new="if len(views) < 1:",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A resumed run reports that its data has changed since the checkpoint",
        tests=[
            "training/test_faults.py::test_data_that_changed_since_the_checkpoint_is_told",
            "training/test_faults.py::test_as_many_data_in_another_order_are_told",
            "data/test_fingerprint.py::test_other_samples_have_another_fingerprint",
        ],
        breaks=[
            Break(
                "trainer: other data in silence",
                "fastclip/training/doubts.py",
                old='if (samples := before["samples"]) != len(source):',
                new='if (samples := before["samples"]) < 0:',
            ),
            Break(
                "trainer: another order in silence",
                "fastclip/data/identity.py",
                old="(*_keys(part), *_captions(part))",
                new="_captions(part)",
            ),
            Break(
                "trainer: other captions in silence",
                "fastclip/data/identity.py",
                old="(*_keys(part), *_captions(part))",
                new="_keys(part)",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Runs with the same options are bit-identical for any number of workers (on a GPU with `--deterministic`)",
        tests=[
            "training/test_trainer.py::test_run_repeats_bit_by_bit",
        ],
        breaks=[
            Break(
                "trainer: weights from whatever was drawn before",
                "fastclip/training/from_options.py",
                old="torch.manual_seed(options.seed)",
                new="",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Convolutional towers train in channels-last order, except under FSDP, and resume to the same bits",
        tests=[
            "training/test_memory_format.py::test_only_convolutional_towers_are_channels_last",
            "training/test_memory_format.py::test_resumed_run_has_the_same_bits_and_order",
            "training/test_memory_format.py::test_gradients_of_a_wrapped_run_have_the_order_of_the_weights",
        ],
        breaks=[
            Break(
                "order: weights stay as they are",
                "fastclip/training/from_options.py",
                old="memory_format=torch.channels_last",
                new="memory_format=torch.preserve_format",
            ),
            Break(
                "order: FSDP gets weights that it cannot shard",
                "fastclip/training/from_options.py",
                old="convolutions=not shards(options.parallel, world)",
                new="convolutions=True",
            ),
            Break(
                "order: the optimiser's state loses it at a resume",
                "fastclip/training/run/checkpoints.py",
                old="of_parameter[key] = torch.empty_like(p).copy_(x)",
                new="pass",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "A loss or gradient that is not finite ends the run before the update, with an error that names step "
        "and samples",
        tests=[
            "training/test_step.py::test_pixels_that_are_not_finite_stop_before_the_update",
            "training/test_step.py::test_gradient_that_is_not_finite_stops_before_the_update",
            "training/test_step.py::test_weights_and_features_that_are_not_finite_are_named",
        ],
        breaks=[
            Break(
                "trainer: the loss is not looked at",
                "fastclip/training/step/update.py",
                old="if not math.isfinite(whole):",
                new="if whole != whole and step < 0:",
            ),
            Break(
                "trainer: the gradient is not looked at",
                "fastclip/training/step/update.py",
                old="if not math.isfinite(grad_norm):",
                new="if step < 0:",
            ),
            Break(
                "trainer: text features are the images'",
                "fastclip/training/step/update.py",
                old="named(features[1:2])",
                new="named(features[:1])",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "The saved model is the one that was validated: with a moving average, it is the average",
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
        "Weight decay is applied only to matrices",
        tests=[
            "training/test_step.py::test_matrices_decay_and_nothing_else",
            "training/test_step.py::test_update_decays_matrices_only",
        ],
        breaks=[
            Break(
                "trainer: the class token decays",
                "fastclip/training/step/optim.py",
                old="sum(size > 1 for size in p.shape) >= 2",
                new="p.dim() >= 2",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Options on the command line override those in files, and later files override earlier ones",
        tests=[
            "training/test_options.py::test_options_of_files_yield_to_later_files_and_to_the_command_line",
        ],
        breaks=[
            Break(
                "trainer: files win",
                "fastclip/training/options.py",
                old='args=[*from_files, *joined("--distill", given)]',
                new="args=[*given, *from_files]",
            ),
        ],
    ),
    Promise(
        MACHINE,
        "`fastclip train --help` works without importing torch",
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
