"""Floor 0, the ground: config, storage, tracking, cluster and launcher access. Knows nothing of images."""
