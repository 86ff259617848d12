"""``make break-check``: deliberate breakages of the packages, one at a time; the tests of ``make test`` must find each.

The tree is copied into a temporary folder. For each row of ``TABLE`` the old text is replaced in the copy and the row's
test files are run there; a test that fails must pass again without the breakage. Exit code 1 if a breakage is not found,
or if an old text does not occur exactly once. For a quiet machine: tests that hang on time also fail on a busy one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 1200.0
"""Of one run of pytest; single tests have limits of their own."""
MARKS = ("not (stack or process or slow or chaos)", "(stack or process) and not (slow or chaos)")
"""The tests of ``make test``, those that cost little first."""
# A row is two lines: its name, file and test files; then the old text => the new one.
TABLE = r"""
advantage-sign learner/advantages.py advantages
    clean - mean, 0.0) => mean - clean, 0.0)
clip-bound learner/policy_losses.py losses
    rho.clamp(1 - low, 1 + high) => rho.clamp(1 - low, 1 + low)
cispo-weight-with-gradient learner/policy_losses.py losses
    .clamp(floor, cap).detach() => .clamp(floor, cap)
aggregation-weight learner/aggregations.py losses
    1.0 / (_sequences(lengths, skip_empty) * lengths.clamp(min=1)) => 1.0 / lengths.clamp(min=1)
kl-estimator learner/kl.py losses
    bounded_exp(-d) + d - 1 => bounded_exp(d) - d - 1
kl-weighted-by-importance learner/losses.py losses
    token_loss + settings.kl_coef * kl => token_loss + settings.kl_coef * kl * (1.0 if weight is None else weight)
importance-sign learner/off_policy.py losses
    masked(old - rollout, mask) => masked(rollout - old, mask)
entropy-quantile learner/top_entropy.py top_entropy
    quantile(known, 1 - share) => quantile(known, share)
old-logprobs-of-later-steps learner/passes.py passes
    mode == "recompute" or number > 0 or => mode == "recompute" or
adaptive-kl-sign learner/coefficients.py coefficients
    kl / self._target - 1 => 1 - kl / self._target
warm-up-begins-at-zero learner/schedules.py schedules
    (s if from_zero else s + 1) / warmup_steps => s / warmup_steps
packing-leak learner/attention.py logprobs
    tokens = np.concatenate([np.arange(part.start, part.stop) for part in row]) => tokens = np.arange(row[-1].stop - sum(map(len, row)), row[-1].stop)
attention-not-causal learner/attention.py logprobs
    is_causal=True => is_causal=False
position-ids learner/batching.py batching
    append(row.completion.token_ids, len(prompt_ids)) => append(row.completion.token_ids, 0)
