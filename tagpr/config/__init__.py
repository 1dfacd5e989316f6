"""Every default of every stage, as Hydra YAML."""
