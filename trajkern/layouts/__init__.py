"""How rollouts lie in memory: packed batches, spans of them, trees of shared prefixes."""
