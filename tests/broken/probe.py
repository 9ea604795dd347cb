"""Linear probes and fine-tuning."""

from __future__ import annotations

from broken import Break, Promise

PROBE, TUNE = "fastclip/evaluation/probe.py", "fastclip/training/finetune.py"
TEST_PROBE, TEST_TUNE = "evaluation/test_probe.py", "training/test_finetune.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Probes and fine-tuning": [
        Promise(
            "a linear probe is scikit-learn's, its penalty swept as in CLIP's paper",
            (f"{TEST_PROBE}::test_probe_equals_scikit_learn_by_hand", f"{TEST_PROBE}::test_sweep_is_the_papers", f"{TEST_PROBE}::test_sweep_stays_in_its_range_and_amid_a_plateau", f"{TEST_PROBE}::test_tower_features_are_those_before_the_projection"),
            (
                Break("probe: C is lambda", PROBE, "C=1 / penalty", "C=penalty"),
                Break("probe: the last fit leaves out the validation split", PROBE, "np.concatenate([x, x_val]), np.concatenate([y, y_val])", "x, y"),
                Break("probe: a quarter of a decade is fine enough", PROBE, "    while width := width // 2:", "    while (width := width // 2) > 1:"),
                Break("probe: unit vectors in place of the tower's features", PROBE, "pre_logits=True", "pre_logits=False"),
            ),
        ),
        Promise(
            "what scikit-learn says of convergence is told; a class that was not trained on is missed; a tie is a miss",
            (f"{TEST_PROBE}::test_fits_that_do_not_converge_are_told", f"{TEST_PROBE}::test_class_that_was_not_trained_on_is_missed", f"{TEST_PROBE}::test_ranks_count_ties_against_the_model_and_metrics_are_scikit_learns"),
            (
                Break("probe: convergence is taken for granted", PROBE, "len(others) == len(caught)", "True"),
                Break("probe: columns are taken for classes", PROBE, "scores[:, torch.from_numpy(classifier.classes_)] = found", "scores[:, : found.shape[1]] = found"),
                Break("accuracy: a tie is a hit", "fastclip/evaluation/accuracy.py", "return (~(scores < own)).sum(1) - 1", "return (scores > own).sum(1)"),
            ),
        ),
        Promise(
            "a probe that was stopped goes on, and leaves nothing when its result is written",
            (f"{TEST_PROBE}::test_interrupted_probe_goes_on", f"{TEST_PROBE}::test_command_writes_clip_benchmarks_keys"),
            (
                Break("probe: fits are not kept", PROBE, "                self._store.add(self._number, part)", "                pass"),
                Break("probe: stores are not cleared", "fastclip/cli/evaluate/probe.py", "        store.clear()", "        pass"),
            ),
        ),
        Promise(
            "published numbers are shown for the data set that a folder is called after, and no other; results are called as the data",
            (f"{TEST_PROBE}::test_published_numbers_are_by_name", f"{TEST_PROBE}::test_result_is_called_by_its_folder", f"{TEST_TUNE}::test_command_saves_the_average_and_goes_on"),
            (
                Break("probe: a data set by a folder above it", "fastclip/evaluation/published.py", "if folder.name.lower() in SPLITS else", "if folder.name not in _DATASETS else"),
                Break("fine-tuning: what nothing is evaluated for is let pass", "fastclip/cli/finetune.py", "if not args.val_data and (", "if False and ("),
                Break("probe: the result is called after the folder's name", "fastclip/cli/evaluate/probe.py", "dataset=args.reference or args.test_data", "dataset=reference or args.test_data"),
            ),
        ),
        Promise(
            "fine-tuning begins as the zero-shot classifier and makes the steps of a plain loop, the head in float32",
            (f"{TEST_TUNE}::test_it_begins_as_the_zero_shot_classifier", f"{TEST_TUNE}::test_steps_are_those_of_a_plain_loop", f"{TEST_TUNE}::test_head_computes_in_float32_under_autocast", f"{TEST_TUNE}::test_micro_batches_give_the_same_steps"),
            (
                Break("fine-tuning: the head forgets the logit scale", TUNE, "return scale * class_embeddings(", "return class_embeddings("),
                Break("fine-tuning: the warm-up's cosine is left out", TUNE, 'group["lr"] = lr\n', 'group["lr"] = options.lr\n'),
                Break("fine-tuning: the head computes in bfloat16", "fastclip/models/classifier.py", "torch.autocast(images.device.type, enabled=False)", "torch.autocast(images.device.type, torch.bfloat16)"),
                Break("fine-tuning: micro-batches count as batches", TUNE, "(each.sum() / self.options.batch_size).backward()", "each.mean().backward()"),
            ),
        ),
        Promise(
            "fine-tuning that is killed goes on to the same bits, SIGTERM leaves a checkpoint, a loss that is not finite no update",
            (f"{TEST_TUNE}::test_killed_run_goes_on_to_the_same_bits", f"{TEST_TUNE}::test_signal_ends_it_with_a_checkpoint", f"{TEST_TUNE}::test_loss_that_is_not_finite_stops_before_the_update", f"{TEST_TUNE}::test_folder_of_something_else_is_refused"),
            (
                Break("fine-tuning: a resumed run begins at the first batch", TUNE, "            first_step=first,", "            first_step=0,"),
                Break("fine-tuning: signals wait for the end", TUNE, "stops = self.signals.status and done < self.steps", "stops = False"),
                Break("fine-tuning: NaN is a loss", TUNE, "if not math.isfinite(loss):", "if False:"),
                Break("fine-tuning: goes on with other options", TUNE, "if before.get(name) != asked[name]]", "if False]"),
                Break("fine-tuning: any folder will do", TUNE, "if self.folder.is_dir() and any(self.folder.iterdir()):", "if False:"),
            ),
        ),
        Promise(
            "alpha 0 is the zero-shot model and 1 the fine-tuned one, bit for bit; between them all weights and BatchNorm's statistics are averaged; a frozen tower stays",
            (f"{TEST_TUNE}::test_ensemble_is_between_the_models_and_either_at_its_ends", f"{TEST_TUNE}::test_frozen_tower_stays_as_it_is", f"{TEST_TUNE}::test_saved_model_and_classifier_are_read_again", f"{TEST_TUNE}::test_command_saves_the_average_and_goes_on"),
            (
                Break("ensemble: the wrong way round", "fastclip/training/ensemble.py", "a.lerp(tuned[name], alpha)", "a.lerp(tuned[name], 1 - alpha)"),
                Break("ensemble: the zero-shot state moves along", TUNE, "x.detach().cpu().clone()", "x.detach().cpu()"),
                Break("fine-tuning: a frozen tower's statistics move", "fastclip/models/classifier.py", "            self.visual.eval()", "            pass"),
                Break("fine-tuning: the fine-tuned weights are saved in place of the average", "fastclip/cli/finetune.py", "    run.mix(saved)", "    run.mix(1.0)"),
            ),
        ),
    ],
}
# fmt: on
