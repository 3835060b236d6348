"""One text in the tokens of two tokenizers: what a draft of another family reads and writes, in the target's ids."""

from specpass.retokenize.carry import Pairs, paired
from specpass.retokenize.pair import Reading, TokenizerPair

__all__ = ["Pairs", "Reading", "TokenizerPair", "paired"]
