"""Linear probes and fine-tuning."""

from __future__ import annotations

from broken import EVALUATION, STOPS, TRAINING, Break, Promise

PROMISES = [
    Promise(
        EVALUATION,
        "A linear probe equals scikit-learn's, with the penalty swept as in CLIP's paper",
        tests=[
            "evaluation/test_probe.py::test_probe_equals_scikit_learn_by_hand",
            "evaluation/test_probe.py::test_sweep_is_the_papers",
            "evaluation/test_probe.py::test_sweep_stays_in_its_range_and_amid_a_plateau",
            "evaluation/test_probe.py::test_tower_features_are_those_before_the_projection",
        ],
        breaks=[
            Break(
                "probe: C is lambda",
                "fastclip/evaluation/probe.py",
                old="C=1 / penalty",
                new="C=penalty",
            ),
            Break(
                "probe: the last fit leaves out the validation split",
                "fastclip/evaluation/probe.py",
                old="np.concatenate([x, x_val]), np.concatenate([y, y_val])",
                new="x, y",
            ),
            Break(
                "probe: a quarter of a decade is fine enough",
                "fastclip/evaluation/probe.py",
                old="while width := width // 2:",
                new="while (width := width // 2) > 1:",
            ),
            Break(
                "probe: unit vectors in place of the tower's features",
                "fastclip/evaluation/probe.py",
                old="pre_logits=True",
                new="pre_logits=False",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "A probe reports fits that did not converge; ties, and images of classes without training samples, are misses",
        tests=[
            "evaluation/test_probe.py::test_fits_that_do_not_converge_are_told",
            "evaluation/test_probe.py::test_class_that_was_not_trained_on_is_missed",
            "evaluation/test_probe.py::test_ranks_count_ties_against_the_model_and_metrics_are_scikit_learns",
        ],
        breaks=[
            Break(
                "probe: convergence is taken for granted",
                "fastclip/evaluation/probe.py",
                old="len(others) == len(caught)",
                new="True",
            ),
            Break(
                "probe: columns are taken for classes",
                "fastclip/evaluation/probe.py",
                old="scores[:, torch.from_numpy(classifier.classes_)] = decision",
                new="scores[:, : decision.shape[1]] = decision",
            ),
            Break(
                "accuracy: a tie is a hit",
                "fastclip/evaluation/classification.py",
                old="return (~(scores < least)).sum(1) - 1",
                new="return (scores > own).sum(1)",
            ),
        ],
    ),
    Promise(
        STOPS,
        "An interrupted probe resumes, and leaves no temporary files",
        tests=[
            "evaluation/test_probe.py::test_interrupted_probe_goes_on",
            "evaluation/test_probe.py::test_command_writes_clip_benchmarks_keys",
        ],
        breaks=[
            Break(
                "probe: fits are not kept",
                "fastclip/evaluation/probe.py",
                old="store.add(len(fits), part)",
                new="pass",
            ),
            Break(
                "probe: stores are not cleared",
                "fastclip/cli/evaluate/__init__.py",
                old="store.clear()",
                new="pass",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "A probe shows published numbers only for a dataset that the folder's name or `--reference` names",
        tests=[
            "evaluation/test_probe.py::test_published_numbers_are_by_name",
            "evaluation/test_probe.py::test_result_is_called_by_its_folder",
            "training/test_finetune.py::test_command_saves_the_average_and_goes_on",
        ],
        breaks=[
            Break(
                "probe: a data set by a folder above it",
                "fastclip/evaluation/published.py",
                old="if folder.name.lower() in SPLITS else",
                new="if folder.name not in _DATASETS else",
            ),
            Break(
                "fine-tuning: what nothing is evaluated for is let pass",
                "fastclip/cli/finetune.py",
                old="if not args.val_data and (",
                new="if False and (",
            ),
            Break(
                "probe: the result is called after the folder's name",
                "fastclip/cli/evaluate/probe.py",
                old="dataset=args.reference or args.test_data",
                new="dataset=reference or args.test_data",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Fine-tuning starts from the zero-shot classifier, and makes the same updates as a plain training loop",
        tests=[
            "training/test_finetune.py::test_it_begins_as_the_zero_shot_classifier",
            "training/test_finetune.py::test_steps_are_those_of_a_plain_loop",
            "training/test_finetune.py::test_head_computes_in_float32_under_autocast",
            "training/test_finetune.py::test_micro_batches_give_the_same_steps",
        ],
        breaks=[
            Break(
                "fine-tuning: the head forgets the logit scale",
                "fastclip/training/finetune.py",
                old="return scale * class_embeddings(",
                new="return class_embeddings(",
            ),
            Break(
                "fine-tuning: the warm-up's cosine is left out",
                "fastclip/training/run/loop.py",
                old='group["lr"] = lr',
                new='group["lr"] = self.options.lr',
            ),
            Break(
                "fine-tuning: the head computes in bfloat16",
                "fastclip/models/classifier.py",
                old="torch.autocast(images.device.type, enabled=False)",
                new="torch.autocast(images.device.type, torch.bfloat16)",
            ),
            Break(
                "fine-tuning: micro-batches count as batches",
                "fastclip/training/finetune.py",
                old="(each.sum() / self.options.batch_size).backward()",
                new="each.mean().backward()",
            ),
        ],
    ),
    Promise(
        STOPS,
        "Fine-tuning that was killed resumes, on a CPU to bit-identical weights, and SIGTERM saves a checkpoint",
        tests=[
            "training/test_finetune.py::test_killed_run_goes_on_to_the_same_bits",
            "training/test_finetune.py::test_signal_ends_it_with_a_checkpoint",
            "training/test_finetune.py::test_folder_of_something_else_is_refused",
        ],
        breaks=[
            Break(
                "fine-tuning: a resumed run begins at the first batch",
                "fastclip/training/run/loop.py",
                old="first_step=self.first,",
                new="first_step=0,",
            ),
            Break(
                "fine-tuning: signals wait for the end",
                "fastclip/training/finetune.py",
                old="self.options.batch_size}, status())",
                new="self.options.batch_size}, 0)",
            ),
            Break(
                "fine-tuning: goes on with other options",
                "fastclip/training/finetune.py",
                old="return {name: value for name, value in known.items() if name in asked}",
                new="return dict(asked)",
            ),
            Break(
                "fine-tuning: any folder will do",
                "fastclip/training/finetune.py",
                old='result="*", name="finetune.json"',
                new='result="*.json", name="finetune.json"',
            ),
        ],
    ),
    Promise(
        TRAINING,
        "A loss that is not finite stops fine-tuning before the update",
        tests=[
            "training/test_finetune.py::test_loss_that_is_not_finite_stops_before_the_update",
        ],
        breaks=[
            Break(
                "fine-tuning: NaN is a loss",
                "fastclip/training/finetune.py",
                old="if not math.isfinite(loss):",
                new="if False:",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Averaged weights equal the zero-shot model's at alpha 0 and the fine-tuned model's at alpha 1, bit for bit",
        tests=[
            "training/test_finetune.py::test_ensemble_is_between_the_models_and_either_at_its_ends",
            "training/test_finetune.py::test_saved_model_and_classifier_are_read_again",
            "training/test_finetune.py::test_command_saves_the_average_and_goes_on",
        ],
        breaks=[
            Break(
                "ensemble: the wrong way round",
                "fastclip/training/wise_ft.py",
                old="a.lerp(tuned[name], alpha)",
                new="a.lerp(tuned[name], 1 - alpha)",
            ),
            Break(
                "ensemble: the zero-shot state moves along",
                "fastclip/training/finetune.py",
                old="x.detach().cpu().clone()",
                new="x.detach().cpu()",
            ),
            Break(
                "fine-tuning: the fine-tuned weights are saved in place of the average",
                "fastclip/cli/finetune.py",
                old="run.mix(saved)",
                new="run.mix(1.0)",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "A frozen tower does not change in fine-tuning",
        tests=[
            "training/test_finetune.py::test_frozen_tower_stays_as_it_is",
        ],
        breaks=[
            Break(
                "fine-tuning: a frozen tower's statistics move",
                "fastclip/models/classifier.py",
                old="self.visual.eval()",
                new="pass",
            ),
        ],
    ),
]
