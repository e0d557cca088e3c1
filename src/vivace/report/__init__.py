"""Plain data in, pages out. Nothing here imports torch, and no page needs the network."""
