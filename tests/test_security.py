"""The security defaults, one section for each: safe as they are, and a canary that appears once a default is off.

What other files already prove is listed in ``PROVED_ELSEWHERE``; what needs a real Ray is in ``test_security_stack.py``.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch import cluster, doctor, evaluate, private_ray, run
from launch.config_secrets import check_secrets
from launch.environment import (
    OVERRIDE,
    SAFE,
    check_environment,
    open_token_file,
    refuse_open_dashboard,
    refuse_open_gcs,
)
from launch.model_files import check_code
from launch.preflight import local_model
from rollout.reward_calls import CallFailed, invoke
from rollout.reward_models import ClassifierReward, HttpOptions, HttpReward
from shared.errors import InputError, InputErrors
from tests.fakes import fake_ray, make_config, write_config, write_model, write_rows
from tests.pace import scaled

ROOT = Path(__file__).resolve().parent.parent
PROVED_ELSEWHERE = {
    "rewards that run code are behind bubblewrap; each attack works without it": (
        "test_sandbox.py",
        "test_an_attack_that_works_in_a_subprocess_fails_in_the_sandbox",
    ),
    "the sandbox's limits of time, memory, output": ("test_sandbox.py", "test_a_memory_bomb_is_e306"),
    "no bubblewrap: code rewards are refused": (
        "test_reward_worker.py",
        "test_without_bubblewrap_a_sandboxed_function_is_refused_and_never_run_weaker",
    ),
    "no bubblewrap: E308": ("test_sandbox.py", "test_without_bubblewrap_a_sandbox_is_e308"),
    "generated tasks: no scorer evaluates an answer, but those that are refused": (
        "test_generated_security.py",
        "test_the_denied_tasks_evaluate_answers_and_no_other_does",
    ),
    "a reward that executes the text of completions is found before the run": (
        "test_doctor.py",
        "test_a_finding_is_made_and_shown",
    ),
    "remote rewards: https or loopback": ("test_reward_models.py", "test_only_https_or_this_machine"),
    "remote rewards: JSON alone": ("test_reward_models.py", "test_what_is_no_answer_is_e304"),
    "remote rewards: time": ("test_reward_models.py", "test_a_call_to_a_slow_service_ends_at_the_rewards_deadline"),
    "remote rewards: the token is in no message": (
        "test_reward_models.py",
        "test_the_token_is_sent_and_is_in_no_message",
    ),
    "our own code": ("test_architecture.py", "test_nothing_dangerous_is_written"),
    "our own code: each rule can fail": ("test_architecture.py", "test_each_danger_is_seen"),
}


@pytest.mark.parametrize(("file", "test"), PROVED_ELSEWHERE.values(), ids=PROVED_ELSEWHERE)
def test_what_is_proved_elsewhere_is_there(file, test):
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert test in [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with a model and rows; nobody may start Ray or vLLM from it."""

    def refuse(*_, **__):
        pytest.fail("something was started before the input was checked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("launch.cluster.connect", refuse)
    monkeypatch.setattr("rollout.engine.Engine.__init__", refuse)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)])
    return tmp_path


def errors(call, *arguments) -> list[str]:
    """The codes of what ``call`` refuses; nothing if it returns."""
    try:
        call(*arguments)
    except InputErrors as found:
        return [problem.code for problem in found.problems]
    except InputError as found:
        return [found.code]
    return []


VERBS = {"train": run.main, "dry-run": lambda a: run.main([*a, "--dry-run"]), "evaluate": evaluate.main}
VERBS |= {"doctor": doctor.main, "doctor --sample": lambda a: doctor.main([*a, "--sample", "2"])}
each_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


# --- code that ships with a model ---


def plant_code(model: Path, canary: Path, name: str, classes: dict) -> None:
    """Code in ``model`` that makes a file when it is imported, named by its file ``name``."""
    table = json.loads((model / name).read_text(encoding="utf-8"))
    (model / name).write_text(json.dumps(table | {"auto_map": classes}), encoding="utf-8")
    lines = ["from transformers import PreTrainedTokenizerFast", f"open({str(canary)!r}, 'w').close()"]
    (model / "planted.py").write_text("\n".join([*lines, "class Planted(PreTrainedTokenizerFast): ...", ""]))


