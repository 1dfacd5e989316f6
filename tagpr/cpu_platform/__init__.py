"""verl and vLLM on a machine without a GPU: the same trainer, rollouts and weight sync, on gloo and the CPU.

``platform`` is loaded by verl (entry-point group ``verl.plugins``), ``engine`` through ``model.external_lib``,
``patches:for_vllm`` by vLLM (``vllm.general_plugins``). Where there is a GPU, all three do nothing.
"""
