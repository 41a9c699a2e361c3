"""Floor 1: turns pictures into WebDataset shards, and clean patches into degraded ones."""