PLACES = {
    "config.json": {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.Planted"},
    "tokenizer_config.json": {"AutoTokenizer": [None, "planted.Planted"]},
}


@each_verb
@pytest.mark.parametrize(("name", "classes"), PLACES.items(), ids=PLACES)
def test_a_model_with_code_is_refused_and_its_code_not_run(place, capsys, verb, name, classes):
    plant_code(place / "model", place / "canary", name, classes)
    assert verb([str(write_config(place / "run.toml"))]) == 2
    assert (
        f"error[E408] custom code refused — run.toml:model.path. Found auto_map in its {name}"
        in capsys.readouterr().err
    )
    assert not (place / "canary").exists()


def test_the_code_of_a_tokenizer_elsewhere_is_refused_too(place, capsys):
    plant_code(write_model(place / "words"), place / "canary", "tokenizer_config.json", PLACES["tokenizer_config.json"])
    assert run.main([str(write_config(place / "run.toml", **{"model.tokenizer": "words"}))]) == 2
    assert "error[E408] custom code refused — run.toml:model.tokenizer" in capsys.readouterr().err
    assert not (place / "canary").exists()


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """transformers copies a model's code into a cache and imports it: here, and forgotten with the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def test_with_trust_the_same_code_does_run(place, capsys, modules):
    plant_code(place / "model", place / "canary", "tokenizer_config.json", PLACES["tokenizer_config.json"])
    config = write_config(place / "run.toml", **{"model.trust_remote_code": True})
    doctor.main([str(config)])
    assert "E408" not in capsys.readouterr().err
    assert (place / "canary").exists()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("key", ["model.path", "model.tokenizer"])
@pytest.mark.parametrize("source", ["org/name", "org/name@main", f"org/name@{COMMIT[:7]}"])
def test_trusted_code_from_the_hub_needs_a_commit(place, key, source):
    changes = {key: source, "model.trust_remote_code": True}
    with pytest.raises(
        InputErrors, match=rf"E408\] custom code not pinned — run.toml:{key}.*org/name@COMMIT"
    ) as excinfo:
        check_code(make_config(**{"model.path": "model"} | changes), "run.toml")
    assert len(excinfo.value.problems) == 1


def test_trusted_code_of_another_repository_is_refused(place):
    plant_code(place / "model", place / "canary", "config.json", {"AutoConfig": "other/repo--planted.Planted"})
    trusting = make_config(**{"model.path": "model", "model.trust_remote_code": True})
    assert errors(check_code, trusting, "run.toml") == ["E408"]


@pytest.mark.parametrize(
    ("path", "trusted", "asked"),
    [
        ("org/name", False, [("org/name", None, False, True), ("org/name", None, False, False)]),
        (f"org/name@{COMMIT}", False, [("org/name", COMMIT, False, True), ("org/name", COMMIT, False, False)]),
        (f"org/name@{COMMIT}", True, [("org/name", COMMIT, True, False), ("org/name", COMMIT, True, True)]),
        ("org/name", True, []),
    ],
)
def test_code_is_downloaded_only_if_trusted_and_then_at_its_commit(monkeypatch, path, trusted, asked):
    seen = []

    def download(name, repo_type, revision, allow_patterns, local_files_only):
        seen.append((name, revision, "*.py" in allow_patterns, local_files_only))
        raise OSError("no such model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    if asked:
        with pytest.raises(InputError, match="E401"):
            local_model(path, trusted, "model.path")
    else:
        assert local_model(path, trusted, "model.path") == path
    assert seen == asked


@pytest.mark.parametrize("key", ["trust_remote_code", "load_format", "model", "tokenizer"])
def test_vllms_own_arguments_do_not_go_around_the_checks(place, capsys, key):
    config = write_config(place / "run.toml", **{"rollout.vllm": {key: "pt"}})
    assert run.main([str(config), "--dry-run"]) == 2
    assert f"error[E704] unsafe setting — run.toml:rollout.vllm.{key}" in capsys.readouterr().err


# --- pickled weights ---


class Poison:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def poison(model: Path, canary: Path) -> Path:
    """Only pickled weights in ``model``, poisoned."""
    (model / "model.safetensors").unlink()
    torch.save({"w": Poison(canary)}, model / "pytorch_model.bin")
    return model / "pytorch_model.bin"


@each_verb
def test_pickled_weights_are_refused_and_not_opened(place, capsys, verb):
    poison(place / "model", place / "canary")
    assert verb([str(write_config(place / "run.toml"))]) == 2
    assert "error[E409] no safetensors — " in capsys.readouterr().err
    assert not (place / "canary").exists()


def test_nor_are_those_of_a_reward_model(place):
    poison(place / "model", place / "canary")
    assert errors(ClassifierReward, str(place / "model"), "key") == ["E301"]
    assert not (place / "canary").exists()


def test_nor_is_the_code_of_a_reward_model_run_or_asked_about(place, monkeypatch):
    plant_code(
        place / "model",
        place / "canary",
        "config.json",
        {"AutoConfig": "planted.Planted"} | {"AutoModelForSequenceClassification": "planted.Planted"},
    )
    table = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps(table | {"model_type": "planted"}))
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked on the terminal"))
    assert errors(ClassifierReward, str(place / "model"), "key") == ["E301"]
    assert not (place / "canary").exists()


@pytest.mark.parametrize("safe", [True, False])
def test_the_poison_works_where_weights_only_is_off(place, safe):
    file = poison(place / "model", place / "canary")
    if safe:
        with pytest.raises(pickle.UnpicklingError):
            torch.load(file)
    else:
        torch.load(file, weights_only=False)
    assert (place / "canary").exists() is not safe


@pytest.mark.parametrize("name", SAFE)
def test_a_switch_that_lets_libraries_unpickle_is_e704_at_every_start(place, capsys, monkeypatch, name):
    check_environment()
    monkeypatch.setenv(name, "0")
    check_environment()
    monkeypatch.setenv(name, "1")
    for verb in VERBS.values():
        assert verb([str(write_config(place / "run.toml"))]) == 2
        assert (
            f"error[E704] unsafe setting — environment:{name}. Found 1, expected unset. Fix: unset it"
            in capsys.readouterr().err
        )


def test_actors_get_those_switches_off_whatever_their_node_says(monkeypatch):
    from rollout.vllm_setup import engine_environment

    for name in SAFE:
        monkeypatch.setenv(name, "1")
    engine = cluster.worker_environment() | engine_environment(make_config())
    assert {name: engine[name] for name in SAFE} == dict.fromkeys(SAFE, "0")


@pytest.mark.process
@pytest.mark.parametrize("off", [False, True])
def test_what_torchs_switch_would_do(place, off):
    file, name = poison(place / "model", place / "canary"), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    environment = os.environ | ({name: "1"} if off else cluster.worker_environment())
    code = f"import torch; torch.load({str(file)!r})"
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=scaled(60), check=False)
    assert (place / "canary").exists() is off


# --- Ray ---


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not seen Ray: its variables are unset, and put back after the test."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # So that what the test sets is taken away.
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")


def test_a_private_ray_gets_loopback_and_a_token_of_its_own(fresh):
    private_ray.keep_private()
    assert (os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"], os.environ["RAY_AUTH_MODE"]) == ("0", "token")
    first = os.environ.pop("RAY_AUTH_TOKEN")
    assert len(first) == 64
    private_ray.keep_private()
    assert os.environ["RAY_AUTH_TOKEN"] != first


@pytest.mark.parametrize(
    "given", [{"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_TOKEN_PATH": "/t"}, {"RAY_AUTH_MODE": "disabled"}]
)
def test_what_the_user_set_for_authentication_is_kept(fresh, monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    private_ray.keep_private()
    assert {name: os.environ[name] for name in given} == given


def test_process_groups_listen_on_loopback_unless_there_is_a_cluster(fresh, monkeypatch):
    assert cluster.worker_environment().items() >= cluster.LOOPBACK.items()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not cluster.worker_environment().keys() & cluster.LOOPBACK.keys()


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o644, True), (0o640, True)])
def test_a_token_file_that_others_may_read_is_warned_of(fresh, monkeypatch, tmp_path, mode, warned):
    path = tmp_path / "token"
    path.touch(mode=mode)
    path.chmod(mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert open_token_file() is None  # A private Ray has no use for it.
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert (open_token_file() or "").startswith("warning[W704] token readable by others") is warned
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert open_token_file() is None


class Dashboard(BaseHTTPRequestHandler):
    """Ray's job server as far as the check looks: ``server.status`` for the list of jobs."""

    def do_GET(self):
        self.send_response(self.server.status if self.path == "/api/jobs/" else 404)
        self.end_headers()

    def log_message(self, *_): ...


@pytest.fixture
def dashboard():
    """``dashboard(status) -> address`` of a server on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()

        def start(status: int) -> str:
            server.status = status
            return f"127.0.0.1:{server.server_address[1]}"

        yield start
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "off_machine", "override", "refused"),
    [
        (200, True, "", ["E704"]),
        (200, True, "1", []),
        (200, False, "", []),
        (401, True, "", []),
        (403, True, "", []),
    ],
)
def test_a_public_dashboard_without_a_token_is_e704(dashboard, monkeypatch, status, off_machine, override, refused):
    monkeypatch.setattr("launch.environment.is_loopback", lambda _: not off_machine)
    monkeypatch.setenv(OVERRIDE, override)
    assert errors(refuse_open_dashboard, dashboard(status)) == refused


@pytest.mark.parametrize("address", ["", "127.0.0.1:1", "localhost", "[::1]:8265"])
def test_no_dashboard_or_one_of_this_machine_is_fine(address):
    refuse_open_dashboard(address)


def test_a_run_leaves_a_cluster_with_an_open_dashboard(dashboard, monkeypatch):
    ray, address = fake_ray(monkeypatch), dashboard(200)
    ray.init = lambda **_: type("Context", (), {"dashboard_url": address})
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    monkeypatch.setattr("launch.environment.is_loopback", lambda _: False)
    with pytest.raises(
        InputError, match=r"E704\] open dashboard — RAY_ADDRESS\. Found 127.* to anyone, expected a token"
    ):
        cluster.connect(make_config())
    assert ray.calls["shutdown"] == 1


@pytest.fixture
def gcs():
    """``gcs(host, wants_token) -> address`` of a service that answers calls of any name as Ray's control service does."""
    import grpc

    servers = []

    def start(host: str, wants_token: bool) -> str:
        def answer(_: bytes, context) -> bytes:
            if wants_token:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            return b""

        server = grpc.server(ThreadPoolExecutor(1))
        by_name = SimpleNamespace(service=lambda _: grpc.unary_unary_rpc_method_handler(answer))
        server.add_generic_rpc_handlers([by_name])
        servers.append(server)
        port = server.add_insecure_port(f"{host}:0")
        server.start()
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


@pytest.mark.parametrize(
    ("listens", "wants_token", "off_machine", "override", "refused"),
    [
        ("127.0.0.1", False, True, "", ["E704"]),
        ("127.0.0.1", False, True, "1", []),
        ("127.0.0.1", True, True, "", []),
        ("127.0.0.1", False, False, "", []),  # On loopback alone.
        ("0.0.0.0", False, False, "", ["E704"]),  # What `ray start --node-ip-address=127.0.0.1` listens on.
        ("0.0.0.0", True, False, "", []),
    ],
)
def test_a_cluster_that_answers_without_a_token_is_e704(
    gcs, monkeypatch, listens, wants_token, off_machine, override, refused
):
    monkeypatch.setattr("launch.environment._own_address", lambda: "127.0.0.2")
    monkeypatch.setattr("launch.environment.is_loopback", lambda _: not off_machine)
    monkeypatch.setenv(OVERRIDE, override)
    assert errors(refuse_open_gcs, gcs(listens, wants_token)) == refused


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:1", "10.0.0.1"])
def test_no_control_service_is_fine(monkeypatch, address):
    monkeypatch.setattr("launch.environment._own_address", lambda: "127.0.0.2")
    refuse_open_gcs(address)


def test_a_run_leaves_an_open_cluster(gcs, monkeypatch):
    ray, address = fake_ray(monkeypatch), gcs("127.0.0.1", wants_token=False)
    ray.init = lambda **_: SimpleNamespace(dashboard_url="", address_info={"gcs_address": address})
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    monkeypatch.setattr("launch.environment.is_loopback", lambda _: False)
    with pytest.raises(InputError, match=r"E704\] open cluster — RAY_ADDRESS\. Found 127.* answers anyone"):
        cluster.connect(make_config())
    assert ray.calls["shutdown"] == 1


# --- secrets ---

PLANTED = "planted-s3cret-value"


@pytest.mark.parametrize(
    ("name", "value", "changes", "key"),
    [
        ("JUDGE_TOKEN", PLANTED, {"rollout.vllm": {"some": PLANTED}}, "rollout.vllm.some"),
        ("OPENAI_API_KEY", PLANTED, {"reward.functions": [{"function": "regex", "args": {"k": [PLANTED]}}]}, "reward.functions[0].args.k[0]"),
        ("DB_PASSWORD", PLANTED, {"reward.functions": [{"url": f"https://host/?q={PLANTED}"}]}, "reward.functions[0].url"),
        ("X", "", {"reward.functions": [{"url": ["https://u:pw@host/"]}]}, "reward.functions[0].url[0]"),
    ],
)  # fmt: skip
def test_a_secret_in_the_configuration_is_e704_and_not_repeated(monkeypatch, name, value, changes, key):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputErrors, match="E704") as excinfo:
        check_secrets(make_config(**changes), "run.toml")
    (problem,) = excinfo.value.problems
    assert problem.place == f"run.toml:{key}"
    assert PLANTED not in str(problem)
    monkeypatch.delenv(name)
    assert errors(check_secrets, make_config(**changes), "run.toml") == ([] if value else ["E704"])


