"""The second way, for models that no whole graph can be had of: their own forward runs, pruning happens around it.

A `torch.overrides.TorchFunctionMode` (watch.py) sees each scaled_dot_product_attention that reads what the cache was
just told; prompt.py scores and compacts there, lookahead.py sends a draft's tokens through afterwards, steps.py attends
to the slots in use; run.py is one call.
"""
