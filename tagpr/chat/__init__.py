"""Asking language models over HTTP: typed attempts, retries, adaptive concurrency, budgets, structured outputs."""
