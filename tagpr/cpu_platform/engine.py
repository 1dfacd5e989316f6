"""verl's FSDP2 engine for the device "cpu" (loaded in every training worker through ``model.external_lib``)."""

import logging
from typing import Any
from unittest import mock

import torch
from tensordict import TensorDict
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.plugin.platform import get_platform
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

from tagpr.cpu_platform.prefix_sharing import Layout, group_size, lay_out
from tagpr.tree_attention import ATTENTION, use_tree_attention

logger = logging.getLogger(__name__)

if get_platform().device_name != "cpu":
    raise RuntimeError(
        f"verl chose the platform {get_platform().device_name!r}, not 'cpu': its plugin entry point was not loaded. "
        "Install the project (pip install -e .) in the environment of the Ray workers."
    )


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cpu")
class CPUFSDPEngineWithLMHead(transformer_impl.FSDPEngineWithLMHead):
    """FSDP2 over gloo. Responses share their prompts in a micro-batch (:mod:`tagpr.cpu_platform.prefix_sharing`)."""

    # What verl asks of the logits beyond log-probabilities and entropy goes its own way.
    _NEEDS_ALL_LOGITS = ("use_fused_kernels", "calculate_sum_pi_squared", "distillation_use_topk")

    def _build_module(self):  # type: ignore[no-untyped-def]
        module = super()._build_module()
        self._usual_attention = module.config._attn_implementation
        try:
            use_tree_attention(module)
        except ValueError as error:
            logger.warning("%s: prompts are not shared, and responses are padded", error)
            self._takes_trees = False
        else:
            self._takes_trees = True
        return module

    def _build_fsdp_module(self, module):  # type: ignore[no-untyped-def]
        # A forward-only engine (the KL reference) asks for pinned host memory, which needs an accelerator.
        unpinned = CPUOffloadPolicy(pin_memory=False)
        with mock.patch.object(transformer_impl, "CPUOffloadPolicy", return_value=unpinned):
            return super()._build_fsdp_module(module)

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Any, forward_only: bool = False
    ) -> list[TensorDict]:
        """As verl's, with the responses to a prompt in one micro-batch, where they fit into it."""
        prompts = data.get("prompts", None)
        # Micro-batches of a fixed number of rows would become as many times larger.
        dynamic = tu.get_non_tensor_data(data=data, key="use_dynamic_bsz", default=True)
        if dynamic and prompts is not None and prompts.is_nested:
            group = group_size([prompt.tolist() for prompt in prompts.unbind()])
            tokens = int(data["input_ids"].offsets().diff().view(-1, group).sum(1).max())
            if tokens <= tu.get_non_tensor_data(data=data, key="max_token_len_per_gpu", default=0):
                tu.assign_non_tensor(data, force_group_size=group)
        return super().forward_backward_batch(data, loss_function, forward_only=forward_only)

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """One packed sequence where that is possible, else what verl makes: a padded row a response."""
        parts = self._parts(micro_batch)
        self._attend(ATTENTION if parts else self._usual_attention)
        if parts is None:
            return super().prepare_model_inputs(micro_batch)
        layout = lay_out(*parts)
        inputs = {
            "input_ids": layout.token_ids[None],
            "position_ids": layout.positions[None],
            "attention_mask": None,
            "segments": layout.segments,
            "logits_to_keep": layout.rows,
        }
        return inputs, {"layout": layout}

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        """Log-probabilities of the responses' tokens (and the entropy where they were drawn), 0 where no one looks.

        Returns:
            ``log_probs`` and, where it is asked for, ``entropy``: jagged [n, prompt + response], each at the place of the token
            that predicts.
        """
        if "layout" not in output_args:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        layout: Layout = output_args["layout"]
        logits = output.logits[0].float()
        temperature = micro_batch["temperature"]
        if isinstance(temperature, torch.Tensor):
            logits = logits / temperature.float()[layout.owners, None]
        elif temperature != 1:
            logits = logits / temperature
        log_probs = logits.log_softmax(-1)
        offsets = micro_batch["input_ids"].offsets()

        def spread(values: torch.Tensor) -> torch.Tensor:
            everywhere = values.new_zeros(int(offsets[-1])).index_put((layout.places,), values)
            return torch.nested.nested_tensor_from_jagged(everywhere, offsets)

        made = {"log_probs": spread(log_probs.gather(-1, layout.labels[:, None])[:, 0])}
        if tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False):
            made["entropy"] = spread(-(log_probs.exp() * log_probs).sum(-1))
        return made

    def _parts(self, micro_batch: TensorDict) -> tuple[list[list[int]], list[list[int]]] | None:
        """Prompts and responses of a micro-batch; None where verl's own way has to be taken."""
        asked = {
            key: tu.get_non_tensor_data(data=micro_batch, key=key, default=False)
            for key in self._NEEDS_ALL_LOGITS
        }
        sequences = micro_batch["input_ids"]
        if not self._takes_trees or any(asked.values()) or not sequences.is_nested or self.use_ulysses_sp:
            return None
        whole = [sequence.tolist() for sequence in sequences.unbind()]
        if "prompts" in micro_batch and "responses" in micro_batch:
            if not micro_batch["prompts"].is_nested:
                return None
            cuts = micro_batch["prompts"].offsets().diff().tolist()
        else:
            # Supervised: what comes before the first token that is learned.
            mask = micro_batch.get("loss_mask", None)
            if mask is None or not mask.is_nested or not torch.equal(mask.offsets(), sequences.offsets()):
                return None
            cuts = [int(each.argmax()) if bool(each.any()) else len(each) for each in mask.unbind()]
        cuts = [max(1, cut) for cut in cuts]
        return (
            [each[:cut] for each, cut in zip(whole, cuts, strict=True)],
            [each[cut:] for each, cut in zip(whole, cuts, strict=True)],
        )

    def _attend(self, name: str) -> None:
        if self.module.config._attn_implementation != name:
            self.module.set_attn_implementation(name)
