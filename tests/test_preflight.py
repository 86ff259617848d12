"""What a checked configuration turns into, and the arithmetic of resources."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tomllib

import pytest
from packaging.specifiers import SpecifierSet

from launch import builtin, cluster, dry_run, model_config
from launch.environment import VERSIONS
from launch.preflight import check_model, prepare
from rollout.reward_loading import load_reward
from shared.errors import InputError, InputErrors
from tests.fakes import fake_ray, make_config, write_model, write_rows

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """``config(**changes)`` with a model and training rows on disk."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    model = write_model(tmp_path / "model")
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    paths = {"model.path": str(model), "data.train": str(train)}
    return lambda **changes: make_config(**paths | changes)


def codes(call) -> list[str]:
    with pytest.raises((InputError, InputErrors)) as excinfo:
        call()
    error = excinfo.value
    return [e.code for e in (error.problems if isinstance(error, InputErrors) else [error])]


def test_a_good_configuration_is_prepared(config, tmp_path):
    held = write_rows(tmp_path / "eval.jsonl", [{"prompt": f"9+{i}=", "answer": "9"} for i in range(5)])
    prepared = prepare(config(**{"data.eval": str(held), "eval.max_rows": 3}), "run.toml", tmp_path)
    assert [p.text for p in prepared.train.prompts] == [row["prompt"] for row in ROWS]
    assert [p.text for p in prepared.held_out] == ["9+0=", "9+1=", "9+2="]
    assert prepared.warnings == ["info: the first 3 of 5 rows of eval.jsonl are evaluated (eval.max_rows)"]


def test_everything_that_is_wrong_is_told_in_one_pass(config, tmp_path):
    wrong = {"rollout.tensor_parallel_size": 3, "algorithm.aggregation": {"name": "mean"}}
    assert codes(lambda: prepare(config(**wrong), "run.toml", tmp_path)) == ["E107", "E406"]
    rows = write_rows(tmp_path / "long.jsonl", [{"prompt": "1" * 17, "answer": ""}, {"prompt": "", "answer": ""}])
    changes = {"data.train": str(rows), "data.eval": str(tmp_path / "nope.jsonl")}
    assert codes(lambda: prepare(config(**changes), "run.toml", tmp_path)) == ["E207", "E208", "E201"]
    rewards = {"reward.functions": [{"function": "a:b"}, {"function": "regex"}]}
    few = rewards | {"learner.prompts_per_step": 5}
    assert codes(lambda: prepare(config(**few), "run.toml", tmp_path)) == ["E301", "E301", "E203"]
    told = codes(lambda: prepare(config(**changes | rewards), "run.toml", tmp_path))
    assert told == ["E207", "E208", "E201", "E301"]  # regex lacks an argument, or a column: that cannot be known now.


def test_without_a_model_rows_and_rewards_are_judged_as_far_as_they_can_be(config, tmp_path):
    mixed = write_rows(tmp_path / "mixed.jsonl", [{"prompt": "1", "answer": "1"}, {"prompt": "", "answer": 1}])
    there = str(tmp_path / "train.jsonl")
    changes = {"model.path": "nope", "data.train": [{"path": there}, {"path": str(mixed)}, {"path": "gone.jsonl"}]}
    changes |= {"reward.functions": [{"function": "a:b"}, {"function": "regex"}, {"function": "exact_match"}]}
    assert codes(lambda: prepare(config(**changes), "run.toml", tmp_path)) == ["E401", "E206", "E201", "E301"]
    tokenizer = {"model.tokenizer": str(tmp_path), "data.train": str(mixed)}
    assert codes(lambda: prepare(config(**tokenizer), "run.toml", tmp_path)) == ["E401", "E206"]


def test_held_out_rows_that_are_left_out_are_told_and_none_left_is_refused(config, tmp_path):
    held = write_rows(tmp_path / "eval.jsonl", [{"prompt": f"9+{i}=", "answer": "9"} for i in range(3)])
    some = {"data.eval": str(held), "eval.max_rows": 2}
    told = "info: the first 2 of 3 rows of eval.jsonl are evaluated (eval.max_rows)"
    assert prepare(config(**some), "run.toml", tmp_path).warnings == [told]
    short = {"rollout.max_prompt_tokens": 4, "data.on_long_prompt": "drop"}
    write_rows(held, [{"prompt": "9+9+9=", "answer": "9"}, {"prompt": "9+1=", "answer": "9"}])
    told = "info: 1 long prompts of eval.jsonl dropped"
    assert prepare(config(**some | short), "run.toml", tmp_path).warnings == [told]
    write_rows(held, [{"prompt": "9+9+9=", "answer": "9"}])
    assert codes(lambda: prepare(config(**some | short), "run.toml", tmp_path)) == ["E203"]


