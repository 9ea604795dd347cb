"""Shuffles, shards and their index."""

from __future__ import annotations

from broken import DATA, STOPS, TRAINING, Break, Promise

PROMISES = [
    Promise(
        TRAINING,
        "The shuffle of an epoch makes every order equally likely, and its memory does not grow with the dataset",
        tests=[
            "data/test_permutation.py::test_permutation_has_every_number_once",
            "data/test_permutation.py::test_permutation_has_every_order_equally_often",
            "data/test_permutation.py::test_permutation_is_shuffled_like_a_random_one",
            "data/test_permutation.py::test_permutation_of_many_does_not_depend_on_how_it_is_asked",
            "data/test_permutation.py::test_order_of_billions_takes_no_memory",
        ],
        breaks=[
            Break(
                "shuffle: numbers beyond the size",
                "fastclip/data/loading/permutation.py",
                old="numbers[beyond] = self._network(numbers[beyond])",
                new="numbers[beyond] %= np.uint64(self.size)",
            ),
            Break(
                "shuffle: of three, rotations only",
                "fastclip/data/loading/permutation.py",
                old="math.isqrt(size - 1) + 1",
                new="math.isqrt(size)",
            ),
            Break(
                "shuffle: three rounds",
                "fastclip/data/loading/permutation.py",
                old="_ROUNDS = 8",
                new="_ROUNDS = 3",
            ),
        ],
    ),
    Promise(
        DATA,
        "A shard is indexed once, and again only if the shard or its index has changed",
        tests=[
            "data/test_shards.py::test_index_is_made_once",
            "data/test_shards.py::test_index_is_made_anew_for_another_file",
            "data/test_shards.py::test_index_that_is_damaged_is_made_anew",
            "data/test_shards.py::test_index_is_in_the_cache_folder_where_none_can_lie_beside_the_shard",
            "data/test_shards.py::test_members_are_those_of_tarfile",
        ],
        breaks=[
            Break(
                "index: never kept",
                "fastclip/data/shards/index.py",
                old="write_bytes(file, head + content)",
                new="pass",
            ),
            Break(
                "index: that of an older file",
                "fastclip/data/shards/index.py",
                old="(_MAGIC, stamp, len(content))",
                new="(_MAGIC, Stamp(size, mtime_ns), len(content))",
            ),
            Break(
                "index: damage is not seen",
                "fastclip/data/shards/index.py",
                old="or zlib.crc32(content) != checksum",
                new="",
            ),
            Break(
                "index: no cache folder",
                "fastclip/data/shards/index.py",
                old='Path(f"{path}.fastclip-index"), _cached(path)',
                new='(Path(f"{path}.fastclip-index"),)',
            ),
            Break(
                "index: a long name is what its header holds",
                "fastclip/data/shards/tar_index.py",
                old="self._note(kind, data)",
                new="pass",
            ),
        ],
    ),
    Promise(
        DATA,
        "Several processes can index a shard at the same time, and none ever sees an incomplete index",
        tests=[
            "data/test_shards.py::test_index_made_by_several_processes_at_once_is_whole",
            "data/test_shards.py::test_index_has_its_name_when_it_is_whole",
        ],
        breaks=[
            Break(
                "index: written in its place",
                "fastclip/data/shards/index.py",
                old="write_bytes(file, head + content)",
                new="file.write_bytes(head + content)",
            ),
        ],
    ),
    Promise(
        DATA,
        "A shard that is replaced during a run is detected and named",
        tests=[
            "data/test_shards.py::test_shard_that_changes_under_a_run_is_named",
        ],
        breaks=[
            Break(
                "shard: another file of this name is read",
                "fastclip/data/shards/source.py",
                old="same = stamp_of(os.fstat(file.fileno())) == self._stamps[shard]",
                new="same = True",
            ),
            Break(
                "shard: other samples in the same places",
                "fastclip/data/shards/source.py",
                old='and zlib.crc32(data[:BLOCK]) == row[f"{kind}_crc"]',
                new="",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A run that resumes with another number of processes neither loses nor repeats a sample",
        tests=[
            "data/test_mixture.py::test_run_that_goes_on_with_other_ranks_loses_and_repeats_nothing",
            "data/test_mixture.py::test_order_of_fewer_shards_than_workers_does_not_depend_on_them",
        ],
        breaks=[
            Break(
                "ranks: each its own order",
                "fastclip/data/loading/batches.py",
                old="Order(len(source), batch_size, seed)",
                new="Order(len(source), batch_size, seed + rank)",
            ),
            Break(
                "ranks: a step is of the ranks' number",
                "fastclip/data/loading/batches.py",
                old="order.draws(step, *piece)",
                new="order.draws(step + ranks, *piece)",
            ),
        ],
    ),
]
