"""What stands in front of vLLM, without vLLM: requests' choices, counts in responses, what is left whole or refused."""

from __future__ import annotations

import asyncio
import json
import sys
import types
from typing import Any

import pytest
from cli_models import save_model
from tiny import tiny
from typer.testing import CliRunner

import specpass
from specpass import cli, errors
from specpass.vllm import check_vllm, compress
from specpass.vllm.asked import CURRENT, HEADER, XARG, Asked
from specpass.vllm.front import Front
from specpass.vllm.middleware import Middleware

PROMPT = {"type": "token", "prompt_token_ids": [index % 100 + 1 for index in range(80)]}


class Params:
    def __init__(self, **fields: Any) -> None:
        vars(self).update({"extra_args": None, "prompt_logprobs": None, "detokenize": True} | fields)


@pytest.fixture(scope="module")
def front() -> Front:
    method = specpass.SpecPC(budget=32, window=8, kernel=5, neighbours=5)
    return Front(specpass.PromptCompressor(tiny(), method, lowering="eager"), least=50)


def shortened(front: Front, prompt: Any = PROMPT, request_id: str = "cmpl-1", **fields: Any) -> Any:
    return asyncio.run(front.shorten(prompt, Params(**fields), request_id))


def test_a_request_chooses(front: Front) -> None:
    assert len(shortened(front)["prompt_token_ids"]) == 32
    assert len(shortened(front, extra_args={"specpass_budget": 20, "other": 1})["prompt_token_ids"]) == 20
    assert shortened(front, extra_args={"specpass_method": "full"}) is PROMPT
    short = {"type": "token", "prompt_token_ids": [1] * 49}
    assert shortened(front, short) is short


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": "many"}, "budget='many'"),
        ({"budget": "auto"}, "expected a number of tokens"),
        ({"method": "speckv"}, "other methods prune the KV cache"),
        ({"window": "3"}, "a request may choose"),
    ],
)
def test_a_wrong_choice(values: dict[str, str], message: str) -> None:
    for prefix in (HEADER, XARG):
        with pytest.raises(errors.SpecpassError, match=message):
            Asked().but({prefix + name: value for name, value in values.items()}, prefix)


def test_left_whole(front: Front) -> None:
    """With the reason, where every token of the prompt is needed, or it is not of tokens."""
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("log-probabilities", PROMPT, {"prompt_logprobs": 0}),
        ("beam search", PROMPT, {"detokenize": False, "request_id": "cmpl-1-beam-0"}),
        ("a prompt of multimodal", {**PROMPT, "type": "multimodal"}, {}),
    ]
    for reason, prompt, fields in cases:
        asked = Asked()
        CURRENT.set(asked)
        assert shortened(front, prompt, **fields) is prompt
        assert asked.whole.startswith(reason)
    CURRENT.set(None)


def answered(headers: dict[str, str], parts: list[bytes]) -> list[Any]:
    """What a client gets of an application that answers `parts` behind the middleware."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked = CURRENT.get()
        assert asked is not None
        asked.read = 32
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        for index, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": index + 1 < len(parts)})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    asyncio.run(Middleware(app)(scope, None, send))
    return sent


def test_usage_counts_both_lengths() -> None:
    start, body = answered({}, [b'{"choices":[],"usage":{"prompt_tokens":80}}'])
    assert json.loads(body["body"])["usage"] == {"prompt_tokens": 80, "prompt_tokens_read": 32}
    assert (b"content-length", str(len(body["body"])).encode()) in start["headers"]
    stream = answered(
        {}, [b'data: {"choices":[]}\n\n', b'data: {"usage":{"prompt_tokens":80}}\n\n', b"data: [DONE]\n\n"]
    )
    assert b"".join(message["body"] for message in stream[1:]) == (
        b'data: {"choices":[]}\n\ndata: {"usage":{"prompt_tokens":80,"prompt_tokens_read":32}}\n\ndata: [DONE]\n\n'
    )


def test_a_wrong_header_is_an_error_in_vllms_form() -> None:
    start, body = answered({"X-Specpass-Budget": "many"}, [])
    assert start["status"] == 400
    error = json.loads(body["body"])["error"]
    assert error["code"] == 400
    assert error["type"] == "BadRequestError"
    assert "budget='many'" in error["message"]


def test_a_client_that_hangs_up_leaves_the_queue(front: Front) -> None:
    async def run() -> int:
        ahead = asyncio.create_task(front.shorten(PROMPT, Params(), "cmpl-1"))
        waiting = [asyncio.create_task(front.shorten(PROMPT, Params(), f"cmpl-{index}")) for index in range(2, 5)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        done = await asyncio.gather(ahead, *waiting, return_exceptions=True)
        return sum(isinstance(found, dict) for found in done)

    assert asyncio.run(run()) == 3


def test_offline_prompts(front: Front) -> None:
    (one,) = compress([PROMPT["prompt_token_ids"]], front.compressor)  # type: ignore[list-item]
    assert one == {"prompt_token_ids": shortened(front)["prompt_token_ids"]}


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.version", None)
    with pytest.raises(errors.VllmMissingError, match="make vllm"):
        check_vllm()


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.SimpleNamespace(__version__="0.31.2", __version_tuple__=(0, 31, 2))
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.version", fake)
    with pytest.raises(errors.VllmVersionError, match=r"vLLM 0\.31\.2 is installed"):
        check_vllm()


def test_the_command_refuses(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.version", None)
    model = str(save_model(tmp_path / "model"))
    runner, line = CliRunner(), ["serve", "-t", model, "-d", model]
    assert "it prunes the KV cache" in runner.invoke(cli.app, [*line, "-m", "speckv"]).output
    assert "make vllm" in runner.invoke(cli.app, line).output
    assert runner.invoke(cli.app, [*line, "--engine", "other"]).exit_code == 2
