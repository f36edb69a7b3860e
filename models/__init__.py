"""Floor 4, what it computes: configurations, native torch modules, caches, generation."""
