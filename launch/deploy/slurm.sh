#!/usr/bin/env bash
# Millrace on Slurm: one Ray over the nodes of the job, the driver on the first of them.
#
#     sbatch launch/deploy/slurm.sh launch/configs/gsm8k.toml --rollout.num_engines 12
#
# Submit it in the repository, installed in .venv, on a file system that all nodes share, like the home folder: token,
# models and run folder lie there. Submitted again, or requeued, a run goes on from its newest checkpoint.
#SBATCH --job-name=millrace
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# Whole nodes: Ray counts all cores that it finds, and listens on ports that every user of a node can reach.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM two minutes before the time is up: the driver finishes its step, writes a checkpoint and ends.
#SBATCH --signal=B:TERM@120
# shellcheck disable=SC1091,SC2329  # The environment is not ours; traps call the functions.
set -euo pipefail
READY_S=300

cd "${SLURM_SUBMIT_DIR:?is set by sbatch}"
(($#)) || set -- launch/configs/gsm8k.toml
source .venv/bin/activate

steps=() ready='' driver=''
end() {
  trap '' TERM INT
  kill -TERM "${steps[@]}" 2>/dev/null || true
  kill -KILL "$ready" 2>/dev/null || true
  wait 2>/dev/null
  rm -f "$RAY_AUTH_TOKEN_PATH"
}
stop() { if [[ $driver ]]; then kill -TERM "$driver"; else exit 143; fi; }
trap end EXIT
trap stop TERM INT

# Who can read this file can use the Ray of this job. Its path is in the environment of the steps, the token is not.
mkdir -p ~/.ray
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/token-$SLURM_JOB_ID
rm -f "$RAY_AUTH_TOKEN_PATH"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH")

# A node of Ray that is told to end would wait up to 30 s for actors to move elsewhere; there is no elsewhere.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(python -c 'import ray; print(ray.util.get_node_ip_address())'):$((20000 + SLURM_JOB_ID % 10000))
# on NODES WHERE COMMAND ...: a task on each, with all of its cores instead of the one that Slurm would give it.
on() {
  srun --nodes="$1" --ntasks="$1" --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none "${@:2}" &
  steps+=($!)
}
# Without a dashboard: nobody submits jobs to this Ray.
on 1 --nodelist="$first" ray start --head --port="${address##*:}" --include-dashboard=false \
  --disable-usage-stats --block
if ((SLURM_JOB_NUM_NODES > 1)); then
  on $((SLURM_JOB_NUM_NODES - 1)) --exclude="$first" ray start --address="$address" --disable-usage-stats --block
fi

# Millrace compares its needs with what is there, so every node has to be, by a deadline.
export RAY_ADDRESS=$address
python -c '
import signal, sys, time, ray
signal.alarm(int(sys.argv[2]))
ray.init(logging_level="error", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.2)
' "$SLURM_JOB_NUM_NODES" "$READY_S" &
ready=$!
# Until then a step that ends has failed; wait -n would miss one that ended before it was asked.
while kill -0 "$ready" 2>/dev/null; do
  for step in "${steps[@]}"; do kill -0 "$step" 2>/dev/null || break 2; done
  sleep 0.2
done
if kill -0 "$ready" 2>/dev/null || ! wait "$ready"; then
  echo "error: a node could not join Ray at $address, or $SLURM_JOB_NUM_NODES nodes had not after $READY_S s" >&2
  exit 1
fi

python launch/run.py "$@" &
driver=$!
# A signal ends the wait before the driver has ended: then wait again.
until wait "$driver"; code=$?; ! kill -0 "$driver" 2>/dev/null; do :; done
exit "$code"
