"""A prompt's kept keys and values in 8, 4 or 2 bits, and attention that reads them."""
