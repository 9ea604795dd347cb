"""The prediction of memory."""

from __future__ import annotations

from broken import COST, Break, Promise

PROMISES = [
    Promise(
        COST,
        "`fastclip plan` predicts the memory of steps measured on a CPU within 15 %, and allocates none of it",
        tests=[
            "training/test_plan.py::test_plan_is_what_a_step_takes",
            "training/test_plan.py::test_footprint_of_one_layer_is_counted_by_hand",
            "training/test_plan.py::test_footprint_is_exact_for_other_batches",
            "training/test_plan.py::test_kept_graphs_are_beside_each_phase",
            "training/test_plan.py::test_bf16_and_checkpointing_make_activations_smaller",
        ],
        breaks=[
            Break(
                "plan: what dies is not forgotten",
                "fastclip/training/planning/footprint.py",
                old="self.bytes -= self._sizes.pop(key)",
                new="self._sizes.pop(key)",
            ),
            Break(
                "plan: DDP's buckets are forgotten",
                "fastclip/training/planning/memory.py",
                old="return self.gradients if self._ddp and self.cached else 0",
                new="return 0",
            ),
            Break(
                "plan: kept graphs are not in memory during the loss",
                "fastclip/training/planning/memory.py",
                old="kept = self.graphs if self.cached else",
                new="kept = 0 if self.cached else",
            ),
            Break(
                "plan: kept graphs are not in memory while others are embedded",
                "fastclip/training/planning/memory.py",
                old="highest = max(highest, self.graphs + self.footprint.embedding_peak(self.micro_batch))",
                new="highest = max(highest, self.footprint.embedding_peak(self.micro_batch))",
            ),
            Break(
                "plan: bf16 is forgotten",
                "fastclip/training/planning/footprint.py",
                old='enabled=self.precision == "bf16"',
                new="enabled=False",
            ),
        ],
    ),
    Promise(
        COST,
        "`fastclip plan` finds the largest micro-batch that fits in memory",
        tests=[
            "training/test_plan.py::test_largest_micro_batch_is_the_largest",
            "training/test_plan.py::test_largest_number_of_graphs_is_the_largest",
            "training/test_plan.py::test_states_are_of_the_models_parameters",
            "training/test_plan.py::test_fsdp_holds_a_share",
            "training/test_plan.py::test_loss_is_that_of_the_scaling_model",
            "training/test_plan.py::test_loss_of_prefixes_is_what_it_takes",
            "training/test_plan.py::test_gathered_prefixes_are_kept",
            "training/test_plan.py::test_running_means_are_held",
            "training/test_choose.py::test_prefixes_and_running_means_are_planned",
        ],
        breaks=[
            Break(
                "plan: gradients of prefixes are forgotten",
                "fastclip/training/planning/memory.py",
                old="held += self.pairs * (widest + (len(widths) > 1) * dim) * size",
                new="pass",
            ),
            Break(
                "plan: the widest prefix alone is gathered",
                "fastclip/training/planning/memory.py",
                old="self.batch_size * (sum(widths) * size",
                new="self.batch_size * (widest * size",
            ),
            Break(
                "plan: the running means are forgotten",
                "fastclip/training/planning/memory.py",
                old="+ taught + self.means",
                new="+ taught",
            ),
            Break(
                "auto: prefixes are forgotten",
                "fastclip/training/planning/choose.py",
                old='"prefixes": options.prefixes',
                new='"prefixes": None',
            ),
            Break(
                "plan: one pair too many",
                "fastclip/training/planning/memory.py",
                old="return low",
                new="return high",
            ),
            Break(
                "plan: AdamW has one state",
                "fastclip/training/planning/memory.py",
                old='"adamw": 2',
                new='"adamw": 1',
            ),
            Break(
                "plan: log-sum-exps are forgotten",
                "fastclip/training/planning/memory.py",
                old="widest * (size + _FP32))",
                new="widest * size)",
            ),
        ],
    ),
    Promise(
        COST,
        "Model FLOP utilisation counts each pair once and no padding; `fastclip plan` counts the operations that run",
        tests=[
            "training/test_operations.py::test_operations_are_those_of_the_closed_forms",
            "training/test_operations.py::test_operations_of_bert_are_those_of_the_closed_form",
            "training/test_operations.py::test_locked_towers_have_no_backward_pass",
            "training/test_operations.py::test_loss_of_prefixes_is_counted_once_for_each",
            "training/test_operations.py::test_padding_does_not_count",
            "training/test_operations.py::test_ranks_share_one_utilisation",
            "training/test_operations.py::test_run_says_its_utilisation",
            "training/test_speed.py::test_limit_is_that_of_a_count_by_hand",
            "training/test_speed.py::test_prediction_is_near_the_measured_step",
        ],
        breaks=[
            Break(
                "operations: a locked tower has a backward pass",
                "fastclip/training/planning/operations.py",
                old="return self.trains_image * self.image + self.trains_text * self.text(tokens)",
                new="return self.image + self.text(tokens)",
            ),
            Break(
                "operations: the loss compares whole features",
                "fastclip/training/planning/operations.py",
                old="sum(prefixes) if prefixes else",
                new="",
            ),
            Break(
                "operations: tokens are those of one process",
                "fastclip/training/step/update.py",
                old="tokens = round(mean_tokens * self.world.ranks)",
                new="",
            ),
            Break(
                "utilisation: the rate is that of one process",
                "fastclip/training/run/utilisation.py",
                old="return sum(known)\n",
                new="return known[0]\n",
            ),
            Break(
                "plan: gradient caching embeds once",
                "fastclip/training/planning/speed.py",
                old="executed = operations.executed(p.batch_size, tokens, again=again)",
                new="executed = operations.executed(p.batch_size, tokens)",
            ),
        ],
    ),
    Promise(
        COST,
        "`--micro-batch auto` and `--keep-graphs auto` stay within the memory, and a resumed run keeps its micro-batch",
        tests=[
            "training/test_choose.py::test_whole_share_is_taken_if_it_fits",
            "training/test_choose.py::test_choice_never_takes_more_than_the_memory",
            "training/test_choose.py::test_choice_has_the_least_work",
            "training/test_choose.py::test_rough_footprint_is_an_upper_bound",
            "training/test_choose.py::test_resumed_run_has_the_same_micro_batch_and_bits",
            "training/test_choose.py::test_ranks_choose_for_the_one_with_the_least_memory",
            "training/test_choose.py::test_all_ranks_keep_as_many_graphs_as_the_one_with_the_fewest_micro_batches",
        ],
        breaks=[
            Break(
                "auto: caching where the step fits",
                "fastclip/training/planning/choose.py",
                old="if not caching and whole.total <= memory:",
                new="if False:",
            ),
            Break(
                "auto: more than the memory",
                "fastclip/training/planning/choose.py",
                old="fitting = [one for one in plans if one.total <= memory]",
                new="fitting = plans",
            ),
            Break(
                "auto: the work of second forward passes is forgotten",
                "fastclip/training/planning/choose.py",
                old="kept = p.kept_graphs *",
                new="kept = 0 *",
            ),
            Break(
                "auto: the rough footprint is too small",
                "fastclip/training/planning/footprint.py",
                old="_ROUGH * total // _ROUGH_PAIRS",
                new="total // _ROUGH_PAIRS // 2",
            ),
            Break(
                "auto: a resumed run chooses anew",
                "fastclip/training/planning/choose.py",
                old="if micro_batch is None and before is not None and _alike(before, options, world):",
                new="if False:",
            ),
            Break(
                "auto: each rank chooses for its own memory",
                "fastclip/training/planning/choose.py",
                old="return min(of_all_ranks(usable_memory(",
                new="return max(of_all_ranks(usable_memory(",
            ),
            Break(
                "auto: ranks keep different numbers of graphs",
                "fastclip/training/planning/memory.py",
                old="return ceil_div(batch_size // world_size, micro_batch) -",
                new="return ceil_div(ceil_div(batch_size, world_size), micro_batch) -",
            ),
        ],
    ),
]
