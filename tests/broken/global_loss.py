"""The global contrastive loss, and training with it."""

from __future__ import annotations

from broken import DATA, NUMBERS, PROCESSES, STOPS, TRAINING, Break, Promise

_LOSS = "fastclip/losses/global_contrastive.py"

PROMISES = [
    Promise(
        NUMBERS,
        "`GlobalContrastiveLoss` follows SogCLR's and FastCLIP's formulas, and of the whole dataset is its loss",
        tests=[
            "losses/test_global_contrastive.py::test_steps_are_those_of_the_papers",
            "losses/test_global_contrastive.py::test_gradient_is_that_of_the_dataset_s_loss",
        ],
        breaks=[
            Break(
                "a first visit is averaged with an estimator of 0",
                _LOSS,
                old="moved = torch.where(before == -torch.inf, log_g, torch",
                new="moved = torch.where(before == torch.inf, log_g, torch",
            ),
            Break(
                "the mean counts a row's own pair",
                _LOSS,
                old="negatives = N - repeats",
                new="negatives = N + 0 * repeats",
            ),
            Break(
                "the last of the repeats of a sample updates its mean",
                _LOSS,
                old="log_g = _mean_of_repeats(index, log_g)",
                new="pass",
            ),
            Break("the sum of the positive logits of repeats", _LOSS, old="side.pos / repeats", new="side.pos"),
            Break(
                "the temperature has the gradient of g alone",
                _LOSS,
                old="+ self.rho) / scale",
                new="+ self.rho) / scale.detach()",
            ),
            Break("eps is left out", _LOSS, old="        if self.eps:\n", new="        if False:\n"),
        ],
    ),
    Promise(
        NUMBERS,
        "The global loss's means keep their digits at a logit scale of 100; a step that overflows leaves them alone",
        tests=[
            "losses/test_global_contrastive.py::test_estimators_do_not_overflow",
            "losses/test_global_contrastive.py::test_step_that_overflows_leaves_the_state",
        ],
        breaks=[
            Break(
                "the ratio of exponentials",
                _LOSS,
                old="torch.exp(log_g - log_u)",
                new="log_g.float().exp() / log_u.float().exp()",
            ),
            Break("NaN enters the state", _LOSS, old="torch.where(log_g.isfinite(), moved, before)", new="moved"),
        ],
    ),
    Promise(
        NUMBERS,
        "Validation leaves the global loss's means alone, in eval mode or without gradients; a batch of one sample has "
        "no gradient",
        tests=[
            "losses/test_global_contrastive.py::test_validation_reads_the_state_only",
            "losses/test_global_contrastive.py::test_batch_of_one_sample_has_no_gradient",
        ],
        breaks=[
            Break(
                "a call under no_grad changes the means",
                _LOSS,
                old="updates = self.training and torch.is_grad_enabled()",
                new="updates = self.training",
            ),
            Break(
                "rho has a gradient without negatives",
                _LOSS,
                old="losses = torch.where(negative, losses, 0.0)",
                new="pass",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "A global loss that was built before `init_process_group` says so, and is not that of one process",
        tests=[
            "distributed/test_global_contrastive.py::test_loss_that_was_built_before_the_group_is_refused",
        ],
        breaks=[
            Break(
                "the other processes are ignored",
                _LOSS,
                old="if group is None and self._before_ranks and _ranks() > 1:",
                new="if False:",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "The global loss over several processes is that of one process, and all of them hold the same running means, "
        "bit for bit",
        tests=[
            "distributed/test_global_contrastive.py::test_ranks_compute_the_loss_of_the_batch",
            "losses/test_global_contrastive.py::test_means_of_repeats_depend_on_no_order",
        ],
        breaks=[
            Break(
                "the mean of repeats depends on the order in which a GPU adds",
                _LOSS,
                old="torch.zeros_like(log_g, dtype=torch.int64).index_add_(0, places, (shares * 2.0**62).long())",
                new="torch.zeros_like(log_g).index_add_(0, places, shares * 2.0**62)",
            ),
            Break(
                "a rank reads the estimators of the first rows",
                _LOSS,
                old="own = shards.own_images",
                new="own = slice(len(log_g))",
            ),
        ],
    ),
    Promise(
        STOPS,
        "A run with `--loss global` resumes with its running means: losses, means and weights are those of a run that "
        "never stopped, bit for bit",
        tests=[
            "training/test_global_loss.py::test_resumed_run_is_the_run_that_never_stopped",
            "training/test_global_loss.py::test_checkpoint_that_does_not_fit_is_refused",
        ],
        breaks=[
            Break(
                "the means start again",
                "fastclip/training/run/loss_state.py",
                old="loss.load_state_dict(tensors)",
                new="pass",
            ),
            Break(
                "means of another dataset",
                "fastclip/training/run/loss_state.py",
                old="if found is None or found.shape != x.shape:",
                new="if found is None:",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Micro-batches update the running means of the global loss once per step; gamma follows FastCLIP's schedule",
        tests=[
            "training/test_global_loss.py::test_gradient_caching_updates_the_means_once",
            "training/test_global_loss.py::test_schedule_of_gamma",
        ],
        breaks=[
            Break(
                "the samples of the last micro-batch",
                "fastclip/training/step/update.py",
                old="torch.cat([batch.samples for batch in batches])",
                new="torch.cat([batches[-1].samples for batch in batches])[: len(labels)]",
            ),
            Break(
                "gamma falls over all epochs",
                "fastclip/training/from_options.py",
                old="cosine_gamma(epoch, epochs / 2,",
                new="cosine_gamma(epoch, epochs,",
            ),
        ],
    ),
    Promise(
        DATA,
        "A sample has the same number in every epoch, also in weighted data and when it replaces another",
        tests=[
            "data/test_mixture.py::test_position_of_a_sample_is_the_same_in_every_epoch",
            "data/test_mixture.py::test_batches_of_a_mixture_have_the_positions_of_their_samples",
            "training/test_global_loss.py::test_replaced_samples_update_the_means_of_their_replacements",
        ],
        breaks=[
            Break(
                "the number of a draw",
                "fastclip/data/sources/mixture.py",
                old="return self._starts[source] + sample",
                new="return index",
            ),
            Break(
                "the sample that was drawn in place of its replacement",
                "fastclip/data/loading/batches.py",
                old="sample_position(self._watch.source, sample, draw.epoch)",
                new="sample_position(self._watch.source, draw.sample, draw.epoch)",
            ),
        ],
    ),
]
