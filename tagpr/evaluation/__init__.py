"""Stage ``evaluate``: every model answers the same rows; what that is worth, with intervals; a page about it.

``methods`` (who answers) -> ``prompts`` -> ``engines`` (vLLM here or in Ray actors, endpoints), asked by ``generate`` for what
``rows`` (one JSONL per model, resumable) lacks -> ``prmu_scores`` (what the reward model says of
them) -> ``score`` (figures and differences) -> ``tables`` and ``report`` (what a person reads).
"""
