"""One step off: rollouts that a step does not need any more go on in the next one (``trainer.v1.trainer_mode=colocate_async``).

verl 0.9.1 keeps one batch more in flight than a step takes (``trainer.v1.colocate_async.num_warmup_batches``): it trains on the
first groups that are done, interrupts the others for the update and lets them go on under the new weights. So the longest
responses hold nobody up, at the price of responses that are up to a step old. Actor and rollouts still take turns on the same
devices; rollouts on devices of their own (``separate_async``) need a weight transfer over NCCL and are not supported here.

Measured against synchronous training (``tests/perf/one_step_off.py``; MiniLaMP, 16 steps of 80 responses, two seeds each, two
busy CPU cores): reward of the last 4 steps 0.832 against 0.840, R_v 0.899 against 0.901, R_v of greedy dev answers 0.945 against
0.941, each difference less than that between seeds; responses 0.57 versions of the weights old on average, at most 1; 2.5 s a
step in both: nothing is gained where all responses are short.
"""

from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync

from tagpr.rl.trainer import TagPRTrainer


class TagPRAsyncTrainer(TagPRTrainer, PPOTrainerColocateAsync):
    """What verl's asynchronous trainer does beyond the synchronous one, around what ours does."""

    def on_sample_end(self) -> None:
        """Interrupt what is still being generated."""
        self.checkpoint_manager.abort_replicas()
        super().on_sample_end()

    def on_step_end(self) -> None:
        """Let it go on, under the new weights."""
        super().on_step_end()
        self.checkpoint_manager.resume_generation_replicas()