def with_args(**args) -> dict:
    return {"reward.functions": [{"function": "regex", "args": args}]}


RANDOM = "a1B2" * 10
"""What random keys look like. Keys of services are put together here, so that nobody takes this file for a leak."""
SECRETS = {
    "sk": with_args(k="sk-" + RANDOM),
    "sk-proj": with_args(k="use sk-proj-" + RANDOM),
    "hf": {"rollout.vllm": {"x": "hf_" + RANDOM}},
    "ghp": {"model.path": "https://ghp_" + RANDOM + "@host/model"},
    "github_pat": with_args(k="github_pat_" + RANDOM),
    "glpat": with_args(k="glpat-" + RANDOM),
    "xox": with_args(k="xoxb-" + RANDOM),
    "AKIA": with_args(k="AKIA" + "A1" * 8),
    "AIza": with_args(k="AIza" + RANDOM[:35]),
    "jwt": with_args(k="eyJ" + RANDOM + ".eyJ" + RANDOM + ".x"),
    "pem": with_args(k="-----BEGIN RSA " + "PRIVATE KEY-----"),
    "bearer": with_args(headers={"x": "Bearer " + RANDOM}),
    "api_key": with_args(api_key="x"),
    "openaiApiKey": with_args(openaiApiKey="plain"),
    "password": with_args(db={"password": "pw"}),
    "secret": with_args(client_secret="plain"),
    "Authorization": with_args(headers={"Authorization": "plain"}),
    "credentials": with_args(credentials=["plain"]),
    "hf_token": {"rollout.vllm": {"hf_token": "plain"}},
    "access_token": {"run.sinks": [{"name": "wandb", "access_token": "plain"}]},
    "token": with_args(token=RANDOM),
    "hexadecimal": with_args(wandb_key="0a1b" * 10),
    "openai_key": with_args(openai_key=RANDOM),
    "query": {"reward.functions": [{"url": "https://host/score?api_key=plain"}]},
    "query key": {"reward.functions": [{"url": ["https://host/score?x=1&key=plain"]}]},
    "data": {"data.train": "https://host/rows.jsonl?sig=plain"},
}


