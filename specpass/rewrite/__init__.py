"""How graphs are rewritten: what a pass is, what it is told, and the runner that checks it."""

from specpass.rewrite.base import Kind, Pass, Refusal, Request
from specpass.rewrite.facts import Facts
from specpass.rewrite.pipeline import Observer, Pipeline

__all__ = ["Facts", "Kind", "Observer", "Pass", "Pipeline", "Refusal", "Request"]