def test_what_an_evaluation_needs_is_asked_of_its_own_rows_before_the_start(config, tmp_path):
    held = write_rows(tmp_path / "eval.jsonl", [{"prompt": "9+1=", "solution": "10"}])
    assert codes(lambda: prepare(config(**{"data.eval": str(held)}), "run.toml", tmp_path)) == ["E301"]
    with pytest.raises(InputErrors, match=r'E107.*run.toml:eval.pass_reward.*Fix: "exact_match"'):
        prepare(config(**{"eval.pass_reward": "exact_mach"}), "run.toml", tmp_path)


def test_a_source_of_which_nothing_is_left_takes_no_weights_with_it(config, tmp_path):
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "1" * 17, "answer": "1"}])
    there = {"path": str(tmp_path / "train.jsonl"), "max_rows": 2, "weight": 3.0}
    other = {"path": str(tmp_path / "train.jsonl"), "weight": 1.0}
    sources = {"data.train": [there, {"path": str(long), "weight": 1.0}, other], "data.on_long_prompt": "drop"}
    assert prepare(config(**sources), "run.toml", tmp_path).train.mixture == [(2, 3.0), (4, 1.0)]


def test_dropped_and_duplicate_rows_are_warned_about(config, tmp_path):
    rows = write_rows(tmp_path / "odd.jsonl", [*ROWS, {"prompt": " ", "answer": ""}, *ROWS[:2]])
    prepared = prepare(config(**{"data.train": str(rows), "data.on_bad_row": "drop"}), "run.toml", tmp_path)
    assert prepared.warnings[0] == "info: 1 blank prompts of odd.jsonl dropped"
    assert prepared.warnings[1].startswith("warning[W209] duplicate prompts — odd.jsonl. Found 2")


def test_rows_without_a_value_that_a_reward_reads_are_counted_and_the_first_may_be_one(config, tmp_path):
    (tmp_path / "r.py").write_text("def f(completions, level): return [1.0 / int(n) for n in level]\n")
    rewards = {"reward.functions": [{"function": "exact_match"}, {"function": "r.py:f"}]}
    rows = [{"prompt": "9+1="}, {"prompt": "9+2=", "answer": "11", "level": 2}, *ROWS]
    path = str(write_rows(tmp_path / "some.jsonl", rows))
    found = prepare(
        config(**{"data.train": path, "data.eval": path, "data.allow_overlap": True} | rewards), "run.toml", tmp_path
    )
    assert found.train.columns == ["answer", "level"]
    assert [line for line in found.warnings if "W210" in line] == [
        f"warning[W210] rows without {column} — some.jsonl. "
        f"Found no value in {count} of {len(rows)}, expected one in each: {name} gets None there."
        for column, count, name in (("answer", 1, "exact_match"), ("level", len(rows) - 1, "f"))
    ]
    everywhere = prepare(
        config(**{"reward.functions": [{"function": "length"}], "data.train": path}), "run.toml", tmp_path
    )
    assert not any("W210" in line for line in everywhere.warnings)


def test_overlap_is_an_error_only_among_the_rows_used_and_unless_allowed(config, tmp_path):
    held = write_rows(tmp_path / "eval.jsonl", [{"prompt": "7+7=", "answer": "14"}, ROWS[1]])
    both = {"data.eval": str(held)}
    assert codes(lambda: prepare(config(**both), "run.toml", tmp_path)) == ["E209"]
    assert len(prepare(config(**both, **{"data.allow_overlap": True}), "run.toml", tmp_path).held_out) == 2
    assert len(prepare(config(**both, **{"eval.max_rows": 1}), "run.toml", tmp_path).held_out) == 1


def test_reward_files_are_found_beside_the_configuration(config, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "r.py").write_text("def f(completions, answer): return [1.0] * len(completions)\n")
    changes = {"reward.functions": [{"function": "sub/r.py:f"}]}
    prepared = prepare(config(**changes), "run.toml", tmp_path)
    (spec,) = prepared.config.reward.functions
    assert spec.function == f"{tmp_path / 'sub' / 'r.py'}:f"
    assert load_reward(spec, "")(["a"], "b") == [1.0]


def test_a_reward_parameter_without_a_column_names_the_columns(config, tmp_path):
    (tmp_path / "r.py").write_text("def f(completions, solution): return []\n")
    with pytest.raises(InputErrors, match=r'E301.*parameter "solution" without a column, expected one of answer'):
        prepare(config(**{"reward.functions": [{"function": "r.py:f"}]}), "run.toml", tmp_path)


@pytest.mark.parametrize("name", ["exact_match", "final_number"])
def test_a_builtin_whose_default_column_is_missing_is_found_before_the_run(config, tmp_path, name):
    rows = write_rows(tmp_path / "gold.jsonl", [{"prompt": f"{i}+1=", "gold": "1"} for i in range(4)])
    changes = {"data.train": str(rows), "reward.functions": [{"function": name}]}
    assert codes(lambda: prepare(config(**changes), "run.toml", tmp_path)) == ["E301"]


