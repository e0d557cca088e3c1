"""Training data: clips as latents with text embeddings, in memory or in shards on disk, and what makes them."""
