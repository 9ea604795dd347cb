"""Data, and evaluation on it."""

from __future__ import annotations

from broken import Break, Promise

DATA, ORDER, LOADER, EVALUATION = (
    "data/test_sources.py",
    "data/test_order.py",
    "data/test_loader.py",
    "evaluation/test_validation.py",
)
FAULTS, CHECK, RUNS = "data/test_faults.py", "data/test_check.py", "training/test_faults.py"
SHARDS, MIXTURE, REMOTE = "data/test_shards.py", "data/test_mixture.py", "data/test_remote.py"
SHUFFLE, SCALED, HUB = "data/test_permutation.py", "data/test_scaled.py", "data/test_hub.py"
FOLDER, RETRIEVAL, VALIDATE = "fastclip/data/", "fastclip/evaluation/retrieval.py", "fastclip/evaluation/validate.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Data": [
        Promise(
            "the order of the samples is a function of the seed and the step, the same on every machine; an epoch is a permutation, cut to whole batches",
            (f"{ORDER}::test_order_is_a_function_of_seed_and_epoch", f"{ORDER}::test_order_is_the_one_of_all_runs_so_far", f"{ORDER}::test_order_of_an_epoch_is_a_permutation_cut_to_whole_batches", f"{ORDER}::test_order_of_a_batch_larger_than_the_data_takes_epochs_in_turn"),
            (
                Break("data: seed and epoch are added", f"{FOLDER}permutation.py", 'text = "/".join(map(str, parts))', "text = str(sum(parts))"),
                Break("data: another order than that of older runs", f"{FOLDER}permutation.py", 'digest_size=8).digest(), "little")', 'digest_size=8).digest(), "big")'),
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
                Break("data: Python's generator is left seeded", f"{FOLDER}workers.py", "        random.setstate(states[2])\n", ""),
                Break("data: a resumed run begins with the first step's", f"{FOLDER}loader.py", "for step in range(first_step, last_step) for piece", "for step in range(last_step - first_step) for piece"),
            ),
        ),
        Promise("equal captions have equal labels on every machine", (f"{LOADER}::test_labels_without_classes_tell_first_captions_apart",), (Break("data: Python's own hash", f"{FOLDER}loader.py", "_text_label(record.captions[0]) if", "hash(record.captions[0]) if"),)),
        Promise(
            "what cannot be read is named in one line: sample, file and row, folder, shard",
            (f"{LOADER}::test_broken_picture_is_named_in_one_line", f"{DATA}::test_damaged_picture_is_named", f"{DATA}::test_table_fault_names_file_and_line", f"{DATA}::test_folder_without_captions_counts_and_names_the_first", f"{DATA}::test_shards_that_are_missing_are_named", f"{DATA}::test_shards_that_are_cut_off_or_garbage_are_named"),
            (
                Break("data: a worker's traceback", f"{FOLDER}workers.py", "except (OSError, ValueError) as error:", "except KeyError as error:"),
                Break("data: an open quote swallows rows", f"{FOLDER}table.py", "delimiter=separator, strict=True)", "delimiter=separator)"),
                Break("data: pictures without captions are passed over", f"{FOLDER}folder.py", "if not any(told for _, told in found):", "if False:"),
                Break("data: missing shards are passed over", f"{FOLDER}shards.py", "missing += [] if paths else [name]", "missing += []"),
                Break("data: a shard that was cut off is indexed", f"{FOLDER}tar_index.py", "        if place > end:\n            raise _Doubt", "        if place > end:\n            return"),
            ),
        ),
        Promise(
            "workers neither warn nor hang after a fork, hold no file open, and outlive Ctrl-C until the trainer has saved",
            (f"{LOADER}::test_tokenizers_neither_warn_nor_hang_in_workers", f"{LOADER}::test_batches_hold_no_file_open", f"{LOADER}::test_workers_are_outside_the_callers_process_group"),
            (
                Break("data: the tokenizers' threads are awaited", "fastclip/_env.py", '    os.environ[name] = "false"\n', ""),
                Break("data: batches stay in shared memory", f"{FOLDER}workers.py", "return tensor.clone() if tensor.is_shared() else tensor", "return tensor"),
                Break("data: Ctrl-C ends the workers", f"{FOLDER}workers.py", "os.setpgrp()", "pass"),
            ),
        ),
        Promise(
            "a sample that cannot be used has a cause and a name, a fault for a fault; a picture that is too large is refused from its header, and no file starts a program",
            (f"{FAULTS}::test_picture_fault_has_its_cause", f"{FAULTS}::test_large_picture_is_refused_from_its_header", f"{FAULTS}::test_files_that_cannot_be_read_have_their_cause", f"{FAULTS}::test_caption_fault_has_its_cause"),
            (
                Break("faults: large pictures are decoded", f"{FOLDER}picture.py", '            warnings.simplefilter("error", Image.DecompressionBombWarning)\n', ""),
                Break("faults: Ghostscript reads a picture", f"{FOLDER}picture.py", "Image.open(file, formats=_formats())", "Image.open(file)"),
                Break("faults: all damage is called one", f"{FOLDER}picture.py", 'cause = "truncated image" if "truncated" in', 'cause = "truncated image" if "" in'),
                Break("faults: an empty caption is one", f"{FOLDER}table.py", "        if not self._captions[index]:\n            raise BadSample", "        if index < 0:\n            raise BadSample"),
                Break("faults: no permission is a missing file", f"{FOLDER}picture.py", 'else "unreadable file"', 'else "missing file"'),
            ),
        ),
        Promise(
            "every mode of a picture becomes colours, more than 8 bits scaled; of an animation the first frame; damaged EXIF is passed over, a wrong suffix too",
            (f"{FAULTS}::test_every_mode_becomes_colours", f"{FAULTS}::test_first_frame_of_an_animation_counts", f"{FAULTS}::test_damaged_exif_is_passed_over_without_a_word", f"{FAULTS}::test_kind_of_a_picture_is_not_its_name"),
            (
                Break("faults: 16 bits are cut off at 255", f"{FOLDER}picture.py", "return _eight_bits(image)", "return image"),
                Break("faults: damaged EXIF is a damaged picture", f"{FOLDER}picture.py", "with suppress(Exception):", "with suppress(KeyError):"),
            ),
        ),
        Promise(
            "a shard that is cut off is used as far as it goes and named; the first of a repeated member counts; one that holds nothing stops the run by name; nothing is written, no pipe is run",
            (f"{FAULTS}::test_shard_cut_in_half_is_used_as_far_as_it_goes", f"{SHARDS}::test_damage_of_a_shard_is_told_each_time", f"{FAULTS}::test_first_of_a_repeated_member_counts", f"{FAULTS}::test_shard_that_holds_nothing_stops_by_name", f"{FAULTS}::test_names_that_lead_elsewhere_write_nothing", f"{FAULTS}::test_pipe_is_never_run"),
            (
                Break("faults: the last of a repeated member counts", f"{FOLDER}shard_index.py", 'group.setdefault("picture", member)\n        elif', 'group.setdefault("picture", member)\n        elif group.update({"picture": member, kind: member}) or'),
                Break("faults: a cut picture is read", f"{FOLDER}shard_index.py", "if any(member.header + BLOCK + member.size > end for", "if any(member.size < 0 for"),
                Break("faults: a shard that ends in a header is whole", f"{FOLDER}tar_index.py", '"" if ends_well else "no header where one must be"', '""'),
                Break("faults: a cut shard is named when it is indexed alone", f"{FOLDER}shard_index.py", "rest[:keys], rest[keys:].decode()", 'rest[:keys], ""'),
            ),
        ),
        Promise(
            "a bad sample is replaced by a function of seed, epoch and sample, and counted once an epoch: batches keep their sizes and are the same bits however read",
            (f"{FAULTS}::test_bad_samples_are_replaced_and_batches_keep_their_size", f"{FAULTS}::test_replacements_are_the_same_however_read", f"{FAULTS}::test_source_that_gives_nothing_stops_with_causes_and_names"),
            (
                Break("faults: every epoch has the same replacements", f"{FOLDER}loader.py", "seed = mix(self._seed, draw.epoch, draw.sample, attempt)", "seed = mix(self._seed, draw.sample, attempt)"),
                Break("faults: what is tried in its place counts, too", f"{FOLDER}loader.py", "skipped += faults[:1]", "skipped += faults"),
                Break("faults: replacements are drawn by whoever reads", f"{FOLDER}loader.py", "yield mix(seed, 2) % len(self._watch.source), seed", "yield random.SystemRandom().randrange(len(self._watch.source)), seed"),
                Break("faults: no other sample is tried", f"{FOLDER}loader.py", "_TRIES = 100", "_TRIES = 1"),
            ),
        ),
        Promise(
            "a run shows what it skipped by cause, goes on counting after a resume, and stops above --max-bad, on all ranks at once, with a line that names files",
            (f"{RUNS}::test_skipped_samples_are_counted_by_cause_and_shown", f"{RUNS}::test_resumed_run_goes_on_counting", f"{RUNS}::test_run_stops_when_too_many_samples_are_bad", f"{RUNS}::test_share_is_exact_at_the_end_of_an_epoch_and_beyond_chance_before", f"{RUNS}::test_all_ranks_count_together_and_stop_together", f"{RUNS}::test_command_stops_with_a_line_that_names_files"),
            (
                Break("faults: a resumed run counts from 0", "fastclip/training/trainer.py", '            self.skipped.load(state["skipped"])\n', ""),
                Break("faults: chance stops a run", "fastclip/training/skipped.py", "expected + 4 * math.sqrt(expected) + 4)", "expected)"),
                Break("faults: a rank counts its own", "fastclip/training/skipped.py", "for found in everyone for fault in found", "for found in everyone[:1] for fault in found"),
                Break("faults: only chance is looked at", "fastclip/training/skipped.py", "return bad > at_the_end or (max_bad", "return bool(at_the_end) and (max_bad"),
            ),
        ),
        Promise(
            "a worker that is stuck is named with what it reads, and again; one that the system kills ends the run with a line, wherever torch notices",
            (f"{FAULTS}::test_stuck_worker_is_named_with_what_it_reads", f"{MIXTURE}::test_reader_of_a_mixture_is_named_with_what_its_epoch_drew", f"{FAULTS}::test_no_alarm_while_batches_come", f"{FAULTS}::test_death_of_a_worker_is_an_error_of_one_line", f"{LOADER}::test_killed_worker_is_named_with_what_it_read", f"{RUNS}::test_killed_worker_ends_the_run_with_a_line"),
            (
                Break("faults: a worker notes nothing", f"{FOLDER}watch.py", "        self._note(index + 1, epoch)\n", ""),
                Break("faults: what a mixture drew in its first epoch is named", f"{FOLDER}watch.py", "self.source.key(what - 1, epoch=epoch)", "self.source.key(what - 1, epoch=0)"),
                Break("faults: the alarm speaks once", f"{FOLDER}watch.py", "now - max(since, told) >= patience", "told == 0.0 and now - since >= patience"),
                Break("faults: the caller's time counts", f"{FOLDER}watch.py", "        finally:\n            self._since = None", "        finally:\n            pass"),
                Break("faults: torch's own words on a death", f"{FOLDER}workers.py", "                raise death from error\n            if found", "                raise\n            if found"),
            ),
        ),
        Promise(
            "`fastclip data check` counts every sample once; what `data pack` writes is read as its source is, and is the same bytes after an interruption anywhere",
            (f"{CHECK}::test_check_counts_everything_once", f"{CHECK}::test_command_check_prints_a_table_and_fails_above_the_share", f"{CHECK}::test_packed_source_is_read_again_as_it_was", f"{CHECK}::test_interrupted_pack_goes_on_to_the_same_bytes", f"{CHECK}::test_pack_touches_no_other_shards", f"{CHECK}::test_shards_have_img2datasets_layout"),
            (
                Break("pack: several captions and a .txt", f"{FOLDER}pack.py", "    if not rest:  #", "    if first:  #"),
                Break("pack: pictures out of shards become PNG", f"{FOLDER}shards.py", 'return self._members(index, ("picture",))[0]', "return b''"),
                Break("pack: pictures of a mixture become PNG", f"{FOLDER}mixture.py", "return picture_bytes(source, sample)", "return None"),
                Break("pack: a shard appears before it is whole", f"{FOLDER}pack.py", 'output / f"{shard:05d}.tar.tmp", output', 'output / f"{shard:05d}.tar", output'),
                Break("pack: other options, the same folder", f"{FOLDER}pack.py", "    if before != about:", "    if before is None:"),
                Break("check: always well", "fastclip/cli/data.py", "if found.bad_share > args.max_bad:", "if found.bad_share > 2:"),
            ),
        ),
        Promise(
            "an epoch's shuffle is a permutation of any size, every order equally likely, computed number by number",
            (f"{SHUFFLE}::test_permutation_has_every_number_once", f"{SHUFFLE}::test_permutation_has_every_order_equally_often", f"{SHUFFLE}::test_permutation_is_shuffled_like_a_random_one", f"{SHUFFLE}::test_permutation_of_many_does_not_depend_on_how_it_is_asked", f"{SHUFFLE}::test_order_of_billions_takes_no_memory"),
            (
                Break("shuffle: numbers beyond the size", f"{FOLDER}permutation.py", "found[beyond] = self._network(found[beyond])", "found[beyond] %= np.uint64(self.size)"),
                Break("shuffle: of three, rotations only", f"{FOLDER}permutation.py", "math.isqrt(size - 1) + 1", "math.isqrt(size)"),
                Break("shuffle: three rounds", f"{FOLDER}permutation.py", "_ROUNDS = 8", "_ROUNDS = 3"),
            ),
        ),
        Promise(
            "a shard is gone through once in its life; its index is made anew when the file changes or the index is damaged, and is written whole, by any number of processes at once",
            (f"{SHARDS}::test_index_is_made_once", f"{SHARDS}::test_index_is_made_anew_for_another_file", f"{SHARDS}::test_index_that_is_damaged_is_made_anew", f"{SHARDS}::test_index_is_in_the_cache_folder_where_none_can_lie_beside_the_shard", f"{SHARDS}::test_index_has_its_name_when_it_is_whole", f"{SHARDS}::test_index_made_by_several_processes_at_once_is_whole", f"{SHARDS}::test_members_are_those_of_tarfile"),
            (
                Break("index: never kept", f"{FOLDER}shard_index.py", "        half.replace(file)\n", "        half.unlink()\n"),
                Break("index: that of an older file", f"{FOLDER}shard_index.py", "(_MAGIC, stamp, len(content))", "(_MAGIC, Stamp(size, mtime_ns), len(content))"),
                Break("index: damage is not seen", f"{FOLDER}shard_index.py", " or zlib.crc32(content) != checksum", ""),
                Break("index: no cache folder", f"{FOLDER}shard_index.py", 'Path(f"{path}.fastclip-index"), _cached(path)', '(Path(f"{path}.fastclip-index"),)'),
                Break("index: written in its place", f"{FOLDER}shard_index.py", 'half = file.with_name(f".{file.name}.{os.getpid()}-{random.SystemRandom().getrandbits(32):08x}")', "half = file"),
                Break("index: all write one temporary file", f"{FOLDER}shard_index.py", "{os.getpid()}-{random.SystemRandom().getrandbits(32):08x}", "half"),
                Break("index: a long name is what its header holds", f"{FOLDER}tar_index.py", "_HARMLESS.fullmatch(read_exactly(file, size)) is None", "read_exactly(file, size) is None"),
            ),
        ),
        Promise(
            "a shard that changes under a run is named",
            (f"{SHARDS}::test_shard_that_changes_under_a_run_is_named",),
            (
                Break("shard: another file of this name is read", f"{FOLDER}shards.py", "same = stamp_of(os.fstat(file.fileno())) == self._stamps[shard]", "same = True"),
                Break("shard: other samples in the same places", f"{FOLDER}shards.py", ' and zlib.crc32(data[:BLOCK]) == row[f"{kind}_crc"]', ""),
            ),
        ),
        Promise(
            "steps are equal on all ranks, with fewer shards than workers too; with other ranks from some step on, an epoch loses and repeats no sample",
            (f"{MIXTURE}::test_order_of_fewer_shards_than_workers_does_not_depend_on_them", f"{MIXTURE}::test_run_that_goes_on_with_other_ranks_loses_and_repeats_nothing"),
            (
                Break("ranks: each its own order", f"{FOLDER}loader.py", "Order(len(source), batch_size, seed)", "Order(len(source), batch_size, seed + rank)"),
                Break("ranks: a step is of the ranks' number", f"{FOLDER}loader.py", "order.draws(step, *piece)", "order.draws(step + ranks, *piece)"),
            ),
        ),
        Promise(
            "an epoch of A::B draws round(weight size) samples of each; a fraction goes through all of its source before it repeats one",
            (f"{MIXTURE}::test_mixture_of_whole_weights_draws_every_sample_so_often", f"{MIXTURE}::test_mixture_of_fractions_goes_through_all_before_it_repeats", f"{MIXTURE}::test_mixture_spreads_an_epochs_part_over_the_source", f"{MIXTURE}::test_mixture_has_classes_where_all_agree", f"{MIXTURE}::test_bad_samples_of_a_mixture_are_replaced_by_those_of_the_epoch", f"{MIXTURE}::test_run_that_goes_on_with_other_ranks_loses_and_repeats_nothing"),
            (
                Break("mixture: every epoch draws the same half", f"{FOLDER}mixture.py", "turn = epoch * draws + index", "turn = index"),
                Break("mixture: a stride that misses samples", f"{FOLDER}mixture.py", "while math.gcd(stride, size) > 1:", "while stride == 0:"),
                Break("mixture: a tenth is the first one", f"{FOLDER}mixture.py", "_stride(len(source)) if draws % len(source) else 1", "1"),
                Break("mixture: labels of other classes", f"{FOLDER}mixture.py", "return record if self._with_classes else record._replace(label=None)", "return record"),
                Break("mixture: the loader forgets the epoch", f"{FOLDER}watch.py", "self.source.read(index, epoch=epoch, min_side=min_side)", "self.source.read(index, min_side=min_side)"),
                Break("mixture: replacements are the first epoch's", f"{FOLDER}loader.py", "record = watch.read(sample, epoch=epoch, min_side", "record = watch.read(sample, epoch=0 if faults else epoch, min_side"),
            ),
        ),
        Promise(
            "a remote shard is copied once, whole, by one process; commands in a SPEC are never run",
            (f"{REMOTE}::test_remote_shards_are_copied_once", f"{REMOTE}::test_remote_copy_of_another_size_is_not_kept", f"{REMOTE}::test_remote_shard_that_has_changed_is_copied_anew", f"{REMOTE}::test_remote_shard_is_copied_by_one_of_several_processes", f"{REMOTE}::test_remote_fault_is_named", f"{REMOTE}::test_remote_copy_is_used_when_nobody_answers"),
            (
                Break("remote: copied at each start", f"{FOLDER}remote.py", "if have is None or size not in (None, have):", "if True:"),
                Break("remote: half of it is kept", f"{FOLDER}remote.py", "if size is not None and half.stat().st_size != size:", "if False:"),
                Break("remote: an old copy", f"{FOLDER}remote.py", "size not in (None, have)", "False"),
                Break("remote: every process copies", f"{FOLDER}remote.py", 'with FileLock(copy.with_name(f"{copy.name}.lock")):', "if True:"),
                Break("remote: a pipe is taken for a file", f"{FOLDER}spec.py", 'if spec.startswith("pipe:"):', "if False:"),
            ),
        ),
        Promise(
            "training decodes a large JPEG at a fraction of its size, of which no crop is enlarged; evaluation decodes all of it",
            (f"{SCALED}::test_jpeg_keeps_the_side_that_is_needed", f"{SCALED}::test_training_scales_and_evaluation_does_not", f"{SCALED}::test_training_takes_no_crop_that_would_be_enlarged", f"{SCALED}::test_scaled_jpeg_is_turned_as_its_exif_says"),
            (
                Break("scaled: never", f"{FOLDER}picture.py", "image.draft(None, (min_side, min_side))", "pass"),
                Break("scaled: too small", f"{FOLDER}picture.py", "image.draft(None, (min_side, min_side))", "image.draft(None, (min_side // 2, min_side // 2))"),
                Break("scaled: evaluation too", f"{FOLDER}loader.py", "self._candidates(max(index, 0)))", "self._candidates(max(index, 0)), min_side=24)"),
                Break("scaled: crops are enlarged", "fastclip/models/transforms.py", "math.ceil(size / _AREA[0])", "size"),
            ),
        ),
        Promise(
            "hf:NAME reads what the datasets library does: pictures, captions, classes, splits",
            (f"{HUB}::test_hub_columns_are_found", f"{HUB}::test_hub_captions_may_be_lists", f"{HUB}::test_hub_class_labels_are_classes", f"{HUB}::test_hub_splits_are_named", f"{HUB}::test_hub_row_that_cannot_be_used_has_its_cause"),
            (
                Break("hub: always the training split", f"{FOLDER}hub.py", 'split or "train", spec)', '"train", spec)'),
                Break("hub: unknown labels are the last class", f"{FOLDER}hub.py", "None if label == -1 else label", "label"),
                Break("hub: a bad row ends the run", f"{FOLDER}hub.py", 'raise BadSample("no image", key, "there is no picture")', 'raise ValueError(f"{key}: there is no picture")'),
                Break("hub: the first caption of a list", f"{FOLDER}hub.py", "(found if isinstance(found, list) else [found])", "(found[:1] if isinstance(found, list) else [found])"),
            ),
        ),
        Promise(
            "a picture and its mask are one sample; a read that returns less is read on",
            ("data/test_shards.py::test_picture_and_its_mask_are_one_sample", "data/test_shards.py::test_reads_of_a_few_bytes_are_put_together"),
            (
                Break("data: a mask is a second picture", f"{FOLDER}shard_index.py", "key, kind = match[1], match[2].lower()\n", 'key, kind = match[1], match[2].lower()\n        kind = ".jpg" if kind in PICTURE_SUFFIXES else kind\n'),
                Break("data: one read is all", f"{FOLDER}tar_index.py", "    while left and (part := file.read(left)):", "    if left and (part := file.read(left)):"),
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
                Break("evaluation: a tie is a hit", RETRIEVAL, "similarities < (best - _TIE).unsqueeze(dim)", "~(similarities > (best + _TIE).unsqueeze(dim))"),
                Break("evaluation: everything at once", RETRIEVAL, "return chunk or _SIDES.get(x.device.type, _SIDE)", "return chunk or 2**20"),
            ),
        ),
        Promise("validation leaves out samples that cannot be used, and says how many", (f"{EVALUATION}::test_samples_that_cannot_be_used_are_left_out_and_counted",), (Break("evaluation: another sample stands for a bad one", f"{FOLDER}loader.py", "used = index if not faults else -1", "used = index"),)),
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
