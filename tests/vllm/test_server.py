"""vLLM's own server behind a draft, asked by OpenAI's own client: `make test-vllm`."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
MODEL = "smollm2-135m"
TEXT = " ".join(f"word{index}" for index in range(200))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server with a budget of 128 tokens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "specpass.cli", "serve", "-t", MODEL, "-d", MODEL, "-b", "128", "--lowering", "eager"]
    line += ["--enforce-eager", "--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port)]
    log: Path = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out, subprocess.Popen(line, stdout=out, stderr=out) as server:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
        server.terminate()


@pytest.fixture
def client(address: str) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=address, api_key="none")


def test_usage_counts_both_lengths(client: Any) -> None:
    ask = {"model": MODEL, "max_tokens": 4, "temperature": 0}
    usage = client.completions.create(prompt=TEXT, **ask).usage
    assert usage.prompt_tokens > 400
    assert usage.prompt_tokens_read == 128
    header = client.completions.create(prompt=TEXT, extra_headers={"X-Specpass-Budget": "96"}, **ask).usage
    assert header.prompt_tokens_read == 96
    body = client.completions.create(
        prompt=[TEXT, TEXT], extra_body={"vllm_xargs": {"specpass_budget": 100}}, **ask
    ).usage
    assert (body.prompt_tokens, body.prompt_tokens_read) == (2 * usage.prompt_tokens, 200)
    chat = [{"role": "user", "content": TEXT}]
    stream = client.chat.completions.create(messages=chat, stream=True, stream_options={"include_usage": True}, **ask)
    assert [part.usage.prompt_tokens_read for part in stream if part.usage] == [128]


def test_left_whole(client: Any) -> None:
    usage = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=4, echo=True, logprobs=1).usage
    assert usage.prompt_tokens_read == usage.prompt_tokens
    assert "log-probabilities" in usage.prompt_whole
    beams = {"use_beam_search": True}
    usage = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=3, n=2, extra_body=beams).usage
    assert usage.prompt_whole == "beam search"
    assert usage.prompt_tokens_read == usage.prompt_tokens


@pytest.mark.parametrize(
    "wrong", [{"extra_headers": {"X-Specpass-Budget": "many"}}, {"extra_body": {"vllm_xargs": {"specpass_budget": 8}}}]
)
def test_a_bad_request_gets_the_engines_own_error(client: Any, wrong: dict[str, Any]) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=TEXT, max_tokens=4, **wrong)
    with pytest.raises(openai.BadRequestError) as own:
        client.completions.create(model=MODEL, prompt=TEXT, max_tokens=-4)
    assert caught.value.body.keys() == own.value.body.keys()
    assert "budget=" in caught.value.body["message"]


def test_nothing_is_lost_when_clients_hang_up(address: str) -> None:
    openai = pytest.importorskip("openai")

    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=address, api_key="none") as client:
            ask = client.completions.create
            tasks = [
                asyncio.create_task(ask(model=MODEL, prompt=f"{index} {TEXT}", max_tokens=16)) for index in range(8)
            ]
            await asyncio.sleep(0.3)
            for index in (3, 6):
                tasks[index].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(run())
    assert [hasattr(one, "usage") for one in found] == [index not in (3, 6) for index in range(8)]
    assert all(one.usage.prompt_tokens_read == 128 for one in found if hasattr(one, "usage"))