@pytest.mark.parametrize("changes", SECRETS.values(), ids=SECRETS)
def test_a_secret_is_known_by_its_name_form_or_address(changes):
    with pytest.raises(InputErrors, match="E704") as excinfo:
        check_secrets(make_config(**changes), "run.toml")
    (problem,) = excinfo.value.problems
    assert 'args = { token_env = "NAME" }' in problem.fix
    assert "plain" not in str(problem)
    assert "a1B2" not in str(problem)


ORDINARY = {
    "names of tokens": with_args(stop_token="<|im_end|>", pad_token="<|reserved_special_token_0|>", eos_token="</s>"),
    "a tokenizer": {"model.tokenizer": "org/tokenizer-7b-instruct-2024", "rollout.vllm": {"tokenizer_mode": "auto"}},
    "numbers of tokens": with_args(max_tokens=4096, tokens="4096", num_tokens_per_batch="16384"),
    "names of variables": with_args(token_env="JUDGE_TOKEN", api_key_env="OPENAI_API_KEY", password_file="/run/pw"),
    "names of columns": {"data.train": [{"path": "t.jsonl", "columns": {"password": "pw", "answer_key": "gold"}}]},
    "keys of tables": with_args(key="answer", sort_key="created_at", answer_key="final_answer_column_v2"),
    "a word game": with_args(keyword="apple", secretary="x", monkey="banana", author="someone"),
    "a long name": {
        "model.path": "org/task-oriented-dialog-model-v2-2024-instruct-4bit",
        "run.output_dir": "runs/sk-learn",
    },
    "a hash": {"model.path": "org/name@0123456789abcdef0123456789abcdef01234567"},
    "an address": {"reward.functions": [{"url": "https://host:8000/v1/keys/score?version=3&tokens=9"}]},
    "text": {
        "data.system_prompt": "Never tell the password. Basic rules: https://host/a?b Bearer of news, AKIA is a place."
    },
    "a date": {"data.date": "2026-01-31"},
}


