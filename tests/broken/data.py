"""The order of samples, batches, and the workers that read them."""

from __future__ import annotations

from broken import DATA, STOPS, TRAINING, Break, Promise

PROMISES = [
    Promise(
        TRAINING,
        "The order of the samples depends only on the seed and the step, and is the same on every machine",
        tests=[
            "data/test_order.py::test_order_is_a_function_of_seed_and_epoch",
            "data/test_order.py::test_order_is_the_one_of_all_runs_so_far",
        ],
        breaks=[
            Break(
                "data: seed and epoch are added",
                "fastclip/data/loading/permutation.py",
                old='text = "/".join(map(str, parts))',
                new="text = str(sum(parts))",
            ),
            Break(
                "data: another order than that of older runs",
                "fastclip/data/loading/permutation.py",
                old='digest_size=8).digest(), "little")',
                new='digest_size=8).digest(), "big")',
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Without weights, an epoch draws every sample at most once and leaves out only those of an incomplete batch",
        tests=[
            "data/test_order.py::test_order_of_an_epoch_is_a_permutation_cut_to_whole_batches",
            "data/test_order.py::test_order_of_a_batch_larger_than_the_data_takes_epochs_in_turn",
        ],
        breaks=[
            Break(
                "data: batches reach over the epoch's end",
                "fastclip/data/loading/order.py",
                old="self.size - self.size % self.batch_size if self.batch_size <= self.size else self.size",
                new="self.size",
            ),
            Break(
                "data: a batch ends with the epoch",
                "fastclip/data/loading/order.py",
                old="place += len(indices)",
                new="place = end",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Batches are bit-identical for any number of workers, processes and micro-batches",
        tests=[
            "data/test_loader.py::test_batches_are_the_same_bits_however_read",
            "data/test_loader.py::test_captions_and_crops_change_with_the_epoch",
            "data/test_loader.py::test_crops_differ_between_samples",
        ],
        breaks=[
            Break(
                "data: crops go on from sample to sample",
                "fastclip/data/loading/batches.py",
                old="torch.default_generator.manual_seed(seed)",
                new="",
            ),
            Break(
                "data: unequal shares lose their rest",
                "fastclip/data/loading/batches.py",
                old="start, stop = rank * batch_size // ranks, (rank + 1) * batch_size // ranks",
                new="start, stop = rank * (batch_size // ranks), (rank + 1) * (batch_size // ranks)",
            ),
            Break(
                "data: every epoch crops alike",
                "fastclip/data/loading/batches.py",
                old="mix(self._seed, draw.epoch, draw.sample)",
                new="mix(self._seed, draw.sample)",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Images leave the data workers as uint8; normalising them on the device changes no bit of an image or a loss",
        tests=[
            "data/test_pixels.py::test_normalisation_has_the_bits_of_torchvision",
            "data/test_pixels.py::test_pixels_have_the_crops_of_the_image_transform",
            "data/test_pixels.py::test_batches_have_a_quarter_of_the_bytes",
            "data/test_pixels.py::test_step_with_pixels_has_the_bits_of_the_float_path",
            "data/test_pixels.py::test_training_reads_pixels",
            "data/test_pixels.py::test_evaluation_reads_pixels",
        ],
        breaks=[
            Break(
                "pixels: the reciprocal of 255",
                "fastclip/models/transforms.py",
                old=".div_(full)",
                new=".mul_(1 / full)",
            ),
            Break(
                "pixels: batches are in channels-last order",
                "fastclip/models/transforms.py",
                old=".view(3, image.height, image.width)",
                new=".view(3, image.height, image.width).permute(1, 2, 0).contiguous().permute(2, 0, 1)",
            ),
            Break(
                "pixels: a step forgets to normalise",
                "fastclip/training/step/update.py",
                old="images = self.normalize_pixels(images)",
                new="images = images.float()",
            ),
            Break(
                "pixels: fine-tuning forgets to normalise",
                "fastclip/training/finetune.py",
                old="self.normalize_pixels(batch.images.to(device, non_blocking=True))",
                new="batch.images.to(device).float()",
            ),
            Break(
                "pixels: embedding reads normalised images",
                "fastclip/embedding/features.py",
                old="rest, embedder.pixel_transform,",
                new="rest, embedder.transform,",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Reading batches does not change the state of the caller's random generators",
        tests=[
            "data/test_loader.py::test_callers_random_numbers_are_left_alone",
        ],
        breaks=[
            Break(
                "data: Python's generator is left seeded",
                "fastclip/data/loading/workers.py",
                old="random.setstate(states[2])",
                new="",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A resumed run continues with the next batch, even in the middle of an epoch",
        tests=[
            "data/test_loader.py::test_batches_go_on_in_the_middle_of_an_epoch",
        ],
        breaks=[
            Break(
                "data: a resumed run begins with the first step's",
                "fastclip/data/loading/batches.py",
                old="for step in range(first_step, last_step) for piece",
                new="for step in range(last_step - first_step) for piece",
            ),
        ],
    ),
    Promise(
        DATA,
        "Equal captions have equal labels on every machine",
        tests=[
            "data/test_loader.py::test_labels_without_classes_tell_first_captions_apart",
        ],
        breaks=[
            Break(
                "data: Python's own hash",
                "fastclip/data/loading/batches.py",
                old="_text_label(record.captions[0]) if",
                new="hash(record.captions[0]) if",
            ),
        ],
    ),
    Promise(
        DATA,
        "An error about an unreadable sample, row or shard names it in one line",
        tests=[
            "data/test_loader.py::test_broken_picture_is_named_in_one_line",
            "data/test_sources.py::test_damaged_picture_is_named",
            "data/test_sources.py::test_table_fault_names_file_and_line",
            "data/test_sources.py::test_folder_without_captions_counts_and_names_the_first",
            "data/test_sources.py::test_shards_that_are_missing_are_named",
            "data/test_sources.py::test_shards_that_are_cut_off_or_garbage_are_named",
        ],
        breaks=[
            Break(
                "data: a worker's traceback",
                "fastclip/data/loading/workers.py",
                old="except (OSError, ValueError) as error:",
                new="except KeyError as error:",
            ),
            Break(
                "data: an open quote swallows rows",
                "fastclip/data/sources/table.py",
                old="delimiter=separator, strict=True)",
                new="delimiter=separator)",
            ),
            Break(
                "data: pictures without captions are passed over",
                "fastclip/data/sources/folder.py",
                old="if not captioned:",
                new="if False:",
            ),
            Break(
                "data: missing shards are passed over",
                "fastclip/data/shards/source.py",
                old="missing += [] if paths else [name]",
                new="missing += []",
            ),
            Break(
                "data: a shard that was cut off is indexed",
                "fastclip/data/shards/tar_index.py",
                old="if not broken and (place > self._end or self._next):",
                new="if False:",
            ),
        ],
    ),
    Promise(
        DATA,
        "Data workers neither warn nor hang, keep no file open, and survive Ctrl-C until a checkpoint is saved",
        tests=[
            "data/test_loader.py::test_tokenizers_neither_warn_nor_hang_in_workers",
            "data/test_loader.py::test_program_ends_that_left_its_batches_half_way",
            "data/test_loader.py::test_batches_hold_no_file_open",
            "data/test_loader.py::test_workers_are_outside_the_callers_process_group",
        ],
        breaks=[
            Break(
                "data: the tokenizers' threads are awaited",
                "fastclip/system/env.py",
                old='_variable("TOKENIZERS_PARALLELISM", "false")',
                new="",
            ),
            Break(
                "data: a thread is started as the interpreter ends, which hangs before Python 3.12",
                "fastclip/data/loading/workers.py",
                old=" and not sys.is_finalizing()",
                new="",
            ),
            Break(
                "data: batches stay in shared memory",
                "fastclip/data/loading/workers.py",
                old="return tensor.clone() if tensor.is_shared() else tensor",
                new="return tensor",
            ),
            Break(
                "data: Ctrl-C ends the workers",
                "fastclip/data/loading/workers.py",
                old="os.setpgrp()",
                new="pass",
            ),
        ],
    ),
]