SEVEN_B = {"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "head_dim": 64}


@pytest.mark.parametrize(
    ("changes", "shape", "found"),
    [
        ({"rollout.tensor_parallel_size": 2}, {"num_attention_heads": 14, "head_dim": 64}, None),
        ({"rollout.tensor_parallel_size": 4}, {"num_attention_heads": 14, "head_dim": 64}, "use 2"),
        ({"rollout.tensor_parallel_size": 7}, SEVEN_B, "7 for 28 heads, num_key_value_heads 4"),
        ({"rollout.tensor_parallel_size": 7}, SEVEN_B, "one of [1, 2, 4]. Fix: use 4"),
        ({"rollout.tensor_parallel_size": 4}, SEVEN_B, None),
        (
            {"rollout.tensor_parallel_size": 8},
            {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
            None,
        ),  # Repeated.
        (
            {"rollout.tensor_parallel_size": 2},
            {"num_attention_heads": 2, "intermediate_size": 95},
            "intermediate_size 95",
        ),
        ({"rollout.pipeline_parallel_size": 3}, {"num_hidden_layers": 2}, "at most 2, the layers of the model"),
        ({"rollout.pipeline_parallel_size": 2}, {"num_hidden_layers": 2}, None),
        ({"rollout.max_new_tokens": 48}, {}, None),
        ({"rollout.max_new_tokens": 49}, {}, "at most 48 new tokens"),
        ({"rollout.max_prompt_tokens": 64, "rollout.max_new_tokens": 1}, {}, "rollout.max_prompt_tokens below 64"),
        ({"eval.max_new_tokens": 49}, {}, "16 + 49 = 65"),
        ({"model.trust_remote_code": True}, {"auto_map": {}}, None),
    ],
)
def test_the_limits_of_a_model(config, tmp_path, changes, shape, found):
    write_model(tmp_path / "model", **shape)
    if found is None:
        check_model(config(**changes), "run.toml")
    else:
        with pytest.raises(InputErrors) as excinfo:
            check_model(config(**changes), "run.toml")
        assert found in str(excinfo.value)


@pytest.mark.parametrize(("gpu", "dtype", "told"), [(True, "float32", 1), (True, "bfloat16", 0), (False, "float32", 0)])
def test_float32_on_a_gpu_is_told_to_be_slow(config, tmp_path, monkeypatch, gpu, dtype, told):
    write_model(tmp_path / "model")
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    lines = [line for line in check_model(config(**{"model.dtype": dtype}), "run.toml") if "W405" in line]
    assert len(lines) == told
    assert all('set model.dtype = "bfloat16"' in line for line in lines)


def test_head_dim_is_limited_only_without_a_gpu(config, tmp_path, monkeypatch):
    write_model(tmp_path / "model", head_dim=48)
    assert codes(lambda: check_model(config(), "run.toml")) == ["E410"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_model(config(), "run.toml")


# --- built-in data ---


def test_builtin_data_is_written_once_and_found_again(config):
    first = builtin.resolve(
        config(**{"data.train": "builtin:addition", "data.eval": "builtin:addition"}), "run.toml"
    ).data
    stamp = os.stat(first.train[0].path).st_mtime_ns
    assert builtin.resolve(config(**{"data.train": "builtin:addition"}), "run.toml").data.train == first.train
    assert os.stat(first.train[0].path).st_mtime_ns == stamp
    assert first.train != first.eval


@pytest.mark.parametrize("task", ["addition", "gsm8k"])
def test_builtin_rows_are_split_without_overlap(task):
    train, held = builtin.TASKS[task].rows()
    column = builtin.TASKS[task].prompt_column
    assert not {row[column] for row in train} & {row[column] for row in held}
    assert (len(train), len(held)) == {"addition": (7588, 512), "gsm8k": (80, 20)}[task]
    assert (train, held) == builtin.TASKS[task].rows()


def test_builtin_tokenizers_round_trip():
    plain, chat = (builtin.make_tokenizer(builtin.TASKS[name]) for name in ("addition", "gsm8k"))
    assert plain.decode(plain("12+34=")["input_ids"]) == "12+34="
    assert chat.decode(chat("héllo, 日本\n")["input_ids"]) == "héllo, 日本\n"
    assert (plain.pad_token, plain.eos_token) == ("<|pad|>", "<|end|>")
    assert plain.pad_token_id != plain.eos_token_id


def test_a_half_written_cache_entry_is_never_seen(tmp_path):
    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        builtin._write_whole(tmp_path / "entry", fail)
    assert not (tmp_path / "entry").exists()


# --- resources ---


@pytest.mark.parametrize(
    ("on_gpu", "changes", "cpus", "gpus"),
    [
        (False, {}, 2, 0),
        (False, {"rollout.num_engines": 3, "rollout.cpu_threads": 2, "learner.cpu_threads": 4}, 10, 0),
        (False, {"rollout.tensor_parallel_size": 2, "learner.num_ranks": 2}, 4, 0),
        (True, {"rollout.colocate": True, "rollout.num_engines": 2, "learner.num_ranks": 2}, 4, 2),
        (True, {"rollout.num_engines": 3, "rollout.tensor_parallel_size": 2, "learner.num_ranks": 2}, 5, 8),
    ],
)
def test_what_a_run_needs(on_gpu, changes, cpus, gpus):
    needs = cluster.Needs.of(make_config(**changes), on_gpu)
    assert (needs.total("CPU"), needs.total("GPU")) == (cpus, gpus)


def test_resources_that_just_suffice_are_enough(monkeypatch):
    fake_ray(monkeypatch, cpus=5)
    needs = cluster.check_resources(make_config(**{"rollout.num_engines": 4}), "run.toml")
    assert (needs.engines, needs.ranks) == (4, 1)


def test_without_an_address_a_private_ray_is_started(monkeypatch):
    seen = {}
    fake_ray(monkeypatch).init = lambda **arguments: seen.update(arguments)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    cluster.connect(make_config(**{"rollout.num_engines": 90}))
    assert seen["address"] == "local"
    assert seen["include_dashboard"] is False
    assert seen["num_cpus"] == 91  # Ray's count is only bookkeeping: a laptop may share its cores.


def test_workers_import_millrace_from_where_the_driver_did(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/a", "", "/b", "/a"]))
    path = cluster.worker_environment()["PYTHONPATH"].split(os.pathsep)
    assert path == [str(cluster.ROOT), "/a", "/b"]
    assert (cluster.ROOT / "launch" / "cluster.py").samefile(sys.modules["launch.cluster"].__file__)


@pytest.mark.parametrize(("cores", "warned"), [("0-1", True), ("0|0", True), ("0|1", False), ("nobind", False)])
def test_engines_on_the_same_cores_are_warned_of(config, tmp_path, cores, warned):
    changes = {"rollout.num_engines": 2, "rollout.cpu_cores": cores}
    assert any("W505" in line for line in prepare(config(**changes), "run.toml", tmp_path).warnings) == warned


async def test_no_task_outlives_the_connection_to_ray(monkeypatch):
    """One that asked Ray something after its end would start another Ray and wait for ever."""
    events = []

    async def left_behind():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            events.append("asked Ray")

    monkeypatch.setattr(cluster, "connect", lambda config: events.append("connected"))
    monkeypatch.setattr(cluster, "disconnect", lambda failed: events.append("disconnected"))
    async with cluster.ray_session(None):
        task = asyncio.create_task(left_behind())
        await asyncio.sleep(0)
    assert events == ["connected", "asked Ray", "disconnected"]
    assert task.cancelled()


def test_the_versions_that_are_accepted_hold_those_that_are_installed_by_the_lock():
    pins = tomllib.loads((cluster.ROOT / "pyproject.toml").read_text())["project"]
    lines = [*pins["dependencies"], *pins["optional-dependencies"]["gpu"]]
    lines += (cluster.ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    found = [re.fullmatch(r"([\w-]+)(?:\[\w+\])?==([\w.+]+)", line) for line in lines]
    pinned = [(match[1].removesuffix("-cpu"), match[2]) for match in found if match]
    pinned = [(name, version) for name, version in pinned if name in VERSIONS]
    assert {name for name, _ in pinned} == VERSIONS.keys()
    assert all(SpecifierSet(VERSIONS[name]).contains(version) for name, version in pinned)


@pytest.mark.parametrize(("limit", "free"), [("max", None), ("1000000", 1_000_000 - 400_000 + 100_000)])
def test_free_memory_is_within_the_containers_limit(monkeypatch, tmp_path, limit, free):
    monkeypatch.setattr(dry_run, "CGROUP", tmp_path / "none")
    everything = dry_run.free_memory()
    for name, text in {"memory.max": limit, "memory.current": "400000", "memory.stat": "anon 1\nfile 100000\n"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(dry_run, "CGROUP", tmp_path)
    assert dry_run.free_memory() == pytest.approx(free or everything, rel=0.2)


@pytest.mark.parametrize(
    ("heads", "keys", "workers", "splits"),
    [(12, 4, 2, True), (12, 2, 4, True), (12, 3, 2, False), (12, 4, 6, False), (12, 12, 5, False), (12, None, 4, True)],
)
def test_workers_share_query_heads_and_split_or_repeat_key_heads(heads, keys, workers, splits):
    assert model_config._splits({"num_key_value_heads": keys}, heads, workers) == splits
