"""verl and vLLM on a machine without a GPU: the same trainer, rollouts and weight sync, on gloo and the CPU.

``platform`` is loaded by verl (entry-point group ``verl.plugins``), ``engine`` through ``model.external_lib``,
``patches:keep_linear_weights`` by vLLM (``vllm.general_plugins``). Where there is a GPU, all three do nothing.
"""

# Environment variable: CPU threads of one training worker.
TRAINING_THREADS = "TAGPR_TRAINING_THREADS"
