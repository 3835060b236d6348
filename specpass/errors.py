"""One error class per mistake a user can make; each message names the value at fault and the fix.

Every error is raised before anything is changed: the model, its weights and the cache are left as they were.
"""

from __future__ import annotations


class SpecpassError(Exception):
    """Base of every error that specpass raises on purpose."""


class BudgetError(SpecpassError, ValueError):
    """A budget, window, kernel or lookahead that no graph can be compiled for."""


class PromptBudgetError(BudgetError):
    """A prompt budget or window that does not fit the KV budget or window behind it."""


class SpreadError(SpecpassError, ValueError):
    """Budgets that KV heads are to share, where that is not served."""


class GeneratedError(SpecpassError, ValueError):
    """Slots for generated tokens, or a way of evicting them, that cannot be had."""


class DroppedError(SpecpassError, ValueError):
    """Keys and values that are dropped are to be held for later turns, where that cannot be."""


class CacheBitsError(SpecpassError, ValueError):
    """A cache that cannot be held in so many bits, or not together with something else that was asked for."""


class FuturesError(SpecpassError, ValueError):
    """Several futures, with something that looks ahead in one way only."""


class FirstLayerError(SpecpassError, ValueError):
    """The draft has no layer of this number."""


class MethodHookError(SpecpassError, ValueError):
    """A user's own `score` or `select` that cannot become part of the graph."""


class MissingDraftError(SpecpassError, ValueError):
    """The method needs a draft model (or lookahead ids) and has none."""


class SpeculationError(SpecpassError, ValueError):
    """The draft cannot go on as a speculator, or not by so many tokens."""


class DraftBitsError(SpecpassError, ValueError):
    """A draft's weights cannot be read in so many bits."""


class TokenizerMismatchError(SpecpassError, ValueError):
    """Draft and target read different tokens."""


class DraftContextError(SpecpassError, ValueError):
    """The prompt and its lookahead are longer than the draft's context."""


class DeviceMismatchError(SpecpassError, ValueError):
    """Draft and target live on different devices."""


class SeveralDevicesError(SpecpassError, ValueError):
    """A model is spread over several devices."""


class ParallelPlanError(SpecpassError, ValueError):
    """A model is spread over processes in a way that cannot be pruned."""


class ScaleError(SpecpassError, ValueError):
    """A plan on paper of models or a method that nothing is counted of, or of a prompt that needs none."""


class RanksDisagreeError(SpecpassError, RuntimeError):
    """Processes that share a model were told different things, or one of them failed."""


class DtypeMismatchError(SpecpassError, ValueError):
    """A model in a dtype that an export cannot be made in."""


class GradientsError(SpecpassError, RuntimeError):
    """Training mode is on, or gradients are wanted: pruning has no backward."""


class EncoderDecoderError(SpecpassError, ValueError):
    """The model is not a decoder-only causal language model."""


class NoAttentionSiteError(SpecpassError, RuntimeError):
    """The traced graph holds no attention that specpass recognises."""


class PartialGraphError(SpecpassError, RuntimeError):
    """A graph break left the backend with a part of the model."""


class UnsplicedGraphError(SpecpassError, RuntimeError):
    """A traced graph that cannot be pruned, of a model whose own forward can be pruned around (specpass.interpret)."""


class UncompiledCacheError(SpecpassError, RuntimeError):
    """A BudgetCache was used by a model that is not compiled with specpass."""


class GraphLimitError(SpecpassError, RuntimeError):
    """A model has as many compiled graphs as Dynamo keeps."""


class MethodMismatchError(SpecpassError, ValueError):
    """The cache was made for another method or budget than the backend."""


class LookaheadError(SpecpassError, ValueError):
    """Lookahead ids of the wrong shape, or a lookahead that the method, or a draft beside it, cannot go with."""


class MaskError(SpecpassError, ValueError):
    """An attention mask that leaves a row without a last token."""


