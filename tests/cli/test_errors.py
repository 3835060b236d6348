"""Every mistake that can be made on the command line: one message with the fix, exit code 1, no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from cli_models import save_model
from tiny import tiny
from typer.testing import CliRunner

import specpass
from specpass import cli, errors, hub

runner = CliRunner()
EAGER = ["--lowering", "eager", "-n", "4"]
TEXT = " ".join(f"w{index % 90}" for index in range(60))

# Mistakes that a program can make and the command line cannot.
NOT_HERE = {
    errors.SpecpassError: "the base class",
    errors.DeviceMismatchError: "both models go to --device",
    errors.SeveralDevicesError: "both models go to --device",
    errors.RanksDisagreeError: "commands run in one process: tests/parallel",
    errors.DtypeMismatchError: "both models get --dtype",
    errors.UnsplicedGraphError: "the call goes on the second way",
    errors.GradientsError: "models are loaded in eval mode, without gradients",
    errors.NoAttentionSiteError: "needs an attention function of one's own; SDPA and eager attention are recognised",
    errors.PartialGraphError: "needs hooks or a model's own graph break",
    errors.UncompiledCacheError: "models are compiled first",
    errors.GraphLimitError: "a process that makes more than a thousand graphs of one model",
    errors.MethodMismatchError: "cache and backend get one method",
    errors.MaskError: "one prompt, no padding",
    errors.PositionsError: "one prompt, no padding",
    errors.CacheStateError: "one prompt, one cache",
    errors.MethodHookError: "needs a method of one's own",
    errors.TritonMissingError: "needs an environment without Triton",
    errors.OnnxMissingError: "needs an environment without onnx or onnxruntime",
    errors.VllmMissingError: "needs an environment without vLLM: tests/vllm/test_front.py",
    errors.VllmVersionError: "needs another vLLM: tests/vllm/test_front.py",
    errors.ServingError: "what a server refuses: tests/vllm/test_front.py",
    errors.HarnessMissingError: "its own start, python -m specpass.lm_eval: tests/test_lm_eval.py",
    errors.NoCudaError: "CUDA graphs are asked for in Python",
    errors.SpreadError: "how budgets are spread is chosen in Python",
    errors.GatedModelError: "needs the hub's answer: tests/hub/test_online.py",
    errors.PeerError: "a benchmark goes on without the peer, and says so",
    errors.PrefixCacheError: "one prompt, one cache",
    errors.PrefixVersionError: "needs a file of another version: tests/cache/test_prefix_file.py",
    errors.UnsupportedCallError: "--lowering is checked as an option; no labels",
}


class Folders:
    """Model folders, each made when a case asks for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.good = self.make("good")

    def make(self, name: str, **settings: Any) -> str:
        folder = self.root / name
        return str(folder if folder.exists() else save_model(folder, **settings))

    def truncated(self) -> str:
        folder = Path(self.make("truncated"))
        file = folder / "model.safetensors"
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size - 5)
        return str(folder)

    def bfloat16(self) -> str:
        folder = self.make("bfloat16")
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").save_pretrained(folder)
        return folder

    def t5(self) -> str:
        sizes = {"vocab_size": 128, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        transformers.T5Config(**sizes, decoder_start_token_id=0).save_pretrained(self.root / "t5")
        return str(self.root / "t5")

    def exported(self) -> str:
        folder = self.root / "exported"
        if not folder.exists():
            target, tokenizer = hub.load(self.good)
            specpass.export_onnx(target, method=specpass.StreamingLLM(budget=24), out=folder, tokenizer=tokenizer)
        return str(folder)

    def prefix(self) -> str:
        """What the good model has read of a document, without a draft."""
        file = self.root / "good.prefix"
        if not file.exists():
            model = specpass.compile(hub.load(self.good)[0], method=specpass.SnapKV(budget=40), lowering="eager")
            specpass.read(model, list(range(4, 64))).save(file)
        return str(file)

    def results(self) -> str:
        """A quality file whose only record claims more than its answer is worth."""
        from specpass.benchmarks.models import load_tokenizer
        from specpass.benchmarks.tasks.table import TASKS

        tokenizer = load_tokenizer(self.good)
        prompt = TASKS["niah_single_1"].prompt(0, 300, tokenizer)
        record = {
            "method": "full",
            "budget": None,
            "task": prompt.task,
            "length": 300,
            "seed": 0,
            "score": 1.0,
            "digest": prompt.digest,
            "expected": prompt.expected,
            "tokens": [5],
            "answer": tokenizer.decode([5]),
        }
        file = self.root / "claims.json"
        file.write_text(json.dumps({"settings": {"kind": "quality", "target": "good"}, "results": [record]}))
        return str(file)

    def coded(self) -> str:
        """A model of a class of its own, which lies beside it."""
        folder = self.root / "coded"
        folder.mkdir(exist_ok=True)
        config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    def wordless(self) -> str:
        """A model without a tokenizer."""
        tiny(layers=1).save_pretrained(self.root / "wordless")
        return str(self.root / "wordless")

    def empty(self) -> str:
        (self.root / "empty").mkdir(exist_ok=True)
        return str(self.root / "empty")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


def generate(target: str, *args: str, prompt: str = TEXT) -> list[str]:
    return ["generate", "-t", target, "--raw", "-p", prompt, *EAGER, *args]


Case = Callable[[Folders], list[str]]
READ = ("-m", "snapkv", "-b", "40", "--raw", "-o", "out.prefix", "-f", __file__)
SMALL = ("-b", "24", "--window", "8", "--lookahead", "4")
CASES: list[tuple[type[errors.SpecpassError], Case, tuple[str, ...]]] = [
    (errors.BudgetError, lambda f: generate(f.good, "-d", f.good, "-b", "lots"), ("'lots'", "256")),
    (
        errors.BudgetError,
        lambda f: generate(f.good, "-m", "snapkv", "-b", "8"),
        ("budget=8", "window=32", "lower window"),
    ),
    (errors.BudgetError, lambda f: generate(f.good, "-m", "snapkv", "-b", "1.5"), ("budget=1.5", "(0, 1]")),
    (
        errors.PromptBudgetError,
        lambda f: generate(f.good, "-d", f.good, "-m", "speckvpc", "-b", "64", "-o", "prompt_budget=48"),
        ("prompt_budget=48", "budget=64"),
    ),
    (
        errors.FirstLayerError,
        lambda f: generate(f.good, "-d", f.good, "-m", "specpc", "-b", "40", "--window", "8", "-o", "first_layer=9"),
        ("first_layer=9", "layers"),
    ),
    (errors.MissingDraftError, lambda f: generate(f.good), ("--draft NAME", "--method snapkv")),
    (errors.MethodOptionError, lambda f: generate(f.good, "-m", "fastkv"), ("'fastkv'", "snapkv", "full")),
    (
        errors.MethodOptionError,
        lambda f: generate(f.good, "-m", "streamingllm", "--window", "8"),
        ("'window'", "sinks"),
    ),
    (errors.MethodOptionError, lambda f: generate(f.good, "-m", "snapkv", "-o", "kernel"), ("'kernel'", "NAME=VALUE")),
    (
        errors.LookaheadError,
        lambda f: generate(f.good, "-b", "64", "-o", "lookahead_ids=[[1, 2], [3]]"),
        ("lengths [1, 2]", "one length"),
    ),
    (
        errors.LookaheadError,
        lambda f: generate(f.good, "-d", f.good, "-b", "64", "--lookahead", "ngram"),
        ("lookahead='ngram'", "a draft is given", "leave one of them out"),
    ),
    (
        errors.FuturesError,
        lambda f: generate(f.good, "-d", f.good, "-b", "64", "-o", "futures=4", "-o", "temperature=0.5"),
        ("futures=4", "temperature=0.5", "leave futures out"),
    ),
    (errors.BudgetError, lambda f: generate(f.good, "-b", "64", "--lookahead", "far"), ("lookahead='far'", "'ngram'")),
    (errors.PromptError, lambda f: generate(f.good, "-m", "full", prompt="  "), ("empty",)),
    (errors.PromptError, lambda f: [*generate(f.good, "-m", "full"), "-f", "prompt.txt"], ("leave one out",)),
    (errors.PromptError, lambda f: ["generate", "-t", f.good, "-m", "full", "-f", "no/such.txt"], ("no/such.txt",)),
    (
        errors.PromptError,
        lambda f: ["generate", "-t", f.make("plain", template=None), "-m", "full", "-p", TEXT],
        ("--raw",),
    ),
    (
        errors.OutputFileError,
        lambda f: ["explain", "-t", f.good, "-m", "snapkv", "--graph", "x.png"],
        ("x.png", ".svg or .dot"),
    ),
    (
        errors.OutputFileError,
        lambda f: ["explain", "-t", f.good, "-m", "snapkv", "-b", "40", *EAGER, "--graph", "/dev/null/x.dot"],
        ("/dev/null", "may write"),
    ),
    (
        errors.ExportError,
        lambda f: [
            "export",
            "-t",
            f.make("recurrent", family="lfm2"),
            "-m",
            "snapkv",
            "-b",
            "64",
            "--out",
            str(f.root / "out"),
        ],
        ("layer 0", "no attention layer"),
    ),
    (
        errors.BudgetError,
        lambda f: ["export", "-t", f.good, "-m", "snapkv", "-b", "auto", "--out", "out"],
        ("'auto'", "budget=256"),
    ),
    (errors.BudgetError, lambda f: generate(f.good, "-m", "streamingllm", "-b", "auto"), ("'auto'", "budget=1024")),
    (
        errors.BudgetError,
        lambda f: ["export", "-t", f.good, "-m", "snapkv", "-b", "0.5", "--out", "out"],
        ("0.5", "budget=256"),
    ),
    (
        errors.OutputFileError,
        lambda f: ["export", "-t", f.good, "-m", "streamingllm", "-b", "64", "--out", f.good],
        ("no earlier export", "new folder"),
    ),
    (errors.BundleError, lambda f: ["generate", "--onnx", f.empty(), "-p", TEXT], ("specpass.json", "specpass export")),
    (
        errors.SamplingError,
        lambda f: ["generate", "--onnx", f.exported(), "-p", TEXT, "--raw", "--temperature", "1", "--top-p", "0"],
        ("top_p=0.0",),
    ),
    (
        errors.OutputFileError,
        lambda f: ["demo", "-t", f.good, "-d", f.good, "-b", "40", "--out", "/dev/null/x"],
        ("/dev/null/x", "may write"),
    ),
    (
        errors.TokenizerMismatchError,
        lambda f: ["demo", "-t", f.good, "-d", f.make("other", words=60), "-b", "40"],
        ("different tokenizers", "same family", "tokenizers=(the target's, the draft's)"),
    ),
    (errors.UnknownModelError, lambda f: ["demo", "-t", "gpt-none", "-d", f.good], ("'gpt-none'", "smollm2-135m")),
    (errors.UnknownModelError, lambda f: ["explain", "-t", "gpt-none", "-m", "snapkv"], ("'gpt-none'",)),
    (
        errors.ParallelPlanError,
        lambda f: ["explain", "-t", f.good, "-m", "snapkv", "--tokens", "1000000", "--devices", "8"],
        ("2 KV heads", "8 processes", "divides 2"),
    ),
    (
        errors.ScaleError,
        lambda f: ["explain", "-t", f.good, "-m", "snapkv", "-b", "1024", "--tokens", "1000"],
        ("1,000", "budget of 1,024", "longer prompt"),
    ),
    (
        errors.ScaleError,
        lambda f: ["explain", "-t", f.make("recurrent", family="lfm2"), "-m", "snapkv", "--tokens", "10000"],
        ("lfm2", "dense decoders", "leave --tokens out"),
    ),
    (
        errors.UnknownArchError,
        lambda f: ["explain", "-t", f.good, "-m", "snapkv", "--tokens", "10000", "--arch", "sm_1"],
        ("sm_1", "sm_90"),
    ),
    (errors.UnknownModelError, lambda f: ["models", "path", "gpt-none"], ("'gpt-none'",)),
    (errors.UnknownModelError, lambda f: ["tune", "-t", "gpt-none"], ("'gpt-none'",)),
    (
        errors.OutputFileError,
        lambda f: ["tune", "-t", f.good, "--json", "/dev/null/x.json"],
        ("/dev/null", "may write"),
    ),
    (errors.OutputFileError, lambda f: ["tune", "-t", f.good, "--emit", "/dev/null/x"], ("/dev/null/x", "may write")),
    (errors.BudgetError, lambda f: ["demo", "-b", "0"], ("budget=0",)),
    (errors.BudgetError, lambda f: ["demo", "-b", "20"], ("budget=20", "window=32")),
    (errors.BudgetError, lambda f: ["explain", "-t", f.good, "-m", "snapkv", "-b", "0"], ("budget=0",)),
    (errors.BudgetError, lambda f: ["tune", "-t", f.good, "-b", "16"], ("budget=16", "window=32")),
    (errors.UnknownArchError, lambda f: ["tune", "-t", f.good, "--budget", "64", "--arch", "sm_1"], ("sm_1", "sm_90")),
    (errors.UnknownModelError, lambda f: generate("gpt-none", "-m", "full"), ("'gpt-none'", "smollm2-135m")),
    (errors.UnknownModelError, lambda f: generate(f.empty(), "-m", "full"), ("config.json",)),
    (errors.FetchError, lambda f: generate("nobody/nothing", "-m", "full"), ("HF_HUB_OFFLINE", "give a folder")),
    (
        errors.GgufError,
        lambda f: generate(f"{f.good}/model.safetensors", "-m", "full"),
        ("model.safetensors is no GGUF file", "name the folder"),
    ),
    (errors.UnknownModelError, lambda f: generate(f"{f.good}/m.gguf", "-m", "full"), ("no file", "m.gguf")),
    (errors.RevisionError, lambda f: generate(f.good, "-m", "full", "--revision", "v1"), ("'v1'", "Leave it out")),
    (errors.RevisionError, lambda f: ["models", "path", f.good, "--revision", "v1"], ("'v1'", "Leave it out")),
    (errors.RevisionError, lambda f: ["tune", "-t", f.good, "--revision", "v1"], ("'v1'", "Leave it out")),
    (
        errors.RevisionError,
        lambda f: ["demo", "-t", f.good, "-d", f.good, "--revision", "v1"],
        ("'v1'", "Leave it out"),
    ),
    (
        errors.RevisionError,
        lambda f: ["export", "-t", f.good, "-m", "none", "--out", "out", "--revision", "v1"],
        ("'v1'", "Leave it out"),
    ),
    (
        errors.RevisionError,
        lambda f: ["explain", "-t", f.good, "-m", "snapkv", "--revision", "v1"],
        ("'v1'", "Leave it out"),
    ),
    (
        errors.OutputFileError,
        lambda f: ["export", "-t", f.good, "-m", "none", "--out", "/dev/null/x"],
        ("/dev/null/x", "may write"),
    ),
    (errors.UnknownModelError, lambda f: generate("./no-such", "-m", "full"), ("no file or folder './no-such'",)),
    (errors.UnknownModelError, lambda f: generate("smollm2-135", "-m", "full"), ("Did you mean smollm2-135m?",)),
    (errors.UnknownModelError, lambda f: generate(f.wordless(), "-m", "full"), ("no tokenizer", "tokenizer.json")),
    (errors.UnknownModelError, lambda f: ["tune", "-t", f.empty()], ("no config.json",)),
    (
        errors.PromptError,
        lambda f: ["generate", "-t", f.good, "-m", "full", "-f", f.good],
        ("cannot be read: Is a directory",),
    ),
    (
        errors.PromptError,
        lambda f: ["generate", "-t", f.good, "-m", "full", "-f", f"{f.good}/model.safetensors"],
        ("no UTF-8 text", "at byte"),
    ),
    (errors.RemoteCodeError, lambda f: generate(f.coded(), "-m", "full"), ("'own'", "--trust-remote-code")),
    (errors.CorruptWeightsError, lambda f: generate(f.truncated(), "-m", "full"), ("bytes", "fetch or convert")),
    (errors.EncoderDecoderError, lambda f: generate(f.t5(), "-m", "full"), ("t5", "decoder-only")),
    (
        errors.SpeculationError,
        lambda f: generate(f.good, "-d", f.make("other", words=60), *SMALL, "--speculate", "4"),
        ("speculate=4", "leave speculate out"),
    ),
    (
        errors.BenchmarkError,
        lambda f: ["bench", "quality", "-t", f.good, "-d", f.good, "--tasks", "riddles"],
        ("'riddles'", "niah_single_1"),
    ),
    (
        errors.BenchmarkError,
        lambda f: ["bench", "speed", "-t", f.good, "-d", f.good, "--methods", "h2o"],
        ("'h2o'", "full_eager"),
    ),
    (errors.BenchmarkError, lambda f: ["bench", "verify", "no/such.json"], ("no/such.json", "specpass bench")),
    (errors.BenchmarkError, lambda f: ["bench", "plot", f"{f.good}/config.json"], ("config.json", "specpass bench")),
    (
        errors.BenchmarkError,
        lambda f: ["bench", "verify", f.results(), "-t", f.make("other", words=60)],
        ("--target good", "other"),
    ),
    (
        errors.VerificationError,
        lambda f: ["bench", "verify", f.results(), "-t", f.good],
        ("claims.json", "the score is 1.0", "--restart"),
    ),
    (
        errors.DraftBitsError,
        lambda f: generate(f.good, "-d", f.good, *SMALL, "--draft-bits", "8"),
        ("draft_bits=8", "float32 on cpu", "dtype=torch.bfloat16"),
    ),
    (
        errors.DraftBitsError,
        lambda f: generate(f.good, "-m", "full", "--draft-bits", "8"),
        ("--draft-bits 8", "--method speckv"),
    ),
    (
        errors.GeneratedError,
        lambda f: generate(f.good, "-m", "snapkv", "--budget", "8", "--window", "4", "--generated", "3"),
        ("generated=3", "8 at least"),
    ),
    (
        errors.CacheBitsError,
        lambda f: generate(f.good, "-m", "snapkv", "--budget", "8", "--window", "4", "--cache-bits", "3"),
        ("cache_bits=3", "8, 4, 2"),
    ),
    (
        errors.CacheBitsError,
        lambda f: generate(f.good, "-m", "full", "--cache-bits", "8"),
        ("--cache-bits 8", "--method snapkv"),
    ),
    (
        errors.GeneratedError,
        lambda f: generate(f.good, "-m", "full", "--generated", "64"),
        ("--generated 64", "--method snapkv"),
    ),
    (
        errors.DroppedError,
        lambda f: generate(f.good, "-m", "snapkv", "--budget", "8", "--window", "4", "--dropped", "disk"),
        ("dropped='disk'", "expected 'host'"),
    ),
    (
        errors.DroppedError,
        lambda f: generate(f.good, "-m", "full", "--dropped", "host"),
        ("--dropped host", "--method snapkv"),
    ),
    (
        errors.SpeculationError,
        lambda f: generate(f.good, "-m", "snapkv", "--budget", "8", "--window", "4", "--speculate", "4"),
        ("speculate=4", "SnapKV", "pass draft="),
    ),
    (
        errors.PrefixFileError,
        lambda f: generate(f.good, "-m", "snapkv", "-b", "40", "--prefix", f"{f.good}/no.prefix"),
        ("no.prefix is no file", "Prefix.save"),
    ),
    (
        errors.PrefixModelError,
        lambda f: generate(f.make("seeded", seed=7), "-m", "snapkv", "-b", "40", "--prefix", f.prefix()),
        ("other weights", "read the document with this target"),
    ),
    (
        errors.PrefixDtypeError,
        lambda f: generate(f.good, "-m", "snapkv", "-b", "40", "--dtype", "bfloat16", "--prefix", f.prefix()),
        ("in float32", "in bfloat16", "load the target in float32"),
    ),
    (
        errors.PrefixDraftError,
        lambda f: generate(f.good, "-d", f.good, *SMALL, "--prefix", f.prefix()),
        ("no draft has read", "lookahead_ids"),
    ),
    (
        errors.PrefixUnsupportedError,
        lambda f: ["read", "-t", f.make("recurrent", family="lfm2"), *READ],
        ("layer 0", "as one prompt"),
    ),
    (errors.PromptError, lambda f: ["read", "-t", f.good, *READ[:-1], "/dev/null"], ("empty",)),
    (errors.OutputFileError, lambda f: ["read", "-t", f.good, *READ, "-o", "/dev/null/x"], ("/dev/null", "may write")),
    (
        errors.DraftContextError,
        lambda f: generate(f.good, "-d", f.make("short", max_position_embeddings=48), *SMALL),
        ("60 tokens", "48", "lower lookahead"),
    ),
]


IDS = [f"{index}-{case[0].__name__}" for index, case in enumerate(CASES)]


@pytest.mark.parametrize(("error", "line", "texts"), CASES, ids=IDS)
def test_one_message_with_the_fix(error: type[Exception], line: Case, texts: tuple[str, ...], folders: Folders) -> None:
    args = line(folders)
    result = runner.invoke(cli.app, args)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    messages = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert len(messages) == 1
    for text in texts:
        assert text in messages[0]
    assert type(runner.invoke(cli.app, [*args, "--debug"]).exception) is error


def test_every_error_is_here_or_has_a_reason() -> None:
    known = {cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.SpecpassError)}
    assert known == {case[0] for case in CASES} | set(NOT_HERE)


