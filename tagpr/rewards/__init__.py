"""The composite reward: one component a file, joined in ``composite``. Pure functions, no torch."""
