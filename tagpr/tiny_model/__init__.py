"""A tiny Qwen3 made on the spot, so that every stage trains something real without a download."""
