"""fastclip's losses inside other packages."""

from __future__ import annotations

from broken import Break, Promise

PACKAGE, TESTS = "fastclip/integrations/", "integrations/test_integrations.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Integrations": [
        Promise(
            "`patch_open_clip` changes no number of open_clip, alone, of several processes and in its command; no N x N matrix is made, or a warning says so",
            (f"{TESTS}::test_open_clip_losses_are_the_same", f"{TESTS}::test_open_clip_of_several_processes_has_its_own_numbers", f"{TESTS}::test_open_clip_that_is_left_alone_is_told_once", f"{TESTS}::test_command_of_open_clip_trains_to_the_same_losses"),
            (
                Break("patches: open_clip's flags are not looked at", f"{PACKAGE}open_clip.py", "self.world_size == 1 or (self.local_loss and self.gather_with_grad and not self.use_horovod)", "not self.use_horovod"),
                Break("patches: told at every step", f"{PACKAGE}open_clip.py", "            warned = True\n", ""),
                Break("patches: SigLipLoss is forgotten", f"{PACKAGE}open_clip.py", "functools.wraps(sigmoid)(SigLipLoss.forward)", "sigmoid"),
            ),
        ),
        Promise(
            "`patch_transformers` changes no loss, gradient or embedding of CLIP, SigLIP and ALIGN in training, where no N x N matrix is made, and nothing elsewhere",
            (f"{TESTS}::test_transformers_loss_and_gradients_are_the_same", f"{TESTS}::test_transformers_logits_stay_outside_training", f"{TESTS}::test_transformers_forward_is_called_as_before", f"{TESTS}::test_trainer_trains_to_the_same_losses"),
            (
                Break("patches: no logits in evaluation", f"{PACKAGE}transformers.py", "fused if wanted and self.training else", "fused if wanted else"),
                Break("patches: return_loss by position is not seen", f"{PACKAGE}transformers.py", "args[position] if len(args) > position else kwargs.get", "kwargs.get"),
                Break("patches: the signature is lost", f"{PACKAGE}transformers.py", "    @functools.wraps(dense)\n", ""),
                Break("patches: the attention mask is lost", f"{PACKAGE}transformers.py", "input_ids=input_ids, attention_mask=attention_mask, position_ids", "input_ids=input_ids, position_ids"),
                Break("patches: ALIGN's loss without its smoothing", f"{PACKAGE}transformers.py", "normalize=False, label_smoothing=0.1,", "normalize=False,"),
            ),
        ),
        Promise(
            "under DDP each process's own loss as in transformers, or with `group` one process's with all pairs",
            (f"{TESTS}::test_transformers_under_ddp",),
            (
                Break("patches: the group is forgotten", f"{PACKAGE}transformers.py", "_forward(kind, dense, group=group)", "_forward(kind, dense)"),
            ),
        ),
        Promise(
            "versions that are not known and classes that compute something else are refused; `unpatch` gives back the very forwards",
            (f"{TESTS}::test_unknown_version_is_refused", f"{TESTS}::test_class_that_computes_something_else_is_refused", f"{TESTS}::test_unpatch_gives_back_the_very_forwards", f"{TESTS}::test_patching_draws_no_random_numbers_and_says_nothing"),
            (
                Break("patches: any newer version will do", f"{PACKAGE}patching.py", "int(numbers[2])) <= newest", "int(numbers[2]))"),
                Break("patches: losses are not compared", f"{PACKAGE}patching.py", "pairs = [(loss, our_loss), *zip(grads, our_grads)]", "pairs = [*zip(grads, grads)]"),
                Break("patches: gradients are not compared", f"{PACKAGE}patching.py", "pairs = [(loss, our_loss), *zip(grads, our_grads)]", "pairs = [(loss, our_loss)]"),
                Break("patches: a second patch takes the first for the original", f"{PACKAGE}patching.py", "    _restore(package)\n    _originals[package] = {owner: vars", "    _originals[package] = {owner: vars"),
                Break("patches: random numbers are drawn", f"{PACKAGE}transformers.py", "torch.random.fork_rng(devices=[]), ", ""),
            ),
        ),
    ],
}
# fmt: on
