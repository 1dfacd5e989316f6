"""User data of every kind as Examples: files in, prompts and parsed answers out."""
