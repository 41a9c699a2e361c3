"""Floor 2: models, shard reader, training loops, checkpoints, metrics and evaluation."""
