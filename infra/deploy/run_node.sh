#!/usr/bin/env bash
# One node's share of a DeepSpeed job, for schedulers that start something on every node: no ssh between the nodes.
#   run_node.sh NODE_RANK MASTER_ADDR HOSTFILE MODULE [arguments of the module]
# MASTER_PORT may be set (default 29500). What ranks need must stand in the environment, GLOO_SOCKET_IFNAME for one:
# .deepspeed_env is read by launches over ssh alone. Exit codes: 0 finished, 75 told to stop and 69 another host was lost
# (both: run it again), 2 refused (again would not help), else what went wrong.
#
# A scheduler's SIGTERM is for the ranks: they save at the next step boundary and end by themselves. The launcher's first
# process would die of it and leave them behind, and its second loses their exit code; both are kept out of it here.
set -euo pipefail

if [[ $# -lt 4 ]]; then
    echo "usage: run_node.sh NODE_RANK MASTER_ADDR HOSTFILE MODULE [arguments]" >&2
    exit 2
fi
node_rank=$1 master=$2 hostfile=$3 module=$4
shift 4

# Only a rank's command line has -m MODULE (the launcher's has --module). Group 0 is this script's own process group.
ranks=(--pgroup 0 --full -- " -m ${module//./\\.} ")
stopping=false
stop() {
    echo "run_node.sh: SIGTERM, asking the ranks of this node to save and end" >&2
    stopping=true
    pkill -TERM "${ranks[@]}" || true
}
trap stop TERM

# Every rank leaves its exit code here (training/entry.py).
codes=$(mktemp -d)
trap 'rm -rf "$codes"' EXIT

(
    trap '' TERM
    export IRD_EXIT_CODES=$codes
    exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$node_rank" \
        --master_addr "$master" --master_port "${MASTER_PORT:-29500}" --module "$module" "$@"
) &
launcher=$!

# A trapped signal ends `wait` early; only the launcher's end is the end.
while true; do
    code=0
    wait "$launcher" || code=$?
    kill -0 "$launcher" 2>/dev/null || break
done
# A launcher that was killed leaves its ranks; they are given the time to save.
while pgrep "${ranks[@]}" >/dev/null; do sleep 1; done

if $stopping && [[ $code -ne 0 ]]; then
    exit 75
fi
if [[ $code -eq 0 ]]; then
    # The launcher returns 0 when its own child was killed, by lack of memory for one; the ranks know better.
    said=$(cat "$codes"/rank-* 2>/dev/null | sort -u)
    case $said in
        0) ;;
        *75*) code=75 ;;
        *) code=1 ;;
    esac
    [[ $code -eq 0 ]] || echo "run_node.sh: the launcher says 0, but the ranks ended with: ${said//$'\n'/ }" >&2
fi
exit "$code"
