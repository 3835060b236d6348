"""Random calls of compiled models against a plain oracle: `python -m bench.fuzz --help`."""
