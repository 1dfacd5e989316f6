"""One step off: rollouts that a step does not need any more go on in the next one (``trainer.v1.trainer_mode=colocate_async``).

verl 0.9.1 keeps one batch more in flight than a step takes (``trainer.v1.colocate_async.num_warmup_batches``): it trains on the
first groups that are done, interrupts the others for the update and lets them go on under the new weights. So the longest
responses hold nobody up, at the price of responses that are up to a step old. Actor and rollouts still take turns on the same
devices; rollouts on devices of their own (``separate_async``) need a weight transfer over NCCL and are not supported here.
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
