"""vLLM's own OpenAI server, whose engine is handed shortened prompts. Imports vLLM: see check_vllm."""

from __future__ import annotations

import asyncio
import contextlib
from argparse import Namespace
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.exceptions import VLLMValidationError
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from specpass.errors import ServingError, SpecpassError
from specpass.vllm.front import Front

MIDDLEWARE = "specpass.vllm.middleware.Middleware"


class FrontedLLM(AsyncLLM):
    """vLLM's engine; what clients are told of a prompt is the prompt that they sent."""

    front: Front

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        try:
            shorter = await self.front.shorten(prompt, sampling_params, request_id)
        except SpecpassError as error:
            raise VLLMValidationError(str(error)) from error
        async with contextlib.aclosing(super().generate(shorter, sampling_params, request_id, **kwargs)) as outputs:
            async for out in outputs:
                if shorter is not prompt and out.prompt_token_ids is not None:
                    out.prompt_token_ids = prompt["prompt_token_ids"]
                yield out


def parse(model: str, name: str, arguments: Sequence[str]) -> Namespace:
    """vLLM's options, checked by vLLM.

    Raises: ServingError: servers of several processes, or not of HTTP: the step runs in one, before the engine.
    """
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="specpass serve"))
    args = parser.parse_args(["--model", model, "--served-model-name", name, *arguments])
    several = args.api_server_count not in (None, 1)
    for option, given in (("--api-server-count", several), ("--headless", args.headless), ("--grpc", args.grpc)):
        if given:
            raise ServingError(f"{option}: the draft runs in one server process, which speaks HTTP: leave it out.")
    validate_parsed_serve_args(args)
    args.middleware = [*args.middleware, MIDDLEWARE]
    return args


def run(args: Namespace, front: Front) -> None:
    """Serve until a signal ends it."""
    asyncio.run(_run(args, front))


async def _run(args: Namespace, front: Front) -> None:
    address, sock = setup_server(args, reuse_port=False)
    options = AsyncEngineArgs.from_cli_args(args)
    usage = UsageContext.OPENAI_API_SERVER
    config = options.create_engine_config(usage_context=usage)
    engine = FrontedLLM.from_vllm_config(
        config,
        usage_context=usage,
        enable_log_requests=options.enable_log_requests,
        aggregate_engine_logging=options.aggregate_engine_logging,
        disable_log_stats=options.disable_log_stats,
    )
    engine.front = front
    try:
        await engine.reset_mm_cache()
        ended = await build_and_serve(engine, address, sock, args)
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)
    try:
        await ended
    finally:
        sock.close()
