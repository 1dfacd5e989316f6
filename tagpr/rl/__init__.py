"""Guided and exploratory RL: GSPO on verl's V1 trainer with the composite reward (paper section 3.4)."""
