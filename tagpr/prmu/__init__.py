"""PRMU: the personalised reward model with user embeddings (S15-S21), its training, its client."""
