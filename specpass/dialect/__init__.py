"""The operators that graphs hold between passes: declared here, implemented in specpass.ops."""

from specpass.dialect import attention, cache, draft, prompt, rows, select
from specpass.dialect.define import NAMESPACE, OPERATORS, SPEC, Operator

__all__ = ["NAMESPACE", "OPERATORS", "SPEC", "Operator", "attention", "cache", "draft", "prompt", "rows", "select"]