class PositionsError(SpecpassError, ValueError):
    """A padded batch is decoded without position_ids."""


class CacheStateError(SpecpassError, RuntimeError):
    """An operation that the cache's state does not allow."""


class UnsupportedCallError(SpecpassError, ValueError):
    """A call with arguments that specpass cannot serve."""


class PrefixModelError(SpecpassError, ValueError):
    """A prefix that another target has read, or this one with other weights."""


class PrefixDraftError(SpecpassError, ValueError):
    """A prefix that another draft has read, or none, where the draft is to go on from it."""


class PrefixDtypeError(SpecpassError, ValueError):
    """A prefix whose keys and values have another dtype than the model's."""


class PrefixFileError(SpecpassError, ValueError):
    """A file that is no prefix, or a part of one."""


class PrefixVersionError(SpecpassError, ValueError):
    """A prefix file of another version."""


class PrefixCacheError(SpecpassError, ValueError):
    """A prefix with a cache that holds something else, or that holds no prefix."""


class PrefixUnsupportedError(SpecpassError, ValueError):
    """A model or a method that cannot go on from a prefix; the message names the reason."""


class CorruptWeightsError(SpecpassError, ValueError):
    """A weight file is truncated or does not match its checksum or header."""


class UnknownArchError(SpecpassError, ValueError):
    """An architecture that kernels are not compiled for."""


class TritonMissingError(SpecpassError, RuntimeError):
    """Kernels are wanted and Triton is not installed."""


class NoCudaError(SpecpassError, RuntimeError):
    """CUDA graphs were asked for on a machine without CUDA."""


class UnknownModelError(SpecpassError, ValueError):
    """A model that is neither a known name, a folder, a file nor on the hub, or a folder that holds no model."""


class FetchError(SpecpassError, RuntimeError):
    """A model could not be fetched."""


class GatedModelError(FetchError):
    """A model of the hub whose terms must be accepted first, by somebody who is logged in."""


class RevisionError(SpecpassError, ValueError):
    """A revision that the hub does not have, or of something that has none."""


class RemoteCodeError(SpecpassError, ValueError):
    """A model that brings its own Python code, which nobody allowed to run."""


class GgufError(SpecpassError, ValueError):
    """A file that is no GGUF file, a part of one, or one that transformers does not read."""


class MethodOptionError(SpecpassError, ValueError):
    """A method's name, or one of its options, that does not exist or does not parse."""


class PromptError(SpecpassError, ValueError):
    """No prompt, an empty one, more than one, or one that cannot be read."""


class OutputFileError(SpecpassError, ValueError):
    """A file that cannot be written, or whose ending names no known format."""


class ExportError(SpecpassError, RuntimeError):
    """A model that has no ONNX form; the message names the operator and the layer."""


class OnnxMissingError(SpecpassError, RuntimeError):
    """A package that export or the runtime needs is not installed."""


class HarnessMissingError(SpecpassError, ModuleNotFoundError):
    """lm-evaluation-harness is not installed."""


class VllmMissingError(SpecpassError, ModuleNotFoundError):
    """vLLM is not installed, or cannot be imported."""


class VllmVersionError(SpecpassError, RuntimeError):
    """A vLLM whose server the step in front of it was not written for."""


class ServingError(SpecpassError, ValueError):
    """A method or an option that a server cannot go with, or what a request may not choose."""


class BundleError(SpecpassError, ValueError):
    """An exported folder that is of another version, incomplete, truncated, or leads outside of itself."""


class SamplingError(SpecpassError, ValueError):
    """A temperature, top_k, top_p or penalty that no token can be drawn with."""


class BenchmarkError(SpecpassError, ValueError):
    """A task, method or length that no benchmark can be made of, or a result file that does not fit the command."""


class VerificationError(SpecpassError, ValueError):
    """A result file whose prompts or scores are not what its seeds and answers give."""


class PeerError(SpecpassError, RuntimeError):
    """Another implementation could not be installed or run."""
