"""Ready-made runs: LightningCLI configs, one file a recipe."""
