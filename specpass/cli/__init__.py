"""The command line: thin commands over the library."""

from specpass.cli.entry import app, main

__all__ = ["app", "main"]
