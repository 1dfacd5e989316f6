"""Stage ``evaluate``: every model answers the same rows; what that is worth, with intervals; a page about it.

``generate`` (vLLM) -> ``rows`` (one JSONL per model, resumable) -> ``prmu_scores`` (what the reward model says of
them) -> ``score`` (figures and differences) -> ``tables`` and ``report`` (what a person reads).
"""
