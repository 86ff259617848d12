"""Rewards that are models: a tiny classifier against one-by-one scoring, and a service against a local server."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from rollout.reward_calls import CallFailed, invoke
from rollout.reward_models import ClassifierReward, HttpOptions, HttpReward
from rollout.reward_worker import RewardWorker
from shared.config_reward import Reward, RewardFunction
from shared.errors import InputError, RewardFailed
from tests.fakes import make_completion, make_prompt

TOKEN = "s3cret-token"
CHAT = "{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }}{% endfor %}"


# --- a classifier ---


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """``save(**changes) -> path`` of a random tiny Qwen2 classifier with the addition tokenizer and a chat template."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    from launch.builtin import TASKS, make_tokenizer

    def write(labels: int = 1, pad: bool = True, **options) -> str:
        path = tmp_path_factory.mktemp("judge")
        tokenizer = make_tokenizer(TASKS["addition"])
        tokenizer.chat_template = CHAT
        torch.manual_seed(0)
        shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
        shape |= {
            "num_labels": labels,
            "initializer_range": 0.5,
            "pad_token_id": tokenizer.pad_token_id if pad else None,
        }
        Qwen2ForSequenceClassification(Qwen2Config(**shape)).save_pretrained(path, **options)
        tokenizer.save_pretrained(path)
        return str(path)

    return write


@pytest.fixture(scope="module")
def judge(save) -> str:
    return save()


PROMPTS = ["1+1=", "12+34=", "", "9+9=", "1+2="]
ANSWERS = ["2", "46" * 20, "7", "18+18+18+18=72", ""]


def one_by_one(path: str, texts: list[str]) -> list[float]:
    """Scores with transformers alone: no batch, no padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path)
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
    with torch.inference_mode():
        return [model.eval()(input_ids=one).logits[0, 0].item() for one in ids]


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.25, "cuda")])
def test_a_model_runs_on_a_gpu_only_if_one_was_reserved_for_it(judge, monkeypatch, gpus, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, where: moved.append(where))
    assert ClassifierReward(judge, "key", gpus=gpus)._device == device
    assert moved[-1] == device


@pytest.mark.parametrize("budget", [1, 30, 16384])
def test_batched_scores_equal_those_of_one_text_at_a_time(judge, budget):
    expected = one_by_one(judge, [p + c for p, c in zip(PROMPTS[:4], ANSWERS[:4], strict=True)])
    reward = ClassifierReward(judge, "key", max_tokens_per_batch=budget)
    assert reward(PROMPTS[:4], ANSWERS[:4]) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 4
    assert reward(PROMPTS[:4][::-1], ANSWERS[:4][::-1]) == pytest.approx(expected[::-1], abs=1e-5)


def test_batches_keep_to_the_token_budget_and_hold_every_text_once(judge):
    reward = ClassifierReward(judge, "key", max_tokens_per_batch=12)
    lengths = [5, 1, 30, 2, 2, 6, 0]
    batches = reward._batches([[0] * n for n in lengths])
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 12 for batch in batches)
    assert len(batches) < 7


def test_a_conversation_goes_through_the_rewards_own_template(judge):
    asked, said = [{"role": "user", "content": "1+1="}], [{"role": "assistant", "content": "2"}]
    expected = one_by_one(judge, ["u=1+1=a=2"])
    assert ClassifierReward(judge, "key")([asked], [said]) == pytest.approx(expected, abs=1e-5)


def test_a_begun_answer_and_its_completion_are_one_turn():
    class Tokenizer:
        def apply_chat_template(self, messages, tokenize):
            return " ".join(f"{m['role']}:{m['content']}" for m in messages)

    judge = ClassifierReward.__new__(ClassifierReward)
    judge._tokenizer = Tokenizer()
    asked, begun = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "It is"}
    answer = [{"role": "assistant", "content": " 4"}]
    assert judge._text([asked, begun], answer) == "user:Q assistant:It is 4"
    assert judge._text([asked], answer) == "user:Q assistant: 4"


def test_a_text_beyond_the_models_context_is_refused_and_named(judge):
    with pytest.raises(CallFailed) as excinfo:
        ClassifierReward(judge, "key")(["1", "1"], ["1", "1" * 64])
    assert (excinfo.value.code, excinfo.value.sample, excinfo.value.found) == ("E304", 1, "65 tokens")


@pytest.mark.parametrize(
    ("changes", "found"), [({"labels": 2}, "2 labels"), ({"pad": False}, "no pad token")], ids=["labels", "pad"]
)
def test_an_unusable_model_is_e301(save, changes, found):
    with pytest.raises(InputError) as excinfo:
        ClassifierReward(save(**changes), "key")
    assert (excinfo.value.code, excinfo.value.place, excinfo.value.found) == ("E301", "key", found)


def test_a_missing_model_or_one_without_safetensors_is_e301(save, tmp_path):
    with pytest.raises(InputError, match="E301"):
        ClassifierReward(str(tmp_path / "nothing"), "key")
    path = save()
    model = torch.nn.Linear(1, 1)
    torch.save(model.state_dict(), f"{path}/pytorch_model.bin")
    os.remove(f"{path}/model.safetensors")
    with pytest.raises(InputError, match="E301"):
        ClassifierReward(path, "key")


def test_a_worker_runs_it_as_any_reward(judge):
    worker = RewardWorker(Reward(functions=[RewardFunction(model=judge, name="judge")]))
    group = (0, make_prompt(), (make_completion("1"), make_completion("22")))
    expected = one_by_one(judge, ["prompt 01", "prompt 022"])
    assert worker.score([group], {})[0].parts["judge"].tolist() == pytest.approx(expected, abs=1e-5)
    worker.close()


# --- a service ---


class Handler(BaseHTTPRequestHandler):
    """Answers as ``server.script`` says, else with the lengths; notes every request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((body, dict(self.headers), self.client_address))
        rewards = {"rewards": [len(c) for c in body["completions"]]}
        status, answer, headers = self.server.script.pop(0) if self.server.script else (200, rewards, {})
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_): ...


