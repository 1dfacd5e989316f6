"""A trained model for others to ask: an OpenAI-compatible endpoint where ``user`` picks the profile."""