first-token-of-shared-prompt learner/batching.py batching
    np.array([p.stop - 1, *range => np.array([c.start - 1, *range
truncated-rows-trained learner/batching.py batching
    completion.finish_reason == "length" => completion.finish_reason == "stop"
temperature-inverted learner/logprobs.py sampled
    logits / self.temperature => logits * self.temperature
gradient-divided-by-ranks learner/learner.py learner_stack
    self.engine.backward(loss * self.world_size => self.engine.backward(loss
non-finite-gradient-applied learner/learner.py learner_stack
    parameter.grad = None => parameter.grad.nan_to_num_()
second-moment-not-saved learner/learner_state.py learner_state
    MOMENTS = ("exp_avg", "exp_avg_sq") => MOMENTS = ("exp_avg",)
buffer-order rollout/buffer.py buffer
    popitem(last=False) => popitem(last=True)
staleness-bound rollout/buffer.py buffer
    = groups_per_batch, batches_ahead + 1 => = groups_per_batch, batches_ahead + 2
release-too-few rollout/buffer.py buffer
    self._slots -= self._groups_per_batch => self._slots -= self._groups_per_batch - 1
staleness-of-the-newest-token shared/types.py types
    return policy_version - min(versions) => return policy_version - max(versions)
seconds-counted-twice shared/ledger.py ledger
    self._intervals, self._since, self._sliced = [], now, now => self._intervals, self._sliced = [], now
lost-samples-forgotten shared/sample_ledger.py sample_ledger
    {"samples/lost": samples, "tokens/lost": tokens} => {"tokens/lost": tokens}
unknown-group-passes shared/sample_ledger.py sample_ledger
    if mine != theirs: => if mine - theirs:
ledger-file-not-compared shared/sample_ledger.py sample_ledger
    hexdigest() == str(mark["sha256"]) => hexdigest() != ""
damaged-line-not-looked-for launch/resume.py resume
    read_lines(folder / record) => (folder / record).stat()
checkpoint-hash-not-compared shared/checkpoints.py checkpoints
    if (found := _sha256(path)) != facts["sha256"]: => if not (found := _sha256(path)):
half-checkpoint-accepted shared/checkpoints.py checkpoints
    raise Damaged(path, "no file", f"{facts['bytes']} bytes") => continue
oldest-checkpoint-restored shared/checkpoints.py checkpoints
    reverse=True => reverse=False
checkpoints-sorted-as-text shared/checkpoints.py checkpoints
    key=lambda path: int(path.name.removeprefix(PREFIX)), reverse => key=lambda path: path.name, reverse
data-cursor-not-restored launch/controller.py resume
    self._train.cursor, self._evaluated = state["cursor"], state["evaluated"] => self._evaluated = state["evaluated"]
last-row-cut-on-resume launch/resume.py resume
    ["step"] <= version => ["step"] < version
two-writers-of-a-folder launch/resume.py resume
    fcntl.LOCK_EX | fcntl.LOCK_NB => fcntl.LOCK_SH | fcntl.LOCK_NB
digest-not-compared rollout/replica.py engine_pool
    if self._digests != {digest}: => if not self._digests:
canary-of-nan-accepted rollout/replica.py engine_pool
    if not gap <= self._config.canary_tolerance: => if gap > self._config.canary_tolerance:
canary-one-sided rollout/engine.py engine_pool
    np.max(np.abs(ours - canary.logprobs)) => np.max(ours - canary.logprobs)
damaged-bytes-loaded rollout/engine.py engine_stack
    if digests != {publication.digest}: => if not digests:
tied-head-forgotten rollout/weight_receiver.py engine_stack
    head.quant_method.process_weights_after_loading(head) => assert head
one-worker-s-digest-ignored rollout/engine.py tensor_parallel_stack
    return {first.hex(), *answers[1:]} => return {first.hex()}
part-packed-as-a-whole rollout/weight_receiver.py cpu_weights_stack
    self.device.type == "cpu" and self.parallel_config.world_size == 1 => self.device.type == "cpu"
workers-left-to-ray rollout/vllm_setup.py contracts_stack
    if workers > 1: => if workers > 8:
products-of-float32-in-tf32 rollout/vllm_setup.py contracts_stack
    "TRITON_F32_DEFAULT": "ieee" => "TRITON_F32_DEFAULT": "tf32"
dead-worker-unnoticed rollout/in_process.py in_process
    "is_failed", False) => "is_fail", False)
shared-memory-left-behind launch/ray_actors.py ray_actors
    if not any("multiprocessing.resource_tracker" in part for part in child.cmdline()): => if child:
stages-on-cpus launch/placement.py placement
    if not needs.on_gpu and (stages => if needs.on_gpu and (stages
more-workers-than-cores launch/dry_run.py dry_run
    if workers <= cores or => if cores or
keys-heads-that-do-not-split launch/model_config.py preflight
    heads % workers == 0 and shared and => heads % workers == 0 and
late-piece-overwrites rollout/weight_relay.py weight_relay
    if number == self.number: => if number <= self.number:
weights-readable-by-others shared/weights.py weights
    0o600 => 0o644
stale-kv-kept rollout/engine.py engine_stack
    clear_cache=recompute => clear_cache=False
stale-kv-limit-ignored rollout/stale_kv.py stale_kv
    drop = self._limit == 0 or gap > self._limit or foreseen => drop = self._limit == 0 or foreseen
stale-kv-across-versions rollout/stale_kv.py stale_kv
    if version == last.version and np.isfinite(gap): => if np.isfinite(gap):
dead-engine-only-suspected rollout/engine_health.py engine_health
    {"outdated": "stale", "died": "dead"} => {"outdated": "stale", "died": "suspect"}
restarts-uncapped rollout/engine_health.py engine_health
    self.restarts_left == 0 => self.restarts_left < 0
silent-engine-keeps-receiving rollout/fleet.py traffic
    if after == "healthy": => if after in ("healthy", "suspect"):
routing-forgets-the-idle rollout/traffic.py traffic
    self._lowest = min(self._lowest, replica.outstanding) => self._lowest = max(self._lowest, replica.outstanding)
answer-of-a-lost-engine rollout/engine_pool.py engine_pool
    if not replica.ended: => if completions:
answer-before-the-proof rollout/engine_pool.py engine_pool
    if not replica.proved: => if replica.ended:
bad-reward-becomes-0 rollout/reward_calls.py reward_calls
    raise CallFailed("E303", "bad reward value", found, "a finite number or None", fix, sample) => return 0.0
no-reward-becomes-0 rollout/reward_worker.py reward_worker
    [np.nan if value is None => [0.0 if value is None
reward-retries rollout/reward_pool.py reward_pool
    if item.attempts <= self._settings.retries: => if item.attempts < self._settings.retries:
hung-worker-kept rollout/reward_pool.py reward_pool
    self._actors[index].kill() => self._actors[index]
reward-timeout-ignored rollout/reward_worker.py reward_worker
    asyncio.timeout(self.timeout_s) => asyncio.timeout(60 * self.timeout_s)
sandbox-with-network rollout/sandbox.py sandbox
    "--unshare-all", "--unshare-user" => "--unshare-all", "--share-net", "--unshare-user"
sandbox-memory-unlimited rollout/reward_child.py sandbox
    limits["memory_mb"] << 20 => resource.RLIM_INFINITY
forked-children-left rollout/sandbox.py sandbox
    os.killpg( => os.kill(
failed-code-test-passes rollout/sandboxed_program.py code_tests
    check(job, names, run, read) => with contextlib.suppress(Exception): check(job, names, run, read)
long-prompt-lost rollout/prompts.py prompts
    self.long.append((place, len(ids))) => continue
same-order-every-epoch rollout/prompts.py prompts
    self._permutation((self._seed, epoch), len(self._prompts)) => self._permutation((self._seed, 0), len(self._prompts))
filtered-rows-uncounted rollout/datasets.py datasets
    len(rows) - len(kept)) => 0)
line-separator-ends-a-row rollout/row_files.py prompts
    text.split("\n"), 1) => text.splitlines(), 1)
budget-without-the-prompt shared/config_checks.py config_checks
    if c.max_model_len > budget: => if c.rollout.max_new_tokens > budget:
correction-counts-twice shared/config_checks.py config_checks
    if mode == "rollout" and level != "none": => if mode == "rollout" and level == "token":
token-in-a-message rollout/reward_models.py reward_models
    text.replace(os.environ[token], "***") if token else text => text
open-dashboard-accepted launch/environment.py security
    if status == http.HTTPStatus.OK: => if status == http.HTTPStatus.UNAUTHORIZED:
secret-accepted launch/config_secrets.py security
    LEAST_LENGTH = 8 => LEAST_LENGTH = 80
secret-by-name-accepted launch/config_secrets.py security
    NAMES.search(end) or => NAMES.fullmatch(end) or
open-cluster-joined launch/cluster.py security
    refuse_open_gcs(getattr => str(getattr
control-characters-shown shared/errors.py config
    \x7f-\x9f => \x7f-\x80
logged-metric-of-the-runs-name rollout/logged.py reward_worker
    name.partition("/")[0] in OWN => name in OWN
compressed-answer-taken rollout/reward_models.py reward_models
    .strip().lower()) != "identity" => .strip().lower()) == "br"
markup-in-the-report launch/report/page.py report
    text.replace("<", "\\u003c").replace( => text.replace(
markup-on-the-panel launch/display.py display
    {escape(Path(self._config.run.output_dir).name)} => {Path(self._config.run.output_dir).name}
wrong-curve launch/report/rows.py report
    _mean(numbers(chunk, name)) => _mean(numbers(chunk[-1:], name))
pass-at-k-biased launch/held_out.py held_out
    1.0 - math.comb(n - right, k) / math.comb(n, k) => 1.0 - (1.0 - right / n) ** k
failures-unbounded launch/failures.py failures
    if total > most or share > most_share: => if total > most and share > most_share:
goodput-of-idle-tokens launch/accounts.py accounts
    if advantage != 0 and not => if not
planner-forgets-the-ranks launch/step_model.py plan
    * tokens / ranks + timings.publish_s => * tokens + timings.publish_s
simulator-not-in-lock-step launch/simulated_engine.py simulate
    pace = self._timings.decode_s(len(self._running)) => pace = self._timings.decode_s(1)
trl-steps-rounded-down launch/trl/sizes.py import_trl
    math.ceil(wanted / updates) * updates => wanted // updates * updates
options-abbreviated launch/options.py cli
    allow_abbrev=False => allow_abbrev=True
exit-code launch/options.py cli
    return error.exit_code => return 1
"""


@dataclass(frozen=True)
class Breakage:
    """A small mistake in one file, and where it must be found."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Files, relative to the root."""


def rows() -> list[Breakage]:
    """The table as rows."""
    found, lines = [], TABLE.strip().splitlines()
    for head, change in zip(lines[::2], lines[1::2], strict=True):
        name, file, *tests = head.split()
        old, new = change.strip().split(" => ")
        found.append(Breakage(name, file, old, new, tuple(f"tests/test_{test}.py" for test in tests)))
    assert len({row.name for row in found}) == len(found), "two rows of one name"
    return found


def copy_tree(to: Path) -> None:
    """What git knows of, as it lies in the working tree, with a link to the environment."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    (to / ".venv").symlink_to((ROOT / ".venv").resolve())


def failing(tree: Path, tests: tuple[str, ...]) -> str:
    """The first test that fails in ``tree``; empty if none does. Raises ``RuntimeError`` where none ran to an end."""
    ran = False
    for marks in MARKS:
        said = output_of_pytest(tree, marks, tests)
        # The summary names it; the exit code alone may also say that a test took too long.
        if told := re.search(r"^(?:FAILED|ERROR) ([^\s\[]+)", said, re.MULTILINE):
            return told[1]
        ran |= re.search(r"\d+ passed", said) is not None
    if not ran:
        raise RuntimeError(f"no test ran: {said[-300:]}")
    return ""


def output_of_pytest(tree: Path, marks: str, tests: tuple[str, ...]) -> str:
    """What pytest writes in ``tree`` until the first failure."""
    # Without cached bytecode: a change within a second that keeps a file's size would go unnoticed.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", marks, "-p", "no:cacheprovider", *tests]
    options = {"cwd": tree, "env": environment, "capture_output": True, "text": True, "timeout": LIMIT_S}
    try:
        done = subprocess.run(command, check=False, **options)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"pytest did not end within {LIMIT_S:g} s") from None
    return done.stdout + done.stderr


def verdict(row: Breakage, tree: Path) -> tuple[bool, str]:
    """Whether the tests find ``row``, and by which or why not; ``tree`` is whole again afterwards."""
    path = tree / row.file
    whole = path.read_text(encoding="utf-8") if path.is_file() else ""
    if (count := whole.count(row.old)) != 1:
        return False, f"the old text occurs {count} times in {row.file}"
    try:
        path.write_text(whole.replace(row.old, row.new), encoding="utf-8")
        test = failing(tree, row.tests)
        path.write_text(whole, encoding="utf-8")
        if not test:
            return False, "no test fails"
        again = failing(tree, (test,))
    except RuntimeError as error:
        return False, str(error)
    finally:
        path.write_text(whole, encoding="utf-8")
    return (False, f"{again} fails without the breakage too") if again else (True, test.removeprefix("tests/"))


def main() -> int:
    """Apply the chosen breakages one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these rows alone")
    parser.add_argument("--list", action="store_true", help="the rows: name, file, tests")
    options = parser.parse_args()
    chosen = [row for row in rows() if not options.only or row.name in options.only]
    if unknown := set(options.only) - {row.name for row in chosen}:
        parser.error(f"no row called {', '.join(sorted(unknown))}")
    if options.list:
        print("\n".join(f"{row.name:34} {row.file:32} {' '.join(row.tests)}" for row in chosen))
        return 0
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="millrace-break-") as folder:
        copy_tree(Path(folder))
        for row in chosen:
            begun = time.monotonic()
            found, why = verdict(row, Path(folder))
            survivors += not found
            said = f"found by {why}" if found else f"NOT FOUND: {why}"
            print(f"{row.name:34} {said} ({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} breakages found")
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main())
