"""Filtering and embedding of data sets."""

from __future__ import annotations

from broken import Break, Promise

FILTER, EMBED, CHECK = "search/test_filter.py", "search/test_embed.py", "data/test_check.py"
FOLDER, DATA = "fastclip/search/", "fastclip/data/"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Filtering and embedding": [
        Promise(
            "`fastclip filter` keeps the captions whose cosine with their picture is the threshold or more, and the samples that have one; what is not finite is dropped and counted",
            (f"{FILTER}::test_filter_keeps_what_the_definition_does", f"{FILTER}::test_threshold_is_inclusive", f"{FILTER}::test_similarity_that_is_not_finite_is_dropped_and_counted"),
            (
                Break("filter: the threshold itself is dropped", f"{FOLDER}filter.py", "states[found.best >= np.float32(threshold)] = _KEPT", "states[found.best > np.float32(threshold)] = _KEPT"),
                Break("filter: captions below the threshold stay", f"{FOLDER}filter.py", "zip(captions, similarities) if similarity >= self._threshold", "zip(captions, similarities)"),
                Break("filter: captions belong to the next picture", f"{FOLDER}filter.py", "pairs.images.repeat_interleave(counts, 0)", "pairs.images.roll(1, 0).repeat_interleave(counts, 0)"),
                Break("filter: the similarities of samples after a bad one", f"{FOLDER}filter.py", 'every[part["used"].numpy()] = part["counts"].numpy()', 'every[: len(part["counts"])] = part["counts"].numpy()'),
                Break("filter: one NaN drops all captions", f"{FOLDER}filter.py", "np.fmax.reduceat", "np.maximum.reduceat"),
            ),
        ),
        Promise(
            "near duplicates are those of comparing every picture with all that were kept before it; the first stays",
            (f"{FILTER}::test_near_duplicates_are_those_of_comparing_all", f"{FILTER}::test_first_of_near_duplicates_stays", f"{FILTER}::test_equal_vectors_are_duplicates_at_1"),
            (
                Break("duplicates: only within a block", f"{FOLDER}near_duplicates.py", "near_to[new] = place[", "place["),
                Break("duplicates: of a dropped one", f"{FOLDER}near_duplicates.py", "            if near_to[i] < 0:", "            if True:"),
                Break("duplicates: equal pictures are below 1", f"{FOLDER}near_duplicates.py", "    threshold = min(threshold, _SAME)\n", ""),
                Break("duplicates: the last stays", f"{FOLDER}near_duplicates.py", "argmax(1)]", "argmin(1)]"),
            ),
        ),
        Promise(
            "filtered pictures keep their bytes, and with them what their .json told; the folder is read as its shards",
            (f"{FILTER}::test_real_pictures_keep_their_bytes_and_what_is_known_of_them", f"{FILTER}::test_filter_keeps_what_the_definition_does"),
            (
                Break("filter: the histogram is a data set", "fastclip/data/spec.py", "not any(told or os.path.dirname(name) for", "not any(name for"),
                Break("fields: of a .txt's sample none", f"{DATA}shard_index.py", "if told is not None and told.header + BLOCK + told.size > end:", 'if ".txt" in group:'),
                Break("fields: another sample's key", f"{DATA}pack.py", ' if k not in ("caption", "key")}', "}"),
            ),
        ),
        Promise(
            "another threshold costs no more embedding; a folder of another call is left alone",
            (f"{FILTER}::test_similarities_are_computed_once_for_all_thresholds", f"{FILTER}::test_scores_are_those_of_the_captions_and_the_place", f"{FILTER}::test_filter_touches_no_other_call", f"{EMBED}::test_edited_captions_are_another_call", f"{FILTER}::test_scores_that_are_computed_anew_meet_no_result_of_before", f"{FILTER}::test_result_is_left_alone_by_a_call_without_a_threshold", f"{FILTER}::test_model_may_be_called_otherwise", f"{EMBED}::test_embed_touches_no_other_call"),
            (
                Break("filter: other samples, the same similarities", f"{FOLDER}filter.py", "[names]", "[]"),
                Break("filter: other captions, the same similarities", f"{FOLDER}pairs.py", "json.dumps((source.key(index), *captions)).encode()", "source.key(index).encode()"),
                Break("filter: another folder's data, the same similarities", f"{FOLDER}pairs.py", 'os.path.join(os.getcwd(), source.spec).encode("utf-8", "surrogatepass")', 'b""'),
                Break("filter: a table of other similarities", f"{FOLDER}filter.py", ', "scores": _digest(found)}', "}"),
                Break("filter: shards of other similarities", f"{FOLDER}filter.py", 'if (old := next(output.glob("*_stats.json"), None)) is not None:', "if False:"),
                Break("filter: without a threshold over another's result", f"{FOLDER}filter.py", ' or (output / "options.json").is_file():', ":"),
                Break("embed: other captions, the same vectors", f"{FOLDER}embed.py", '    options["names"] = names = ', "    names = "),
                Break("filter: other options, the same folder", f"{FOLDER}claim.py", "        if changed:", "        if not before:"),
            ),
        ),
        Promise(
            "`fastclip filter` and `fastclip embed`, killed anywhere: the same call goes on, to the same bytes",
            (f"{FILTER}::test_killed_search_commands_go_on_to_the_same_bytes", f"{EMBED}::test_rows_are_the_vectors_of_every_sample"),
            (
                Break("embed: the table comes first", f"{FOLDER}embed.py", '            for kind in ("img", "text"):\n', '            _write_table(table, part, store, found)\n            for kind in ("img", "text"):\n'),
                Break("embed: parts stay", f"{FOLDER}embed.py", "    shutil.rmtree(output / _PARTS, ignore_errors=True)\n", ""),
                Break("pairs: what is there is counted as none", f"{FOLDER}pairs.py", "rest = Subset(source, range(done, size))", "rest = Subset(source, range(size))"),
            ),
        ),
        Promise(
            "`fastclip embed` writes clip-retrieval's layout: row i of the three files is one sample, the first caption counts, and what cannot be used is in none",
            (f"{EMBED}::test_rows_are_the_vectors_of_every_sample", f"{EMBED}::test_file_numbers_have_clip_retrievals_zeros", f"{EMBED}::test_samples_that_cannot_be_used_are_in_none_of_the_files", f"{EMBED}::test_file_of_which_nothing_can_be_used_is_not_written"),
            (
                Break("embed: the names of unusable samples", f"{FOLDER}embed.py", 'part["used"].nonzero().flatten().tolist()', 'range(int(part["used"].sum()))'),
                Break("embed: the names of the first part", f"{FOLDER}embed.py", '            start += len(part["used"])\n', ""),
                Break("embed: digits of the last number", f"{FOLDER}embed.py", "math.log10(max(total, 1))", "math.log10(max(total - 1, 1))"),
                Break("embed: texts as pictures", f"{FOLDER}embed.py", '"text": pairs.texts.to(dtype)', '"text": pairs.images.to(dtype)'),
                Break("embed: a file without rows", f"{FOLDER}embed.py", "if found.total == len(part):", "if found.total > len(part):"),
            ),
        ),
    ],
}
# fmt: on
