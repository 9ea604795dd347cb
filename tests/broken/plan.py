"""The prediction of memory."""

from __future__ import annotations

from broken import Break, Promise

TRAINING, PLAN = "fastclip/training/", "training/test_plan.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Plan": [
        Promise(
            "`fastclip plan` is within 15 % of the memory that measured steps take, and allocates nothing",
            (f"{PLAN}::test_plan_is_what_a_step_takes", f"{PLAN}::test_footprint_of_one_layer_is_counted_by_hand", f"{PLAN}::test_footprint_is_exact_for_other_batches", f"{PLAN}::test_bf16_and_checkpointing_make_activations_smaller"),
            (
                Break("plan: what dies is not forgotten", f"{TRAINING}footprint.py", "        self.bytes -= self._sizes.pop(key)", "        self._sizes.pop(key)"),
                Break("plan: DDP's buckets are forgotten", f"{TRAINING}planning.py", "return self.gradients if self._ddp and self.cached else 0", "return 0"),
                Break("plan: bf16 is forgotten", f"{TRAINING}footprint.py", 'enabled=self.precision == "bf16"', "enabled=False"),
            ),
        ),
        Promise(
            "the largest micro-batch fits and one more pair does not; states, shards and the loss are counted as they are",
            (f"{PLAN}::test_largest_micro_batch_is_the_largest", f"{PLAN}::test_states_are_of_the_models_parameters", f"{PLAN}::test_fsdp_holds_a_share", f"{PLAN}::test_loss_is_that_of_the_scaling_model"),
            (
                Break("plan: one pair too many", f"{TRAINING}planning.py", "        return low\n", "        return high\n"),
                Break("plan: AdamW has one state", f"{TRAINING}planning.py", '"adamw": 2', '"adamw": 1'),
                Break("plan: log-sum-exps are forgotten", f"{TRAINING}planning.py", "held = texts * (2 * size + _FP32)", "held = texts * 2 * size"),
            ),
        ),
    ],
}
# fmt: on
