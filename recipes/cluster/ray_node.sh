#!/usr/bin/env bash
# One node of a Ray cluster that asks for a token, in the foreground: it ends with this process.
#   bash recipes/cluster/ray_node.sh head                        on loopback, for a laptop
#   TAGPR_NODE_IP=10.0.0.5 bash recipes/cluster/ray_node.sh head
#   bash recipes/cluster/ray_node.sh worker 10.0.0.5:6379
# What follows goes to `ray start`. RAY_AUTH_TOKEN_PATH names the token's file, the same on every node and for whoever submits;
# ~/.ray/auth_token, where Ray looks by itself, unless set. The head makes it where it is missing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -x $root/.venv/bin/ray ]]; then PATH=$root/.venv/bin:$PATH; fi
usage() { echo "error: ray_node.sh: $1. Use \`ray_node.sh head\` or \`ray_node.sh worker HEAD:PORT\`." >&2; exit 2; }
(($#)) || usage "no role"
role=$1
shift
case $role in
  head) ;;
  worker)
    (($#)) || usage "no address of the head"
    address=$1
    shift
    ;;
  *) usage "$role is no role" ;;
esac

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PATH
# Workers at the lowest priority would be starved by whatever else the machine does.
export RAY_worker_niceness=${RAY_worker_niceness:-0}
if [[ -z ${RAY_AUTH_TOKEN:-} ]]; then
  export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
  if [[ $role == head && ! -s $RAY_AUTH_TOKEN_PATH ]]; then
    mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
    (umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
  fi
  if [[ ! -s $RAY_AUTH_TOKEN_PATH ]]; then
    echo "error: RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH: no token there. Start the head first, or copy its file." >&2
    exit 2
  fi
fi

# Without a GPU: logical ones, since verl counts nothing else, and three logical CPUs for each of its bundles.
resources=()
if ! { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then
  resources=(--num-gpus=1 --num-cpus=32)
  export VERL_PLATFORM=cpu
fi

if [[ $role == head ]]; then
  ip=${TAGPR_NODE_IP:-127.0.0.1}
  # Ray takes the machine's outward address even where it is told 127.0.0.1, unless this is off.
  if [[ $ip == 127.0.0.1 ]]; then export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0; fi
  exec ray start --head --block --disable-usage-stats --node-ip-address="$ip" --dashboard-host="$ip" \
    ${resources[@]+"${resources[@]}"} "$@"
fi
exec ray start --block --disable-usage-stats --address="$address" \
  ${TAGPR_NODE_IP:+--node-ip-address="$TAGPR_NODE_IP"} ${resources[@]+"${resources[@]}"} "$@"
