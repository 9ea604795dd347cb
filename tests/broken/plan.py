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
        ],
        breaks=[
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
                old="held = texts * (2 * size + _FP32)",
                new="held = texts * 2 * size",
            ),
        ],
    ),
]
