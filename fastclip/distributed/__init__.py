"""Losses over a batch that is sharded over several ranks: agreement of the ranks, collectives, gather and ring."""

from fastclip.distributed.agreement import Shards, check_comm, check_group, meet, reported
from fastclip.distributed.collectives import before_group, gather_rows, sum_over_ranks
from fastclip.distributed.ring_losses import ring_sigmoid_pairs
from fastclip.distributed.statistics import (
    largest_over_ranks,
    sharded_distillation,
    sharded_maxima,
    sharded_statistics,
    whole_rows,
    with_all_texts,
)

__all__ = [
    "Shards",
    "before_group",
    "check_comm",
    "check_group",
    "gather_rows",
    "largest_over_ranks",
    "meet",
    "reported",
    "ring_sigmoid_pairs",
    "sharded_distillation",
    "sharded_maxima",
    "sharded_statistics",
    "sum_over_ranks",
    "whole_rows",
    "with_all_texts",
]
