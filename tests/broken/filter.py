"""Filtering and embedding of datasets."""

from __future__ import annotations

from broken import SEARCH, STOPS, Break, Promise

PROMISES = [
    Promise(
        SEARCH,
        "`fastclip filter` keeps captions at or above the threshold; similarities that are not finite are "
        "dropped and counted",
        tests=[
            "curation/test_filter.py::test_filter_keeps_what_the_definition_does",
            "curation/test_filter.py::test_threshold_is_inclusive",
            "curation/test_filter.py::test_similarity_that_is_not_finite_is_dropped_and_counted",
        ],
        breaks=[
            Break(
                "filter: the threshold itself is dropped",
                "fastclip/curation/filter.py",
                old="states[scores.best >= np.float32(threshold)] = _KEPT",
                new="states[scores.best > np.float32(threshold)] = _KEPT",
            ),
            Break(
                "filter: captions below the threshold stay",
                "fastclip/curation/filter.py",
                old="zip(captions, similarities) if similarity >= self._least",
                new="zip(captions, similarities)",
            ),
            Break(
                "filter: captions belong to the next picture",
                "fastclip/curation/filter.py",
                old="pairs.images.repeat_interleave(counts, 0)",
                new="pairs.images.roll(1, 0).repeat_interleave(counts, 0)",
            ),
            Break(
                "filter: the similarities of samples after a bad one",
                "fastclip/curation/filter.py",
                old='every[part["used"].numpy()] = part["counts"].numpy()',
                new='every[: len(part["counts"])] = part["counts"].numpy()',
            ),
            Break(
                "filter: one NaN drops all captions",
                "fastclip/curation/filter.py",
                old="np.fmax.reduceat",
                new="np.maximum.reduceat",
            ),
        ],
    ),
    Promise(
        SEARCH,
        "Near duplicates are found by comparing every image with all kept images; the first one is kept",
        tests=[
            "curation/test_filter.py::test_near_duplicates_are_those_of_comparing_all",
            "curation/test_filter.py::test_first_of_near_duplicates_stays",
            "curation/test_filter.py::test_equal_vectors_are_duplicates_at_1",
        ],
        breaks=[
            Break(
                "duplicates: only within a block",
                "fastclip/curation/near_duplicates.py",
                old="near_to[new] = place[",
                new="place[",
            ),
            Break(
                "duplicates: of a dropped one",
                "fastclip/curation/near_duplicates.py",
                old="if near_to[i] < 0:",
                new="if True:",
            ),
            Break(
                "duplicates: equal pictures are below 1",
                "fastclip/curation/near_duplicates.py",
                old="threshold = min(threshold, _SAME)",
                new="",
            ),
            Break(
                "duplicates: the last stays",
                "fastclip/curation/near_duplicates.py",
                old="argmax(1)]",
                new="argmin(1)]",
            ),
        ],
    ),
    Promise(
        SEARCH,
        "Filtered images keep their bytes and metadata, and the output folder can be read as a dataset",
        tests=[
            "curation/test_filter.py::test_real_pictures_keep_their_bytes_and_what_is_known_of_them",
            "curation/test_filter.py::test_filter_keeps_what_the_definition_does",
        ],
        breaks=[
            Break(
                "filter: the histogram is a data set",
                "fastclip/data/spec.py",
                old="picture.captioned or os.path.dirname(picture.name) for",
                new="picture.name for",
            ),
            Break(
                "fields: of a .txt's sample none",
                "fastclip/data/shards/samples.py",
                old="picture, *usable)",
                new="picture, usable[0], None if usable[0] else usable[1], usable[2])",
            ),
            Break(
                "fields: another sample's key",
                "fastclip/data/pack.py",
                old=' if k not in ("caption", "key")}',
                new="}",
            ),
        ],
    ),
    Promise(
        SEARCH,
        "Another threshold needs no new embedding; an output of other data or options is left unchanged",
        tests=[
            "curation/test_filter.py::test_similarities_are_computed_once_for_all_thresholds",
            "curation/test_filter.py::test_scores_are_those_of_the_captions_and_the_place",
            "curation/test_filter.py::test_filter_touches_no_other_call",
            "curation/test_embed.py::test_changed_captions_and_pictures_are_embedded_again",
            "curation/test_embed.py::test_same_name_in_another_folder_is_another_call",
            "curation/test_embed.py::test_every_part_of_a_mixture_has_its_place",
            "curation/test_filter.py::test_pictures_that_were_replaced_are_other_data",
            "curation/test_filter.py::test_scores_that_are_computed_anew_meet_no_result_of_before",
            "curation/test_filter.py::test_result_is_left_alone_by_a_call_without_a_threshold",
            "curation/test_filter.py::test_model_may_be_called_otherwise",
            "curation/test_embed.py::test_embed_touches_no_other_call",
            "curation/test_filter.py::test_largest_picture_is_part_of_the_call",
            "curation/test_embed.py::test_largest_picture_is_part_of_the_call",
        ],
        breaks=[
            Break(
                "filter: what was too large stays left out, whatever is asked for",
                "fastclip/embedding/pairs.py",
                old="limit_in_words().encode()",
                new='b""',
            ),
            Break(
                "filter: other samples, the same similarities",
                "fastclip/curation/filter.py",
                old="[contents]",
                new="[]",
            ),
            Break(
                "filter: other captions, the same similarities",
                "fastclip/embedding/pairs.py",
                old="json.dumps((state, *captions))",
                new="json.dumps((state,))",
            ),
            Break(
                "filter: another folder's data, the same similarities",
                "fastclip/data/identity.py",
                old="return os.path.join(folders[folder], base), state",
                new="return base, state and None",
            ),
            Break(
                "filter: a table of other similarities",
                "fastclip/curation/filter.py",
                old=', "scores": _digest(scores)}',
                new="}",
            ),
            Break(
                "filter: shards of other similarities",
                "fastclip/curation/filter.py",
                old='if (old := next(output.glob("*_stats.json"), None)) is not None:',
                new="if False:",
            ),
            Break(
                "filter: without a threshold over another's result",
                "fastclip/curation/filter.py",
                old=' or (output / "options.json").is_file():',
                new=":",
            ),
            Break(
                "embed: other captions, the same vectors",
                "fastclip/curation/embed.py",
                old="before.contents == contents and",
                new="True and",
            ),
            Break(
                "embed: another picture of the name, the same vector",
                "fastclip/data/identity.py",
                old='"none" if state is None else file_state(state)',
                new='"none"',
            ),
            Break(
                "embed: another folder of the name, the same call",
                "fastclip/embedding/pairs.py",
                old='"source": absolute_spec(source.spec)',
                new='"source": source.spec',
            ),
            Break(
                "filter: other options, the same folder",
                "fastclip/system/claim.py",
                old="if changed := [key",
                new="if not before and [key",
            ),
        ],
    ),
    Promise(
        STOPS,
        "If `fastclip filter` or `fastclip embed` is killed, it resumes, and its output is byte-identical",
        tests=[
            "curation/test_filter.py::test_killed_search_commands_go_on_to_the_same_bytes",
            "curation/test_embed.py::test_rows_are_the_vectors_of_every_sample",
        ],
        breaks=[
            Break(
                "embed: the table comes first",
                "fastclip/curation/embed.py",
                old="for kind in place.kinds:",
                new="_write_table(place, part, store, written)\n    for kind in place.kinds:",
            ),
            Break(
                "embed: parts stay",
                "fastclip/curation/embed.py",
                old="shutil.rmtree(output / _PARTS, ignore_errors=True)",
                new="",
            ),
            Break(
                "pairs: what is there is counted as none",
                "fastclip/embedding/pairs.py",
                old="rest = Subset(source, range(done, size))",
                new="rest = Subset(source, range(size))",
            ),
        ],
    ),
    Promise(
        SEARCH,
        "`fastclip embed` writes the layout of clip-retrieval: row i of its three files belongs to the same sample",
        tests=[
            "curation/test_embed.py::test_rows_are_the_vectors_of_every_sample",
            "curation/test_embed.py::test_file_numbers_have_clip_retrievals_zeros",
            "curation/test_embed.py::test_samples_that_cannot_be_used_are_in_none_of_the_files",
            "curation/test_embed.py::test_file_of_which_nothing_can_be_used_is_not_written",
        ],
        breaks=[
            Break(
                "embed: the names of unusable samples",
                "fastclip/curation/embed.py",
                old='part["used"].nonzero().flatten().tolist()',
                new='range(int(part["used"].sum()))',
            ),
            Break(
                "embed: the names of the first part",
                "fastclip/curation/embed.py",
                old='start += len(part["used"])',
                new="",
            ),
            Break(
                "embed: digits of the last number",
                "fastclip/curation/embed.py",
                old="len(str(len(starts)))",
                new="len(str(len(starts) - 1))",
            ),
            Break(
                "embed: texts as pictures",
                "fastclip/curation/embed.py",
                old='"text": pairs.texts.to(dtype)',
                new='"text": pairs.images.to(dtype)',
            ),
            Break(
                "embed: a file without rows",
                "fastclip/curation/embed.py",
                old="if not rows:",
                new="if rows < 0:",
            ),
        ],
    ),
]