@pytest.fixture
def serve():
    """``serve(*script)``: a server on loopback; ``(status, answer, headers)`` for each of its first requests."""
    servers = []

    def start(*script) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.script, server.seen = [(*step, {})[:3] for step in script], []
        server.url = f"http://127.0.0.1:{server.server_address[1]}/score"
        threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
        server.handle_error = lambda *_: None  # A client that gave up is no news.
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def payload(*texts: str, **columns) -> dict:
    texts = texts or ("a", "bb")
    n = len(texts)
    ids = [[1]] * n
    return {"prompts": ["q"] * n, "completions": [*texts], "completion_ids": ids, "columns": columns, "state": {}}


async def ask(reward: HttpReward, **columns) -> dict:
    return await invoke(reward, payload(**columns))


services: list[HttpReward] = []


def service(*urls: str, **options) -> HttpReward:
    services.append(HttpReward(list(urls), "key", HttpOptions(**{"retries": 0} | options)))
    return services[-1]


@pytest.fixture(autouse=True)
async def closed_services():
    """No connection outlives its test."""
    yield
    while services:
        await services.pop().aclose()


async def refused(reward: HttpReward) -> str:
    with pytest.raises(CallFailed) as excinfo:
        await ask(reward)
    assert excinfo.value.code == "E304"
    assert TOKEN not in str(excinfo.value)
    return excinfo.value.found


@pytest.fixture
def quick(monkeypatch):
    """Retries without their pauses; the pauses are noted."""
    paused, sleep = [], asyncio.sleep

    async def short(seconds):
        paused.append(seconds)
        await sleep(0)

    monkeypatch.setattr("rollout.reward_models.asyncio.sleep", short)
    return paused


async def test_a_request_holds_the_call_and_the_answer_its_rewards_metrics_and_extra(serve):
    server = serve((200, {"rewards": [0.5, None], "metrics": {"seen": 0.1}, "extra": {"why": ["x", "y"]}}))
    answer = await ask(service(server.url), answer=["2", "3"])
    assert answer == {"values": [0.5, None], "metrics": {"seen": 0.1}, "extra": {"why": ["x", "y"]}}
    (body, headers, _), *_ = server.seen
    assert len(body.pop("request_id")) >= 32
    assert body == {"version": 1, "prompts": ["q", "q"], "completions": ["a", "bb"], "columns": {"answer": ["2", "3"]}}
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


async def test_completion_ids_are_sent_on_request_alone(serve):
    server = serve()
    await ask(service(server.url, send_ids=True))
    assert server.seen[0][0]["completion_ids"] == [[1], [1]]


