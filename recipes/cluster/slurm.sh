#!/usr/bin/env bash
# A Ray cluster inside a Slurm allocation, and one stage on it:
#   sbatch --nodes=2 recipes/cluster/slurm.sh guided_rl setting=paper rl_hardware=gpu16
# The clone with its .venv (bash recipes/setup.sh gpu), outputs/ and the models lie on storage that all nodes share.
#   TAGPR_PRMU=shared (default)  PRMU on the first node, in a share of one GPU beside the policy
#   TAGPR_PRMU=separate          PRMU on the last node of the allocation, alone; ask for one node more
#   TAGPR_PRMU=none              no PRMU of this job: give prmu_client.url yourself, or a stage that asks none
#SBATCH --job-name=tagpr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=3-00:00:00
#SBATCH --output=tagpr-%j.log
#SBATCH --signal=B:TERM@120
set -euo pipefail
# Slurm runs a copy of this file: the clone is where sbatch was typed.
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
cd "$root"
if (($# == 0)); then echo "error: slurm.sh: no stage. Use \`sbatch recipes/cluster/slurm.sh guided_rl [key=value ...]\`." >&2; exit 2; fi
stage=$1
shift
python=$root/.venv/bin/python
prmu=${TAGPR_PRMU:-shared}
port=${TAGPR_RAY_PORT:-6379}
prmu_port=${TAGPR_PRMU_PORT:-8200}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Since Slurm 22.05 a step gets one CPU, whatever the job asked for, unless it is told here.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
# Where a node's name means loopback on the node itself, its first address.
# shellcheck disable=SC2016
own_address='ip=$(hostname --ip-address); if [[ $ip == 127.* ]]; then ip=$(hostname -I); fi; echo "${ip%% *}"'
address_of() { srun --nodes=1 --ntasks=1 --overlap -w "$1" bash -c "$own_address"; }
case $prmu in
  shared) prmu_node=${nodes[0]} ;;
  separate)
    if ((${#nodes[@]} < 2)); then echo "error: TAGPR_PRMU=separate: wants a node of its own. Use --nodes=2 or more." >&2; exit 2; fi
    prmu_node=${nodes[-1]}
    unset 'nodes[-1]'
    ;;
  none) prmu_node= ;;
  *) echo "error: TAGPR_PRMU=$prmu: unknown. Use shared, separate or none." >&2; exit 2 ;;
esac
# Of the stages, guided RL alone asks PRMU over the network.
if [[ $stage != guided_rl ]]; then prmu_node=; fi

# Tokens of this job: in files that only their owner reads, removed at its end.
secrets=$root/outputs/.slurm-$SLURM_JOB_ID
(umask 077 && mkdir -p "$secrets")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$secrets/ray
for file in "$secrets/ray" "$secrets/prmu"; do
  (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$file")
done
pids=()
finish() {
  ((${#pids[@]})) && kill "${pids[@]}" 2>/dev/null
  wait
  rm -rf "$secrets"
}
trap finish EXIT
trap 'exit 143' TERM INT

head=$(address_of "${nodes[0]}")
for node in "${nodes[@]}"; do
  role=(worker "$head:$port")
  if [[ $node == "${nodes[0]}" ]]; then role=(head --port="$port"); fi
  ip=$(address_of "$node")
  TAGPR_NODE_IP=$ip srun --nodes=1 --ntasks=1 --overlap -w "$node" \
    bash recipes/cluster/ray_node.sh "${role[@]}" &
  pids+=($!)
  if [[ $node == "${nodes[0]}" ]]; then sleep 15; fi
done

overrides=("$@")
if [[ -n $prmu_node ]]; then
  ip=$(address_of "$prmu_node")
  srun --nodes=1 --ntasks=1 --overlap -w "$prmu_node" "$python" -m tagpr serve_prmu \
    run.name="serve_prmu_$SLURM_JOB_ID" server.host="$ip" server.port="$prmu_port" server.token_file="$secrets/prmu" \
    server.gpu_memory_utilization="${TAGPR_PRMU_MEMORY:-0.1}" &
  pids+=($!)
  overrides+=("prmu_client.url=http://$ip:$prmu_port" "prmu_client.token_file=$secrets/prmu")
fi

# The driver waits for the reward server; for the nodes it is waited here.
for _ in $(seq 60); do
  up=$(RAY_ADDRESS=$head:$port "$python" -c 'import ray; ray.init(logging_level="ERROR"); print(sum(n["Alive"] for n in ray.nodes()))' 2>/dev/null || true)
  if [[ ${up:-0} -ge ${#nodes[@]} ]]; then break; fi
  sleep 5
done
if [[ ${up:-0} -lt ${#nodes[@]} ]]; then
  echo "error: Ray: ${up:-0} of ${#nodes[@]} nodes have come up. See the lines above." >&2
  exit 2
fi
# In the background and waited for, so that Slurm's TERM reaches this script: the stage goes on from its last checkpoint
# when the same job is submitted again.
RAY_ADDRESS=$head:$port "$python" -m tagpr "$stage" "${overrides[@]}" &
pids+=($!)
wait $!
