"""A KV cache of fixed budget: policy in budget.py, a layer's storage in layer.py, transformers' side in protocol.py."""

from specpass.cache.budget import BudgetCache

__all__ = ["BudgetCache"]
