"""Models and datasets of the hub: why one cannot be fetched is told, each reason with what mends it."""

from __future__ import annotations

import errno
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from launch import plan
from launch.preflight import prepare
from rollout import hub
from rollout.datasets import find_files
from rollout.reward_models import ClassifierReward
from shared.config_data import Source
from shared.errors import InputError
from tests.fakes import make_config

COMMIT = "a" * 40
REASONS = {
    "typo": ((404, "RepoNotFound"), "the hub knows no such model", "check the name on {hub}/org/name; if it is private, hf"),
    "gated": ((401, "GatedRepo"), "only to those who accepted its terms", "accept them on {hub}/org/name, then hf auth"),
    "not let in": ((403, "GatedRepo"), "only to those who accepted its terms", "accept them on {hub}/org/name, then hf auth"),
    "bad token": ((401, ""), "the hub refuses this login (HTTP 401)", "hf auth login, or HF_TOKEN=..., with access"),
    "no rights": ((403, ""), "the hub refuses this login (HTTP 403)", "hf auth login, or HF_TOKEN=..., with access"),
    "revision": ((404, "RevisionNotFound"), "the hub has no commit aaaaaaaaaaaa of it", "from {hub}/org/name/commits/main"),
    "hub is down": ((503, ""), "and the hub answers HTTP 503", "try again later, or give a folder on this machine"),
}  # fmt: skip


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """A hub on loopback; ``answers(status, code)`` says what it answers to everything."""
    said = [404, ""]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(said[0])
            self.send_header("X-Error-Code", said[1])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield lambda *answer: said.__setitem__(slice(None), answer)
    server.shutdown()
    server.server_close()


def refused(kind: str = "model", path: str = "org/name") -> InputError:
    with pytest.raises(InputError) as caught:
        hub.fetched(path, kind, "E401", "run.toml:model.path", ["*.json"])
    return caught.value


@pytest.mark.parametrize("case", REASONS)
def test_why_a_model_cannot_be_fetched_is_told_with_what_mends_it(endpoint, capfd, case):
    answer, found, fix = REASONS[case]
    endpoint(*answer)
    error = refused(path=f"org/name@{COMMIT}" if case == "revision" else "org/name")
    assert found in error.found
    assert fix.format(hub=constants.ENDPOINT) in error.fix
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [f"downloading the model {error.found.split(chr(34))[1]} from {constants.ENDPOINT}"]


def test_a_dataset_has_a_page_of_its_own(endpoint):
    error = refused("dataset")
    assert "knows no such dataset" in error.found
    assert f"{constants.ENDPOINT}/datasets/org/name" in error.fix


def test_a_network_that_is_down_is_told_apart_from_a_hub_that_is_switched_off(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = refused()
    assert error.found == '"org/name" (no copy on this machine, and http://127.0.0.1:9 cannot be reached)'
    assert error.fix.startswith("check the network, the proxy and HF_ENDPOINT")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused()
    assert error.found == '"org/name" (no copy on this machine, and HF_HUB_OFFLINE is set)'
    assert error.fix == "unset HF_HUB_OFFLINE, or give a folder on this machine"


@pytest.mark.parametrize(
    ("number", "found", "fix"),
    [
        (errno.ENOSPC, "no space left in", "free some, or HF_HOME=/a/larger/disk"),
        (errno.EROFS, "cannot be written", "HF_HOME=/a/writable/folder"),
    ],
)
def test_a_disk_that_takes_no_more_is_told(monkeypatch, number, found, fix):
    def full(*_, **__):
        raise OSError(number, "as the kernel says it")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    error = refused()
    assert found in error.found
    assert error.fix == fix


def test_a_path_in_a_folder_that_is_there_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_named("models/qwen")
    (tmp_path / "models").mkdir()
    assert not hub.is_named("models/qwen")


def test_model_tokenizer_rows_reward_model_and_plan_tell_the_same_reason(endpoint, tmp_path, capsys):
    endpoint(401, "GatedRepo")
    changes = {"model.path": "org/model", "model.tokenizer": "org/tokenizer", "data.train": "org/rows"}
    with pytest.raises(Exception, match="accepted its terms") as caught:
        prepare(make_config(**changes), "run.toml", tmp_path)
    told = {(p.code, p.place): p.found for p in caught.value.problems}
    for place, name in (("E401", "path"), ("E401", "tokenizer")):
        assert "accepted its terms" in told[place, f"run.toml:model.{name}"]
    assert "accepted its terms" in told["E201", "run.toml:data.train"]
    with pytest.raises(InputError, match=r"E301.*accepted its terms"):
        ClassifierReward("org/judge", "run.toml:reward.functions[0]")
    with pytest.raises(InputError, match=r"E201.*accepted its terms"):
        find_files(Source(path="org/rows"), "train", "data.train")
    assert plan.main(["gsm8k", "--devices", "8", "--device", "h200"]) == 2
    assert "accepted its terms" in capsys.readouterr().err


def test_a_plan_without_a_network_is_one_line(monkeypatch, endpoint, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert plan.main(["gsm8k", "--devices", "8", "--device", "h200", "--mean-tokens", "300"]) == 2
    asked, error, code = capfd.readouterr().err.splitlines()
    assert asked.startswith("downloading the model Qwen/")
    assert error.startswith('error[E401] model not found — model.path. Found "Qwen/Qwen2.5-0.5B-Instruct" (no copy')
    assert code == "exit code 2"
