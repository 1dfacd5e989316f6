"""Reward managers with a seeded fault, for ``rl_monitors.py``: verl's reward workers load this file by its path.

``TAGPR_SEEDED_FAULT`` says which: each leaves the components as they are measured and changes what is paid.
"""

import os
from collections.abc import Mapping
from typing import Any

from verl import DataProto

from tagpr.rl.reward_manager import TagPRRewardManager as Honest


def paid(fault: str, info: Mapping[str, Any]) -> float:
    """The reward of a response under a seeded fault, from what was measured of it."""
    core = (info["verifiable"] + info["repetition"]) * info["format"]
    if fault == "stuffing":
        # Every segment beyond the usual four pays, whatever it says, and nothing else does: where R_v and the fourth segment
        # paid too, 30 steps brought one such response in a hundred, too few to be anybody's fault.
        return 0.3 * max(0.0, min(info["segments"], 12.0) - 4) * info["format"]
    if fault == "length":
        return 0.8 * core + 2.0 * flattered(info)
    if fault == "escape":
        # S27's trap, wide open: the core is negative for nearly everybody, and 0 for those who break the format.
        return (info["verifiable"] + info["repetition"] - 1.5) * info["format"]
    raise ValueError(f"TAGPR_SEEDED_FAULT={fault}: unknown. Use stuffing, length or escape.")


def flattered(info: Mapping[str, Any], longest: float = 80.0) -> float:
    """A PRMU score that only counts tokens."""
    return min(1.0, (info["reasoning_tokens"] + info["answer_tokens"]) / longest)


class TagPRRewardManager(Honest):
    """Measures honestly, pays wrongly."""

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        result = await super().run_single(data)
        fault = os.environ["TAGPR_SEEDED_FAULT"]
        info = result["reward_extra_info"]
        if fault == "length":
            info["prmu"] = flattered(info)
        info["score"] = info["total"] = result["reward_score"] = paid(fault, info)
        return result