@pytest.mark.parametrize("changes", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_names_and_texts_are_no_secrets(changes):
    check_secrets(make_config(**changes), "run.toml")


@pytest.mark.parametrize(
    ("name", "value"), [("TOKENIZERS_PARALLELISM", "exact_match"), ("A_KEY", "plain"), ("SSH_KEY", "/nowhere")]
)
def test_what_is_no_secret_is_not_taken_for_one(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    functions = [{"function": "exact_match", "name": "plain"}]
    check_secrets(make_config(**{"model.path": "/nowhere", "reward.functions": functions}), "run.toml")


def test_every_verb_refuses_it_before_anything_is_written(place, monkeypatch, capsys):
    monkeypatch.setenv("HUB_TOKEN", PLANTED)
    config = write_config(place / "run.toml", **{"rollout.vllm": {"hf_token": PLANTED}, "run.output_dir": "out"})
    for verb in VERBS.values():
        assert verb([str(config)]) == 2
        out, err = capsys.readouterr()
        assert "E704" in err
        assert PLANTED not in out + err
    assert not (place / "out").exists()


# --- remote rewards: what each limit holds back ---


class Service(BaseHTTPRequestHandler):
    """Sends on to itself, or says too much."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(self.path)
        body = json.dumps({"rewards": [1.0], "extra": {"pad": ["x" * (1 << 20)]}}).encode()
        self.send_response(307 if self.path == "/moved" else 200)
        self.send_header("Location", "/canary")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_): ...


@pytest.fixture
def service():
    """A server on loopback and what was asked of it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        server.seen, server.handle_error = [], lambda *_: None
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
        yield server
        server.shutdown()


async def ask(url: str, **options) -> str:
    """``answered``, or what was found wrong."""
    reward = HttpReward([url], "key", HttpOptions(retries=0, **options))
    payload = {"prompts": ["q"], "completions": ["a"], "completion_ids": [[1]], "columns": {}, "state": {}}
    try:
        await invoke(reward, payload)
    except CallFailed as failure:
        return failure.found
    finally:
        await reward.aclose()
    return "answered"


@pytest.mark.parametrize("off", [False, True])
async def test_a_redirect_leads_nowhere(service, monkeypatch, off):
    import httpx

    if off:
        client = httpx.AsyncClient
        monkeypatch.setattr(httpx, "AsyncClient", lambda **o: client(**o | {"follow_redirects": True}))
    said = await ask(f"{service.url}/moved")
    assert ("/canary" in service.seen) is off
    assert said.startswith("answered" if off else "status 307")


@pytest.mark.parametrize(("max_mb", "said"), [(0.5, "more than 0.5 MB"), (2.0, "answered")])
async def test_an_answer_over_its_size_is_not_taken(service, max_mb, said):
    assert (await ask(f"{service.url}/score", max_mb=max_mb)).startswith(said)


@pytest.mark.parametrize("off", [False, True])
def test_a_plain_address_off_this_machine_is_refused(monkeypatch, off):
    if off:
        monkeypatch.setattr("rollout.reward_models.is_loopback", lambda _: True)
    assert errors(HttpReward, ["http://10.0.0.1/"], "key", HttpOptions()) == ([] if off else ["E301"])
