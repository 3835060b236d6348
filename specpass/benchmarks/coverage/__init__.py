"""Which decoder families of transformers are pruned, which run exactly and why: tried on tiny random models."""
