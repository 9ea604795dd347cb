"""Mixtures, remote files, images and other sources."""

from __future__ import annotations

from broken import COST, DATA, Break, Promise

PROMISES = [
    Promise(
        DATA,
        "Per epoch, a mixture draws round(weight x size) samples of each source, and repeats none before all "
        "were drawn",
        tests=[
            "data/test_mixture.py::test_mixture_of_whole_weights_draws_every_sample_so_often",
            "data/test_mixture.py::test_mixture_of_fractions_goes_through_all_before_it_repeats",
            "data/test_mixture.py::test_mixture_spreads_an_epochs_part_over_the_source",
            "data/test_mixture.py::test_mixture_has_classes_where_all_agree",
            "data/test_mixture.py::test_bad_samples_of_a_mixture_are_replaced_by_those_of_the_epoch",
            "data/test_mixture.py::test_run_that_goes_on_with_other_ranks_loses_and_repeats_nothing",
        ],
        breaks=[
            Break(
                "mixture: every epoch draws the same half",
                "fastclip/data/sources/mixture.py",
                old="turn = epoch * draws + index",
                new="turn = index",
            ),
            Break(
                "mixture: a stride that misses samples",
                "fastclip/data/sources/mixture.py",
                old="while math.gcd(stride, size) > 1:",
                new="while stride == 0:",
            ),
            Break(
                "mixture: a tenth is the first one",
                "fastclip/data/sources/mixture.py",
                old="_stride(len(source)) if draws % len(source) else 1",
                new="1",
            ),
            Break(
                "mixture: labels of other classes",
                "fastclip/data/sources/mixture.py",
                old="return record if self._with_classes else record._replace(label=None)",
                new="return record",
            ),
            Break(
                "mixture: the loader forgets the epoch",
                "fastclip/data/loading/watchdog.py",
                old="self.source.read(index, epoch=epoch, min_side=min_side)",
                new="self.source.read(index, min_side=min_side)",
            ),
            Break(
                "mixture: replacements are the first epoch's",
                "fastclip/data/loading/batches.py",
                old="record = watch.read(sample, epoch=epoch, min_side",
                new="record = watch.read(sample, epoch=0 if faults else epoch, min_side",
            ),
        ],
    ),
    Promise(
        DATA,
        "A remote shard is copied once, by one process, and again only if it has changed",
        tests=[
            "data/test_remote.py::test_remote_shards_are_copied_once",
            "data/test_remote.py::test_remote_copy_of_another_size_is_not_kept",
            "data/test_remote.py::test_remote_shard_that_has_changed_is_copied_anew",
            "data/test_remote.py::test_remote_shard_of_the_same_size_that_has_changed_is_copied_anew",
            "data/test_remote.py::test_remote_shard_is_copied_by_one_of_several_processes",
            "data/test_remote.py::test_remote_fault_is_named",
            "data/test_remote.py::test_remote_copy_is_used_when_nobody_answers",
        ],
        breaks=[
            Break(
                "remote: copied at each start",
                "fastclip/data/shards/remote.py",
                old="if have is None or size not in (None, have) or _mark(info) != _copied(copy):",
                new="if True:",
            ),
            Break(
                "remote: half of it is kept",
                "fastclip/data/shards/remote.py",
                old="if size is not None and half.stat().st_size != size:",
                new="if False:",
            ),
            Break(
                "remote: an old copy",
                "fastclip/data/shards/remote.py",
                old="size not in (None, have) or",
                new="",
            ),
            Break(
                "remote: an old copy of the same size",
                "fastclip/data/shards/remote.py",
                old=" or _mark(info) != _copied(copy)",
                new="",
            ),
            Break(
                "remote: the old version of a new copy",
                "fastclip/data/shards/remote.py",
                old="write_text(_marks(copy), _mark(info))",
                new="pass",
            ),
            Break(
                "remote: every process copies",
                "fastclip/data/shards/remote.py",
                old='with FileLock(copy.with_name(f"{copy.name}.lock")):',
                new="if True:",
            ),
        ],
    ),
    Promise(
        DATA,
        "Hidden files, and folders named `x.tar`, are not read as shards, neither from a folder or glob nor from a URL",
        tests=[
            "data/test_shards.py::test_hidden_files_and_folders_are_no_shards",
            "data/test_remote.py::test_remote_pattern_finds_no_hidden_names_and_folders",
        ],
        breaks=[
            Break(
                "shards: macOS's files of a folder are shards",
                "fastclip/data/files.py",
                old="if not is_hidden(path.name) and not path.is_dir())",
                new="if not path.is_dir())",
            ),
            Break(
                "shards: a glob finds folders",
                "fastclip/data/shards/source.py",
                old="if not os.path.isdir(path))",
                new="if path)",
            ),
            Break(
                "remote: hidden names are shards",
                "fastclip/data/shards/remote.py",
                old="if _in_hidden(path) or not _in_hidden(name)",
                new="if name",
            ),
        ],
    ),
    Promise(
        COST,
        "Braces that expand to more than a million shards are refused before they are expanded",
        tests=[
            "data/test_shards.py::test_braces_of_too_many_names_are_refused",
        ],
        breaks=[
            Break(
                "braces: a product is listed first",
                "fastclip/data/shards/braces.py",
                old="islice(braceexpand(pattern), _MOST + 1)",
                new="islice(braceexpand(pattern), _MOST)",
            ),
            Break(
                "braces: numbers of any length",
                "fastclip/data/shards/braces.py",
                old='max(map(len, (start, end, step or ""))) > 18',
                new="False",
            ),
        ],
    ),
    Promise(
        COST,
        "Training decodes a large JPEG at a reduced size and never enlarges a crop; evaluation decodes JPEGs "
        "at full size",
        tests=[
            "data/test_scaled.py::test_jpeg_keeps_the_side_that_is_needed",
            "data/test_scaled.py::test_training_scales_and_evaluation_does_not",
            "data/test_scaled.py::test_training_takes_no_crop_that_would_be_enlarged",
            "data/test_scaled.py::test_scaled_jpeg_is_turned_as_its_exif_says",
        ],
        breaks=[
            Break(
                "scaled: never",
                "fastclip/data/picture.py",
                old="image.draft(None, (min_side, min_side))",
                new="pass",
            ),
            Break(
                "scaled: too small",
                "fastclip/data/picture.py",
                old="image.draft(None, (min_side, min_side))",
                new="image.draft(None, (min_side // 2, min_side // 2))",
            ),
            Break(
                "scaled: evaluation too",
                "fastclip/data/loading/batches.py",
                old="self._candidates(max(index, 0)))",
                new="self._candidates(max(index, 0)), min_side=24)",
            ),
            Break(
                "scaled: crops are enlarged",
                "fastclip/models/transforms.py",
                old="math.ceil(size / _AREA[0])",
                new="size",
            ),
        ],
    ),
    Promise(
        DATA,
        "`hf:NAME` gives the images, captions, classes and splits of the datasets library",
        tests=[
            "data/test_hub.py::test_hub_columns_are_found",
            "data/test_hub.py::test_hub_format_that_was_saved_is_not_applied",
            "data/test_hub.py::test_hub_pictures_by_path_lie_beside_the_data",
            "data/test_hub.py::test_hub_captions_may_be_lists",
            "data/test_hub.py::test_hub_class_labels_are_classes",
            "data/test_hub.py::test_hub_splits_are_named",
            "data/test_hub.py::test_hub_row_that_cannot_be_used_has_its_cause",
        ],
        breaks=[
            Break(
                "hub: always the training split",
                "fastclip/data/sources/hub.py",
                old='split or "train", spec)',
                new='"train", spec)',
            ),
            Break(
                "hub: unknown labels are the last class",
                "fastclip/data/sources/hub.py",
                old="None if label == -1 else label",
                new="label",
            ),
            Break(
                "hub: a saved format is applied",
                "fastclip/data/sources/hub.py",
                old=".with_format(None)",
                new="",
            ),
            Break(
                "hub: pictures of the working directory",
                "fastclip/data/sources/hub.py",
                old="return beside if beside.exists() else",
                new="return",
            ),
            Break(
                "hub: a bad row ends the run",
                "fastclip/data/sources/hub.py",
                old='raise BadSample("no image", key, "the row has no image")',
                new='raise ValueError(f"{key}: the row has no image")',
            ),
            Break(
                "hub: the first caption of a list",
                "fastclip/data/sources/hub.py",
                old="return given_captions(value, key,",
                new="return given_captions(value[:1] if isinstance(value, list) else value, key,",
            ),
        ],
    ),
    Promise(
        DATA,
        "If a sample of a shard has several images, such as `x.jpg` and a mask `x.png`, the first is used",
        tests=[
            "data/test_shards.py::test_picture_and_its_mask_are_one_sample",
        ],
        breaks=[
            Break(
                "data: a mask is a second picture",
                "fastclip/data/shards/samples.py",
                old="key, kind = match[1], match[2].lower()\n",
                new='key, kind = match[1], match[2].lower(); kind = ".jpg" if kind in PICTURE_SUFFIXES else kind\n',
            ),
        ],
    ),
    Promise(
        DATA,
        "If a read returns fewer bytes than requested, it is continued",
        tests=[
            "data/test_shards.py::test_reads_of_a_few_bytes_are_put_together",
        ],
        breaks=[
            Break(
                "data: one read is all",
                "fastclip/data/shards/tar_index.py",
                old="while left and (part := file.read(left)):",
                new="if left and (part := file.read(left)):",
            ),
        ],
    ),
    Promise(
        DATA,
        "Images are rotated as their EXIF orientation states",
        tests=[
            "data/test_sources.py::test_picture_is_turned_as_its_exif_says",
        ],
        breaks=[
            Break(
                "data: as the camera was held",
                "fastclip/data/picture.py",
                old="ImageOps.exif_transpose(image, in_place=True)",
                new="pass",
            ),
        ],
    ),
]