async def test_replicas_take_turns(serve):
    first, second = serve(), serve()
    reward = service(first.url, second.url)
    for _ in range(6):
        await ask(reward)
    assert (len(first.seen), len(second.seen)) == (3, 3)


async def test_a_replica_that_failed_rests(serve, quick):
    good, bad = serve(), serve(*[(503, b"")] * 9)
    reward = service(good.url, bad.url, retries=2)
    for _ in range(6):
        assert (await ask(reward))["values"] == [1, 2]
    assert (len(good.seen), len(bad.seen)) == (6, 1)


async def test_after_its_rest_a_replica_is_asked_again(serve, quick):
    good, bad = serve(), serve((503, b""))
    reward = service(good.url, bad.url, retries=2, rest_s=0.0)
    for _ in range(4):
        await ask(reward)
    assert len(bad.seen) >= 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_passing_fault_is_tried_again_under_the_same_id(serve, quick, status):
    server = serve((status, b"busy"), (status, b"busy"))
    assert (await ask(service(server.url, retries=2)))["values"] == [1, 2]
    assert len({body["request_id"] for body, *_ in server.seen}) == 1
    assert len(server.seen) == 3
    assert 0 < quick[0] < 1
    await ask(service(server.url))
    assert len({body["request_id"] for body, *_ in server.seen}) == 2


async def test_retries_end(serve, quick):
    server = serve(*[(503, b"")] * 9)
    assert await refused(service(server.url, retries=2)) == f"status 503 from {server.url} (3 tries)"
    assert len(server.seen) == 3


async def test_nobody_listening_is_tried_again_and_then_e304(serve, quick):
    server = serve()
    server.shutdown()
    server.server_close()
    assert await refused(service(server.url, retries=1)) == f"ConnectError from {server.url} (2 tries)"
    assert len(quick) == 1


async def test_any_other_status_fails_at_once_with_its_first_200_characters(serve):
    server = serve((422, b"bad   field\n" + b"x" * 999))
    found = await refused(service(server.url, retries=3))
    assert found.startswith(f"status 422 from {server.url}: bad field xxx")
    assert len(found.partition(": ")[2]) == 200
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(serve, status):
    target = serve()
    server = serve((status, b"", {"Location": target.url}))
    assert (await refused(service(server.url))).startswith(f"status {status} from {server.url}")
    assert target.seen == []


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"<html>", "invalid JSON"),
        (b"", "invalid JSON"),
        (b"\xff\xfe\x00", "invalid JSON"),
        ([1, 2], 'no "rewards" list'),
        ({"scores": [1, 2]}, 'no "rewards" list'),
        ({"rewards": {"a": 1}}, 'no "rewards" list'),
        ({"rewards": "12"}, 'no "rewards" list'),
        ({"rewards": [1, 2], "metrics": [0.1]}, '"metrics" that are no table of numbers'),
        ({"rewards": [1, 2], "metrics": {"seen": "much"}}, '"metrics" that are no table of numbers'),
        ({"rewards": [1, 2], "metrics": {"seen": True}}, '"metrics" that are no table of numbers'),
        ({"rewards": [1, 2], "metrics": {"seen": 10**400}}, '"metrics" that are no table of numbers'),
        ({"rewards": [1, 2], "extra": ["x", "y"]}, '"extra" that is no table of lists'),
        ({"rewards": [1, 2], "extra": {"why": "xy"}}, '"extra" that is no table of lists'),
        (b"[" * 100_000, "invalid JSON"),
    ],
)
async def test_what_is_no_answer_is_e304(serve, answer, found):
    server = serve((200, answer))
    assert await refused(service(server.url)) == f"{found} from {server.url}"


@pytest.mark.parametrize(
    ("rewards", "code"),
    [([1.0], "E302"), ([1, "2"], "E303"), ([1e40, 1], "E303"), ([float("nan"), 1], "E303"), ([True, 1], "E303")],
)
async def test_a_services_values_are_checked_as_any_others(serve, rewards, code):
    server = serve((200, {"rewards": rewards}))
    with pytest.raises(CallFailed, match=code):
        await ask(service(server.url))


async def test_an_answer_beyond_the_size_limit_is_not_read_on(serve):
    server = serve((200, {"rewards": [1, 2], "extra": {"pad": ["x" * (1 << 20)] * 2}}))
    assert await refused(service(server.url, max_mb=1.0)) == f"more than 1 MB from {server.url}"


