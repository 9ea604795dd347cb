"""fastclip's losses inside other packages."""

from __future__ import annotations

from broken import KEEP, Break, Promise

PROMISES = [
    Promise(
        KEEP,
        "`patch_open_clip` changes no number of open_clip, and warns once about a loss that it cannot replace",
        tests=[
            "integrations/test_integrations.py::test_open_clip_losses_are_the_same",
            "integrations/test_integrations.py::test_open_clip_of_several_processes_has_its_own_numbers",
            "integrations/test_integrations.py::test_open_clip_that_is_left_alone_is_told_once",
            "integrations/test_integrations.py::test_command_of_open_clip_trains_to_the_same_losses",
        ],
        breaks=[
            Break(
                "patches: open_clip's flags are not looked at",
                "fastclip/integrations/open_clip.py",
                old="self.world_size == 1 or (self.local_loss and self.gather_with_grad and not self.use_horovod)",
                new="not self.use_horovod",
            ),
            Break(
                "patches: told at every step",
                "fastclip/integrations/patching.py",
                old="self._messages.add(message)",
                new="",
            ),
            Break(
                "patches: SigLipLoss is forgotten",
                "fastclip/integrations/open_clip.py",
                old="_sigmoid_forward(sigmoid, Calls(theirs.SigLipLoss, sigmoid))",
                new="sigmoid",
            ),
        ],
    ),
    Promise(
        KEEP,
        "`patch_transformers` changes no loss, gradient or embedding of CLIP, SigLIP and ALIGN",
        tests=[
            "integrations/test_integrations.py::test_transformers_loss_and_gradients_are_the_same",
            "integrations/test_integrations.py::test_transformers_logits_stay_outside_training",
            "integrations/test_integrations.py::test_transformers_forward_is_called_as_before",
            "integrations/test_integrations.py::test_trainer_trains_to_the_same_losses",
        ],
        breaks=[
            Break(
                "patches: no logits in evaluation",
                "fastclip/integrations/transformers.py",
                old="wanted and self.training and not",
                new="wanted and not",
            ),
            Break(
                "patches: return_loss by position is not seen",
                "fastclip/integrations/transformers.py",
                old="args[position] if len(args) > position else kwargs.get",
                new="kwargs.get",
            ),
            Break(
                "patches: the signature is lost",
                "fastclip/integrations/transformers.py",
                old="@functools.wraps(dense)",
                new="",
            ),
            Break(
                "patches: the attention mask is lost",
                "fastclip/integrations/transformers.py",
                old="input_ids=input_ids, attention_mask=attention_mask, position_ids",
                new="input_ids=input_ids, position_ids",
            ),
            Break(
                "patches: ALIGN's loss without its smoothing",
                "fastclip/integrations/transformers.py",
                old="normalize=False, label_smoothing=0.1,",
                new="normalize=False,",
            ),
        ],
    ),
    Promise(
        KEEP,
        "Patched transformers models under DDP compute the loss of each process's pairs, or with `group` "
        "that of all pairs",
        tests=[
            "integrations/test_integrations.py::test_transformers_under_ddp",
        ],
        breaks=[
            Break(
                "patches: the group is forgotten",
                "fastclip/integrations/transformers.py",
                old="kind.honoured), group=group)",
                new="kind.honoured))",
            ),
        ],
    ),
    Promise(
        KEEP,
        "Unknown versions, and classes that compute something else, are not patched; `unpatch` restores the methods",
        tests=[
            "integrations/test_integrations.py::test_unknown_version_is_refused",
            "integrations/test_integrations.py::test_later_version_is_asked_for_what_it_computes",
            "integrations/test_integrations.py::test_class_that_computes_something_else_is_refused",
            "integrations/test_integrations.py::test_unpatch_gives_back_the_very_forwards",
            "integrations/test_integrations.py::test_patching_draws_no_random_numbers_and_says_nothing",
            "integrations/test_overrides.py::test_patch_on_top_of_a_patch_is_not_lost_in_silence",
        ],
        breaks=[
            Break(
                "patches: any newer version will do",
                "fastclip/integrations/patching.py",
                old="(newest is None or found <= newest)",
                new="True",
            ),
            Break(
                "patches: a parameter of a later version is ignored",
                "fastclip/integrations/transformers.py",
                old="inspect.signature(dense).parameters, known)",
                new="known, known)",
            ),
            Break(
                "patches: a field of a later version is left out",
                "fastclip/integrations/transformers.py",
                old="{*fused(model, **batch), *_LEFT_OUT}",
                new="dense(model, **batch)",
            ),
            Break(
                "patches: losses are not compared",
                "fastclip/integrations/patching.py",
                old="pairs = [(loss, our_loss), *zip(grads, our_grads)]",
                new="pairs = [*zip(grads, grads)]",
            ),
            Break(
                "patches: gradients are not compared",
                "fastclip/integrations/patching.py",
                old="pairs = [(loss, our_loss), *zip(grads, our_grads)]",
                new="pairs = [(loss, our_loss)]",
            ),
            Break(
                "patches: a second patch takes the first for the original",
                "fastclip/integrations/patching.py",
                old="_restore(package)\n    _patches",
                new="_patches",
            ),
            Break(
                "patches: a second call takes away what came between",
                "fastclip/integrations/patching.py",
                old="if forward is not ours:",
                new="if False:",
            ),
            Break(
                "patches: random numbers are drawn",
                "fastclip/integrations/transformers.py",
                old="torch.random.fork_rng(devices=[]), ",
                new="",
            ),
        ],
    ),
    Promise(
        KEEP,
        "If a loss of open_clip or transformers was overridden, the override is computed, with one warning",
        tests=[
            "integrations/test_overrides.py::test_changed_loss_of_open_clip_keeps_its_numbers",
            "integrations/test_overrides.py::test_what_is_replaced_after_the_patch_is_called",
            "integrations/test_overrides.py::test_replaced_loss_of_transformers_keeps_its_numbers",
            "integrations/test_overrides.py::test_towers_of_a_subclass_are_asked_as_before",
            "integrations/test_overrides.py::test_hook_that_would_not_be_called_is_refused",
        ],
        breaks=[
            Break(
                "patches: a subclass's methods are not called",
                "fastclip/integrations/patching.py",
                old="if name in vars(model) or getattr(kind, name) is not known",
                new="if name in vars(model)",
            ),
            Break(
                "patches: an instance's methods are not called",
                "fastclip/integrations/patching.py",
                old="if name in vars(model) or getattr(kind, name) is not known",
                new="if getattr(kind, name) is not known",
            ),
            Break(
                "patches: functions that were replaced are not called",
                "fastclip/integrations/patching.py",
                old="if module[name] is not known",
                new="if False",
            ),
            Break(
                "patches: a changed loss is told at every step",
                "fastclip/integrations/patching.py",
                old="self._messages.add(message)",
                new="",
            ),
            Break(
                "patches: SigLIP's towers are asked through another method",
                "fastclip/integrations/transformers.py",
                old='_encode_with("vision_model", "text_model")',
                new='_encode_with("get_image_features", "get_text_features")',
            ),
            Break(
                "modules: methods of a subclass are not called",
                "fastclip/losses/modules.py",
                old="if hasattr(type(module), hook) or hook in vars(module):",
                new="if hook in vars(module):",
            ),
        ],
    ),
]
