"""Model families: the only home of architecture names."""
