"""`specpass serve`: an OpenAI server whose engine reads shortened prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from specpass.cli.options import Budget, Draft, Dtype, Lowering, Options, Target, choose, example, silence_libraries

ORDER = 3


def add(app: typer.Typer) -> None:
    line = "specpass serve -t qwen2.5-coder-1.5b -d qwen2.5-coder-0.5b --max-model-len 8192"
    more = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(epilog=example(line), context_settings=more)(serve)


def serve(
    ctx: typer.Context,
    target: Target,
    draft: Draft = None,
    method: Annotated[str, typer.Option("--method", "-m", help="specpc: an engine is given token ids.")] = "specpc",
    budget: Budget = "1024",
    option: Options = None,
    engine: Annotated[str, typer.Option(help="vllm, in an environment that holds it.")] = "vllm",
    min_prompt: Annotated[int, typer.Option(min=0, help="Prompts of fewer tokens are left alone.")] = 0,
    draft_dtype: Dtype = "auto",
    lowering: Lowering = "inductor",
) -> None:
    """Serve a model by vLLM, behind a draft that shortens prompts to BUDGET tokens; further options are vLLM's own."""
    if engine != "vllm":
        raise typer.BadParameter(f"{engine!r}: the one engine that is known is vllm.", param_hint="--engine")
    choice = choose(target, draft, method, budget, None, None, option, draft_dtype, lowering)
    from specpass import hub
    from specpass.backend.checks import check_tokenizers
    from specpass.backend.shorten import PromptCompressor
    from specpass.errors import ServingError
    from specpass.methods.specpc import SpecPC
    from specpass.vllm import check_vllm

    if not isinstance(choice.method, SpecPC) or choice.draft is None:
        raise ServingError(
            f"--method {method}: it prunes the KV cache, which is vLLM's here; specpc needs nothing but token ids: "
            "--method specpc, or `specpass generate`."
        )
    check_vllm()
    from specpass.vllm.front import Front
    from specpass.vllm.server import parse, run

    path = str(hub.model_path(target))
    args = parse(path, target, ctx.args)
    silence_libraries()
    model, _tokenizer = hub.load(choice.draft, draft_dtype)
    model.requires_grad_(False)
    check_tokenizers(hub.read_config(target), model.config)
    run(args, Front(PromptCompressor(model, choice.method, lowering=lowering), min_prompt))
