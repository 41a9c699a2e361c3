"""The shard reader: dataset index -> order of an epoch -> decoded crops -> corrupted batches."""
