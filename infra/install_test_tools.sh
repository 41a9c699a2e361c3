#!/usr/bin/env bash
# Installs what the tests need beyond Python: a headless browser, a PostgreSQL server, and pdsh, sshd and ip for runs
# over several hosts.
# As root on a Debian-like machine it asks apt-get; elsewhere it says what is missing, and those tests skip.
# Does nothing where every command is there. Always exits 0 for what is missing: a test that lacks a tool skips, and says so.
set -euo pipefail

# The sbin folders are often not on PATH, and sshd and ip live there; Debian keeps PostgreSQL's servers elsewhere still.
PATH="$PATH:/usr/sbin:/sbin$(printf ':%s' /usr/lib/postgresql/*/bin)"

# command=Debian package
tools=(
    chromium=chromium
    pdsh=pdsh
    sshd=openssh-server
    ssh=openssh-client
    ip=iproute2
    numactl=numactl
    postgres=postgresql
)

missing=()
for tool in "${tools[@]}"; do
    command -v "${tool%%=*}" >/dev/null || missing+=("${tool#*=}")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

if [[ $(id -u) -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "Test tools missing here: ${missing[*]}. Tests that need them skip."
    echo "On Debian or Ubuntu: sudo bash infra/install_test_tools.sh"
    exit 0
fi

echo "Installing test tools (${missing[*]}) ..."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
# Debian starts what it installs; nobody asked for an open ssh port. Tests start their own sshd on a port of their own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$log" "$policy"' EXIT
fi
install() {
    apt-get -qq -o Acquire::Retries=3 update &&
        apt-get -qq -y -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@"
}
for attempt in 1 2 3; do
    if install "${missing[@]}" >"$log" 2>&1; then
        if [[ " ${missing[*]} " == *" openssh-server "* ]] && command -v systemctl >/dev/null; then
            systemctl disable --quiet ssh.service ssh.socket >/dev/null 2>&1 || true
        fi
        echo "Test tools installed in $SECONDS s."
        exit 0
    fi
    sleep $((attempt * 5))
done

tail -n 15 "$log"
echo "apt-get could not install ${missing[*]} (its last words stand above). Tests that need them skip."
