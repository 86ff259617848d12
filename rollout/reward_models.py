"""Rewards that are models: a Hugging Face classifier in the pool's actor, or a service behind HTTP.

Both are callables of the common form, made from ``reward.functions`` entries with ``model`` or ``url``.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import random
import time
import uuid
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rollout import hub
from rollout.reward_calls import CallFailed, Payload
from shared.errors import InputError, one_line

RETRIED = {429, 500, 502, 503, 504}


class ClassifierReward:
    """``logits[:, 0]`` in float32 of a sequence-classification model with one label, on CPUs or one GPU."""

    def __init__(
        self, path: str, key: str, *, max_tokens_per_batch: int = 16384, dtype: str = "float32", gpus: float = 0.0
    ) -> None:
        """Load model and tokenizer (safetensors, no remote code), on a GPU only if ``gpus`` were reserved for it.

        Raises ``InputError`` E301.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if hub.is_named(path):
            path = str(hub.fetched(path, "model", "E301", key, hub.MODEL_FILES))
        try:
            # Said in so many words: left out, transformers would ask on the terminal.
            self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:  # Whatever a damaged or missing model raises.
            found, expected = one_line(error), "a sequence-classification model with safetensors"
            raise InputError("E301", "reward model not loaded", key, found, expected, "check the path") from None
        if model.config.num_labels != 1:
            found = f"{model.config.num_labels} labels"
            raise InputError("E301", "reward model not usable", key, found, "one label", "use a reward model")
        if self._tokenizer.pad_token_id is None or model.config.pad_token_id is None:
            found, fix = "no pad token", "set pad_token_id in its config"
            raise InputError("E301", "reward model not usable", key, found, "a pad token", fix)
        self._tokenizer.padding_side = "right"
        self._device = "cuda" if gpus and torch.cuda.is_available() else "cpu"
        self._model = model.eval().to(self._device)
        self._budget = max_tokens_per_batch
        self._longest = int(getattr(model.config, "max_position_embeddings", 1 << 30))

    def __call__(self, prompts: list[Any], completions: list[Any]) -> list[float]:
        """One score per completion, in order."""
        import torch

        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        for i, tokens in enumerate(ids):
            if len(tokens) > self._longest:
                found, expected = f"{len(tokens)} tokens", f"<= {self._longest} (the reward model's context)"
                raise CallFailed("E304", "reward raised", found, expected, "shorten the completions", i)
        scores = [0.0] * len(ids)
        for batch in self._batches(ids):
            width = max([1, *(len(ids[i]) for i in batch)])
            tokens = torch.full((len(batch), width), self._tokenizer.pad_token_id)
            mask = torch.zeros_like(tokens)
            for line, i in enumerate(batch):
                tokens[line, : len(ids[i])] = torch.tensor(ids[i])
                mask[line, : len(ids[i])] = 1
            with torch.inference_mode():
                logits = self._model(input_ids=tokens.to(self._device), attention_mask=mask.to(self._device)).logits
            for i, score in zip(batch, logits[:, 0].float().tolist(), strict=True):
                scores[i] = score
        return scores

    def _batches(self, ids: list[list[int]]) -> list[list[int]]:
        """Numbers of texts, sorted by length, in batches of at most the token budget."""
        batches: list[list[int]] = []
        for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
            if batches and (len(batches[-1]) + 1) * max(len(ids[i]), 1) <= self._budget:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        messages = list(prompt) + list(completion)
        if (
            len(prompt) and prompt[-1]["role"] == "assistant" and len(completion) == 1
        ):  # The completion continues a begun turn.
            begun = {"content": str(prompt[-1]["content"]) + str(completion[0]["content"])}
            messages = [*prompt[:-1], completion[0] | begun]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False))


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """``args`` of a reward with ``url``."""

    token_env: str | None = None
    """Environment variable with the bearer token."""
    concurrency: int = 8
    connect_s: float = 5.0
    read_s: float = 30.0
    retries: int = 3
    max_mb: float = 16.0
    """Largest answer."""
    send_ids: bool = False
    """Also send ``completion_ids``."""
    rest_s: float = 30.0
    """How long a replica rests after a failure."""