async def test_a_compressed_answer_is_not_asked_for_and_not_unpacked(serve):
    packed = gzip.compress(json.dumps({"rewards": [1, 2], "extra": {"pad": ["x" * (1 << 20)] * 2}}).encode())
    server = serve(
        (200, packed, {"Content-Encoding": "gzip"}), (200, {"rewards": [1, 2]}, {"Content-Encoding": "Identity"})
    )
    assert await refused(service(server.url)) == f"status 200 and Content-Encoding gzip from {server.url}"
    assert server.seen[0][1]["Accept-Encoding"] == "identity"
    assert (await ask(service(server.url)))["values"] == [1, 2]


async def test_a_service_that_does_not_answer_in_time_is_given_up(serve, quick):
    server = serve()
    server.RequestHandlerClass = type("Slow", (Handler,), {"do_POST": lambda self: threading.Event().wait(1.0)})
    assert await refused(service(server.url, read_s=0.1)) == f"ReadTimeout from {server.url} (1 tries)"


async def test_the_token_is_sent_and_is_in_no_message(serve, monkeypatch, quick):
    monkeypatch.setenv("SCORES_TOKEN", TOKEN)
    server = serve((200, {"rewards": [1, 2]}), (401, b"who are you"), (503, b""))
    reward = service(server.url, token_env="SCORES_TOKEN")
    await ask(reward)
    assert server.seen[0][1]["Authorization"] == f"Bearer {TOKEN}"
    assert "401" in await refused(reward)
    assert "503" in await refused(reward)


async def test_a_token_that_comes_back_or_stands_in_the_address_is_in_no_message(serve, monkeypatch):
    monkeypatch.setenv("SCORES_TOKEN", TOKEN)
    server = serve((401, f"bad token {TOKEN}".encode()))
    await refused(service(server.url, token_env="SCORES_TOKEN"))
    server = serve((401, b"no"))
    await refused(service(server.url.replace("http://", f"http://user:{TOKEN}@") + f"?key={TOKEN}"))


def test_a_missing_token_is_e301(monkeypatch):
    monkeypatch.delenv("SCORES_TOKEN", raising=False)
    with pytest.raises(InputError, match=r"E301.*no environment variable SCORES_TOKEN"):
        service("https://host/score", token_env="SCORES_TOKEN")


@pytest.mark.parametrize(
    ("url", "accepted"),
    [
        ("https://host/score", True),
        ("http://127.0.0.1:1/", True),
        ("http://localhost/", True),
        ("http://[::1]:8/", True),
        ("http://host/score", False),
        ("http://10.0.0.1/", False),
        ("http://127.0.0.1.evil.example/", False),
        ("http://localhost@evil.example/", False),
        ("http://0.0.0.0/", False),
        ("ftp://127.0.0.1/", False),
        ("file:///etc/passwd", False),
        ("host/score", False),
        ("", False),
    ],
)
def test_only_https_or_this_machine(url, accepted):
    if accepted:
        service(url)
        return
    with pytest.raises(InputError, match=r"E301.*https, or http to this machine"):
        service("https://good.example/", url)


def test_connections_are_kept_from_call_to_call(serve):
    server = serve()
    worker = RewardWorker(Reward(functions=[RewardFunction(url=server.url, args={"retries": 0})]))
    for i in range(4):
        scores = worker.score([(i, make_prompt(answer="x"), (make_completion("abc"),))], {})[0]
        assert scores.parts["127.0.0.1"].tolist() == [3]
    worker.close()
    assert len({address for *_, address in server.seen}) == 1
    assert server.seen[0][0]["columns"] == {"answer": ["x"]}


def test_a_call_to_a_slow_service_ends_at_the_rewards_deadline(serve):
    server = serve()
    server.RequestHandlerClass = type("Slow", (Handler,), {"do_POST": lambda self: threading.Event().wait(1.0)})
    worker = RewardWorker(Reward(functions=[RewardFunction(url=server.url, name="far")], timeout_s=0.2))
    with pytest.raises(RewardFailed) as excinfo:
        worker.score([(3, make_prompt(), (make_completion("a"),))], {})
    assert (excinfo.value.code, excinfo.value.place) == ("E305", "far, group 3")
    worker.close()
