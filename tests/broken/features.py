"""Checkpoints as they are evaluated, and the features that an evaluation keeps to go on with."""

from __future__ import annotations

from broken import Break, Promise

TESTS, FEATURES, EMBEDDER = (
    "evaluation/test_features.py",
    "fastclip/evaluation/features.py",
    "fastclip/models/embedder.py",
)

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Evaluated checkpoints and kept features": [
        Promise(
            "a checkpoint of training is evaluated as the run would save it, with its own sizes and the average of its weights; a run that goes on has no model/",
            (f"{TESTS}::test_checkpoint_of_a_run_is_what_the_run_would_save",),
            (
                Break("evaluated: the weights in place of their average", EMBEDDER, 'path / "ema.safetensors" if (path / "ema.safetensors").is_file() else path', "path"),
                Break("evaluated: the name's context length", EMBEDDER, '("image_size", "context_length")}\n        weights', '("image_size",)}\n        weights'),
                Break("evaluated: the model of an earlier end of the run", "fastclip/training/trainer.py", "                    model.rename(aside)\n", ""),
            ),
        ),
        Promise(
            "what is embedded is kept apart by weights, configuration, vocabulary, precision, names and working directory",
            (f"{TESTS}::test_store_is_of_one_model_and_one_list", f"{TESTS}::test_other_vocabulary_is_another_model", f"{TESTS}::test_names_in_another_folder_are_others"),
            (
                Break("kept features: whatever the weights", EMBEDDER, "            digest.update(tensor.detach()", "            (tensor.detach()"),
                Break("kept features: whatever the vocabulary", "fastclip/models/wordpiece.py", "repr((self.context_length, words))", "repr(self.context_length)"),
                Break("kept features: whatever the precision", EMBEDDER, "repr((config, tokenizer, self.precision))", "repr((config, tokenizer))"),
                Break("kept features: wherever they lie", FEATURES, "chain([os.getcwd()], keys)", "chain([], keys)"),
            ),
        ),
        Promise(
            "an evaluation that was stopped goes on to the same bits, and has lost a minute's work at most",
            (f"{TESTS}::test_interrupted_embedding_goes_on_to_the_same_bits", f"{TESTS}::test_interrupted_texts_go_on_to_the_same_bits", f"{TESTS}::test_what_took_a_minute_is_kept", f"{TESTS}::test_damaged_part_is_computed_again"),
            (
                Break("kept features: the first ones are taken again", FEATURES, "Subset(source, range(done, size))", "Subset(source, range(size - done))"),
                Break("kept features: thousands or nothing", FEATURES, "if whole or time.monotonic() - begun > _SECONDS:", "if whole:"),
                Break("kept features: a damaged part ends the command", FEATURES, "except (SafetensorError, OSError) as error:", "except KeyError as error:"),
            ),
        ),
    ],
}
# fmt: on
