"""The eager oracle: plain formulas over transformers' own attention, to test methods of one's own against."""
