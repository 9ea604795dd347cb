"""Data, and evaluation on it."""

from __future__ import annotations

from broken import Break, Promise

DATA, ORDER, LOADER, EVALUATION = "test_data.py", "test_data_order.py", "test_data_loader.py", "test_evaluation.py"
FOLDER, RETRIEVAL, VALIDATE = "fastclip/data/", "fastclip/evaluation/retrieval.py", "fastclip/evaluation/validate.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Data": [
        Promise(
            "the order of the samples is a function of the seed and the step, the same on every machine; an epoch is a permutation, cut to whole batches",
            (f"{ORDER}::test_order_is_a_function_of_seed_and_epoch", f"{ORDER}::test_order_is_the_one_of_all_runs_so_far", f"{ORDER}::test_order_of_an_epoch_is_a_permutation_cut_to_whole_batches", f"{ORDER}::test_order_of_a_batch_larger_than_the_data_takes_epochs_in_turn"),
            (
                Break("data: seed and epoch are added", f"{FOLDER}order.py", 'text = "/".join(map(str, parts))', "text = str(sum(parts))"),
                Break("data: another order than that of older runs", f"{FOLDER}order.py", 'digest_size=8).digest(), "little")', 'digest_size=8).digest(), "big")'),
                Break("data: batches reach over the epoch's end", f"{FOLDER}order.py", "self.size - self.size % self.batch_size if self.batch_size <= self.size else self.size", "self.size"),
                Break("data: a batch ends with the epoch", f"{FOLDER}order.py", "place += len(indices)", "place = end"),
            ),
        ),
        Promise(
            "batches are the same bits for any workers, ranks and micro-batches, and from any step on; the caller's random numbers are left alone",
            (f"{LOADER}::test_batches_are_the_same_bits_however_read", f"{LOADER}::test_captions_and_crops_change_with_the_epoch", f"{LOADER}::test_crops_differ_between_samples", f"{LOADER}::test_callers_random_numbers_are_left_alone", f"{LOADER}::test_batches_go_on_in_the_middle_of_an_epoch"),
            (
                Break("data: crops go on from sample to sample", f"{FOLDER}loader.py", "    torch.default_generator.manual_seed(seed)\n", ""),
                Break("data: unequal shares lose their rest", f"{FOLDER}loader.py", "start, stop = rank * batch_size // ranks, (rank + 1) * batch_size // ranks", "start, stop = rank * (batch_size // ranks), (rank + 1) * (batch_size // ranks)"),
                Break("data: every epoch crops alike", f"{FOLDER}loader.py", "mix(self._seed, draw.epoch, draw.sample)", "mix(self._seed, draw.sample)"),
                Break("data: Python's generator is left seeded", f"{FOLDER}loader.py", "        random.setstate(states[2])\n", ""),
                Break("data: a resumed run begins with the first step's", f"{FOLDER}loader.py", "for step in range(first_step, last_step) for piece", "for step in range(last_step - first_step) for piece"),
            ),
        ),
        Promise("equal captions have equal labels on every machine", (f"{LOADER}::test_labels_without_classes_tell_first_captions_apart",), (Break("data: Python's own hash", f"{FOLDER}loader.py", "_text_label(record.captions[0]) if", "hash(record.captions[0]) if"),)),
        Promise(
            "what cannot be read is named in one line: sample, file and row, folder, shard",
            (f"{LOADER}::test_broken_picture_is_named_in_one_line", f"{DATA}::test_damaged_picture_is_named", f"{DATA}::test_table_fault_names_file_and_line", f"{DATA}::test_folder_without_captions_counts_and_names_the_first", f"{DATA}::test_shards_that_are_missing_are_named", f"{DATA}::test_shards_that_are_cut_off_or_garbage_are_named"),
            (
                Break("data: a worker's traceback", f"{FOLDER}loader.py", "except (OSError, ValueError) as error:", "except KeyError as error:"),
                Break("data: an open quote swallows rows", f"{FOLDER}table.py", "delimiter=separator, strict=True)", "delimiter=separator)"),
                Break("data: pictures without captions are passed over", f"{FOLDER}folder.py", "if untold:", "if len(untold) == len(found) > 0:"),
                Break("data: missing shards are passed over", f"{FOLDER}shards.py", "missing += [] if paths else [name]", "missing += []"),
                Break("data: a shard that was cut off is read", f"{FOLDER}shards.py", "if len(data) < size:", "if len(data) < 0:"),
            ),
        ),
        Promise(
            "workers neither warn nor hang after a fork, hold no file open, and outlive Ctrl-C until the trainer has saved",
            (f"{LOADER}::test_tokenizers_neither_warn_nor_hang_in_workers", f"{LOADER}::test_batches_hold_no_file_open", f"{LOADER}::test_workers_are_outside_the_callers_process_group"),
            (
                Break("data: the tokenizers' threads are awaited", "fastclip/_env.py", '    os.environ[name] = "false"\n', ""),
                Break("data: batches stay in shared memory", f"{FOLDER}loader.py", "return tensor.clone() if tensor.is_shared() else tensor", "return tensor"),
                Break("data: Ctrl-C ends the workers", f"{FOLDER}loader.py", "os.setpgrp()", "pass"),
            ),
        ),
        Promise("pictures are turned as their EXIF says", (f"{DATA}::test_picture_is_turned_as_its_exif_says",), (Break("data: as the camera was held", f"{FOLDER}picture.py", "ImageOps.exif_transpose(image, in_place=True)", "pass"),)),
    ],
    "Evaluation": [
        Promise(
            "retrieval's recalls are those of the definition, several captions an image; a tie counts against the model, and nothing M x N is stored",
            (f"{EVALUATION}::test_recalls_are_those_of_the_definition", f"{EVALUATION}::test_collapsed_model_has_no_hit", f"{EVALUATION}::test_what_is_not_finite_is_no_hit", f"{EVALUATION}::test_similarities_are_never_all_stored"),
            (
                Break("evaluation: the worst positive counts", RETRIEVAL, '"amax"', '"amin"'),
                Break("evaluation: a tie is a hit", RETRIEVAL, "(~(similarities < best[:, None] - _TIE))", "(similarities > best[:, None] + _TIE)"),
                Break("evaluation: everything at once", RETRIEVAL, "chunk or max(1, _CHUNK // max(1, len(items)))", "chunk or max(1, len(queries))"),
            ),
        ),
        Promise(
            "validation is the same on any number of ranks, and leaves model and random numbers as they were",
            (f"{EVALUATION}::test_ranks_have_the_single_process_metrics", f"{EVALUATION}::test_validation_leaves_no_trace", f"{EVALUATION}::test_validation_is_that_of_the_definition"),
            (
                Break("evaluation: every rank reads everything", VALIDATE, "batch_size=batch_size, rank=rank, ranks=ranks", "batch_size=batch_size, rank=0, ranks=1"),
                Break("evaluation: a locked tower is in training mode afterwards", VALIDATE, "            for module, mode in modes.items():\n                module.training = mode", "            model.train()"),
                Break("evaluation: dropout", VALIDATE, "        model.eval()\n", ""),
            ),
        ),
    ],
}
# fmt: on
