"""The job script of a run on a Slurm cluster. A pure function; nothing is submitted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ringweave.pretrain.config import RunConfig
from ringweave.pretrain.errors import ConfigError, redact

_SCRIPT = """\
#!/bin/bash
# ringweave run {name}, config {hash}
# command: ringweave {command}
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --time={minutes}
#SBATCH --open-mode=append
#SBATCH --output={run_dir}/logs/slurm-%j.log
#SBATCH --requeue
#SBATCH --signal=TERM@{lead}

# Never `set -x` here: it would print the environment, secrets included, into the log.
set -uo pipefail

export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
export PYTHONFAULTHANDLER=1
export NCCL_DEBUG="${{NCCL_DEBUG:-WARN}}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={lead}
ulimit -n "$(ulimit -Hn)"

head_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
port=$((20000 + SLURM_JOB_ID % 30000))
attempt="${{SLURM_RESTART_COUNT:-0}}"

# In the background, because bash runs no trap while it waits for a foreground command.
srun --kill-on-bad-exit=1 python -m torch.distributed.run \\
  --nnodes={nodes} --nproc-per-node={per_node} --rdzv-backend=c10d \\
  --rdzv-endpoint="$head_node:$port" --rdzv-id="$SLURM_JOB_ID.$attempt" \\
  -m ringweave.launch.cli {command} &
step=$!
trap 'kill -TERM "$step" 2>/dev/null' TERM
wait "$step"
status=$?
# A trapped signal ends `wait` early; wait for the step itself.
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  status=$?
done

# torchrun hides the workers' exit codes; the trainer leaves its own.
code="$(sed -n 's/.*"exit_code": *\\([0-9]*\\).*/\\1/p' {exit_json} 2>/dev/null | head -n 1)"
if [ "$status" -ne 0 ] && [ -n "$code" ]; then status="$code"; fi
# 75: stopped and resumable, 5: hang. Others would only fail again.
if [ "$status" -eq 75 ] || [ "$status" -eq 5 ]; then
  if [ "$attempt" -lt {restarts} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$status"
"""


def job_script(
    config: RunConfig,
    argv: Sequence[str],
    *,
    nodes: int,
    minutes: int,
    restarts: int = 100,
) -> str:
    """A bash script for `sbatch` that runs `ringweave ARGV…` on `nodes` nodes for at most `minutes`.

    The signal comes `timeout.stop` (but at least 60) seconds before the limit, time for a last checkpoint.
    Raises ConfigError when the run's processes do not spread evenly over the nodes.
    """
    if config.world % nodes:
        raise ConfigError(
            f"dp·pp·tp·sp = {config.world} does not spread over {nodes} nodes",
            where="--nodes",
            fix=f"choose nodes that divide {config.world}",
        )
    run_dir, command = config.run.dir, shlex.join(argv)
    if redact(command) != command:
        raise ConfigError(
            "a job script is readable by others and must hold no secret",
            where=redact(command),
            fix="put it into the environment or a file only you can read",
        )
    if any(ord(c) < 32 or c in "\"'`$\\" for c in run_dir + config.run.name):
        raise ConfigError("run.dir and run.name must be plain text in a job script", where=repr(run_dir))
    return _SCRIPT.format(
        name=shlex.quote(config.run.name.replace(" ", "-")),
        hash=config.hash()[:12],
        command=command,
        nodes=nodes,
        minutes=minutes,
        lead=max(60, int(config.timeout.stop)),
        per_node=config.world // nodes,
        run_dir=run_dir,
        exit_json=shlex.quote(f"{run_dir}/exit.json"),
        restarts=restarts,
    )