class HttpReward:
    """A reward service: JSON in, JSON out, over https or to this machine alone.

    Several URLs are replicas of one function: they take turns, and one that failed rests for ``rest_s``.
    """

    def __init__(self, urls: list[str], key: str, options: HttpOptions) -> None:
        """Check addresses and find the token. Raises ``InputError`` E301."""
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
                found, expected = f"{parts.scheme}://{parts.hostname}", "https, or http to this machine"
                raise InputError("E301", "reward address refused", key, found, expected, "use https")
        name = options.token_env
        if name is not None and not os.environ.get(name):
            found, expected = f"no environment variable {name}", "the service's token"
            raise InputError("E301", "reward token missing", key, found, expected, f"export {name}=...")
        self._urls, self._options = urls, options
        self._turn, self._resting = 0, dict.fromkeys(urls, 0.0)
        self._clients: dict[asyncio.AbstractEventLoop, tuple[Any, asyncio.Semaphore]] = {}

    async def __call__(self, **keywords: Any) -> list[Any]:
        """The service's ``rewards``; its ``metrics`` and ``extra`` are logged. Raises ``CallFailed`` E303 or E304."""
        supplied = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
        request: Payload = {
            "version": 1,
            "request_id": uuid.uuid4().hex,
            "prompts": keywords["prompts"],
            "completions": keywords["completions"],
            "columns": {name: values for name, values in keywords.items() if name not in supplied},
        }
        if self._options.send_ids:
            request["completion_ids"] = keywords["completion_ids"]
        answer = await self._ask(request)
        for name, value in answer["metrics"].items():
            keywords["log_metric"](name, value)
        for column, values in answer["extra"].items():
            keywords["log_extra"](column, values)
        rewards: list[Any] = answer["rewards"]
        for i, value in enumerate(rewards):
            if isinstance(value, bool):  # To Python it is the number 1 or 0.
                found, fix = json.dumps(value), "let the service answer 1.0 or 0.0"
                raise CallFailed("E303", "bad reward value", found, "a number or null", fix, i)
        return rewards

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        client, _ = self._clients.pop(asyncio.get_running_loop(), (None, None))
        if client is not None:
            await client.aclose()

    async def _ask(self, request: Payload) -> dict[str, Any]:
        """One request, tried again under the same id with growing, jittered pauses."""
        import httpx

        client, limit = self._client()
        found = ""
        for attempt in range(self._options.retries + 1):
            if attempt:
                await asyncio.sleep(min(0.1 * 2**attempt, 5.0) * (0.5 + random.random()))
            url = self._next_url()
            try:
                async with limit:
                    return await self._once(client, url, request)
            except httpx.HTTPStatusError as error:
                found = f"status {error.response.status_code} from {_shown(url)}"
            except httpx.TransportError as error:
                found = f"{type(error).__name__} from {_shown(url)}"
            self._resting[url] = time.monotonic() + self._options.rest_s
        raise _refused(f"{found} ({self._options.retries + 1} tries)")

    async def _once(self, client: Any, url: str, request: Payload) -> dict[str, Any]:
        token = self._options.token_env
        # A small compressed answer may unpack to any size, before its size can be looked at.
        headers = {"Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {os.environ[token]}"} if token else {}
        async with client.stream("POST", url, json=request, headers=headers) as response:
            if response.status_code in RETRIED:
                response.raise_for_status()
            if (coding := response.headers.get("Content-Encoding", "identity").strip().lower()) != "identity":
                found = f"status {response.status_code} and Content-Encoding {one_line(coding, 40)} from {_shown(url)}"
                raise _refused(found, "an answer that is not compressed")
            body = bytearray()
            async for part in response.aiter_raw():
                body += part
                if len(body) > self._options.max_mb * 2**20:
                    raise _refused(f"more than {self._options.max_mb:g} MB from {_shown(url)}")
            if response.status_code != 200:
                text = body.decode(errors="replace")
                said = one_line(text.replace(os.environ[token], "***") if token else text, 200)
                raise _refused(f"status {response.status_code} from {_shown(url)}: {said}")
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):  # The second: nested too deeply.
            raise _refused(f"invalid JSON from {_shown(url)}") from None
        if problem := _misshapen(answer):
            raise _refused(f"{problem} from {_shown(url)}")
        return {"metrics": {}, "extra": {}} | answer

    def _next_url(self) -> str:
        """Round-robin over the replicas that do not rest; over all, if all rest."""
        now = time.monotonic()
        ready = [url for url in self._urls if self._resting[url] <= now] or self._urls
        self._turn += 1
        return ready[self._turn % len(ready)]

    def _client(self) -> tuple[Any, asyncio.Semaphore]:
        """Connections belong to an event loop; they are kept open between calls on the same one."""
        import httpx

        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            timeout = httpx.Timeout(self._options.read_s, connect=self._options.connect_s)
            client = httpx.AsyncClient(timeout=timeout, follow_redirects=False, trust_env=False)
            self._clients = {loop: (client, asyncio.Semaphore(self._options.concurrency))}
        return self._clients[loop]


def _misshapen(answer: Any) -> str:
    """What is wrong with the form of a service's answer; empty if nothing is."""
    if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
        return 'no "rewards" list'
    metrics, extra = answer.get("metrics", {}), answer.get("extra", {})
    if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
        return '"metrics" that are no table of numbers'
    if not isinstance(extra, dict) or any(not isinstance(values, list) for values in extra.values()):
        return '"extra" that is no table of lists'
    return ""


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a number that a float can hold; a truth value is none."""
    try:
        return type(value) in (int, float) and bool(float(value) or True)
    except OverflowError:
        return False


def _refused(found: str, expected: str = "a list of rewards as JSON") -> CallFailed:
    return CallFailed("E304", "reward raised", found, expected, "see the service's log")


def _shown(url: str) -> str:
    """The address without what may be secret in it: user, password, query."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or a number, is this machine and nothing else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