@pytest.mark.parametrize(
    "args",
    [
        ["--lowering", "fast"],
        ["--dtype", "float8"],
        ["-n", "0"],
        ["--no-such-option"],
        ["--device", "cuda:99"],
        ["--device", "toaster"],
    ],
)
def test_wrong_options_are_2(folders: Folders, args: list[str]) -> None:
    result = runner.invoke(cli.app, ["generate", "-t", folders.good, "-m", "full", "-p", TEXT, *args])
    assert result.exit_code == 2
    assert args[0].lstrip("-") in result.stderr


@pytest.mark.parametrize("args", [["--batch", "0"], ["--prompt", "0"], ["--tiles", "0"], ["--jobs", "-1"], []])
def test_wrong_options_of_tune_are_2(folders: Folders, args: list[str]) -> None:
    result = runner.invoke(cli.app, ["tune", *(["-t", folders.good] if args else []), *args])
    assert result.exit_code == 2
    assert (args[0] if args else "--target") in result.stderr


def test_what_nobody_expected_is_70_and_says_how_to_see_more(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "load", lambda *_, **__: 1 / 0)
    args = ["generate", "-t", folders.good, "-m", "full", "-p", TEXT]
    result = runner.invoke(cli.app, args)
    assert result.exit_code == 70
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr
    assert isinstance(runner.invoke(cli.app, ["--debug", *args]).exception, ZeroDivisionError)


def test_a_folder_for_compiled_graphs_that_cannot_be_written_to(folders: Folders, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/dev/null/x")
    result = runner.invoke(cli.app, ["generate", "-t", folders.good, "-m", "snapkv", "-b", "40", "-p", TEXT])
    assert result.exit_code == 1
    assert "error: TORCHINDUCTOR_CACHE_DIR, where torch keeps what it compiles: /dev/null/x cannot" in result.stderr


def test_a_draft_larger_than_its_target_is_a_note(folders: Folders) -> None:
    small = folders.make("small", layers=1)
    result = runner.invoke(cli.app, generate(small, "-d", folders.good, *SMALL))
    assert result.exit_code == 0
    assert "note: the draft has more parameters (" in result.stderr
    assert "are --target and --draft swapped?" in result.stderr


def test_a_refusal_is_a_note_and_the_answer_comes(folders: Folders) -> None:
    folder = folders.make("masked", family="doge")
    result = runner.invoke(cli.app, generate(folder, "-m", "snapkv", "-b", "40"))
    assert result.exit_code == 0
    assert "note: nothing was pruned: model.layers.0.self_attn: attention mask: unknown" in result.stderr
    assert result.stdout.strip()
