#!/usr/bin/env bash
# Makes .venv and puts the pinned dependencies into it, once. `make demo` and `make test` begin here.
# What is installed is known by content: the stamp holds the sum of requirements.lock and pyproject.toml. A run that was
# interrupted left no stamp, and the next one goes on from what pip had finished.
# Set PYTHON to choose an interpreter; pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL ...) are respected.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.installed
wanted=$(cat requirements.lock pyproject.toml | cksum)

is_done() { [[ -x $venv/bin/ird && -f $stamp && $(<"$stamp") == "$wanted" ]]; }
fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

is_done && exit 0

supported='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c "$supported" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}
python=$(find_python) || fail \
    "No usable Python: ird needs Python 3.11, 3.12 or 3.13 with its venv module (tried ${PYTHON:-python3 ... python3.11})." \
    "On Debian or Ubuntu: apt-get install python3-venv. Or name one: make demo PYTHON=/path/to/python3.11"
command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || fail \
    "No C++ compiler: DeepSpeed compiles its collectives for CPU with one. On Debian or Ubuntu: apt-get install g++"

mkdir -p "$venv"
# Two makes on one fresh clone: the second waits for the first.
if command -v flock >/dev/null; then
    exec 9>"$venv/.lock"
    flock --nonblock 9 || { echo "Waiting for another make that installs into $venv ..." && flock 9; }
    is_done && exit 0
fi

echo "Installing into $venv with $("$python" --version) (once; minutes, most of them downloads) ..."
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
rm -f "$stamp"

trap 'fail "Interrupted. Run the same command again to go on."' INT TERM
log=$venv/install.log
total=$(grep -c '==' requirements.lock)
# pip says a line for each package, and nothing for minutes while it unpacks them.
show_progress='
    /^(Collecting|Processing|Requirement already satisfied)/ { if (++n % 20 == 0) printf "  looked up %d of %d packages\n", n, total }
    /^ *Downloading .* MB/ && /\(([0-9]{3,}|[0-9]\.[0-9]+ G)/ { print "  " $0 }
    /^Building wheels/ { print "  building what comes as source" }
    /^Installing collected/ { print "  unpacking" }
    { fflush() }'
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
if ! "${pip[@]}" install --progress-bar off -r requirements.lock 2>&1 | tee "$log" | awk -v total="$total" "$show_progress"; then
    tail -n 20 "$log" >&2
    fail "pip could not install requirements.lock (all it said: $log). Run the same command again to go on."
fi
if ! "${pip[@]}" install --no-deps --no-build-isolation -e . >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    fail "pip could not install this package (all it said: $log)."
fi
"$venv/bin/python" -m infra.extensions 9>&-

echo "$wanted" >"$stamp"
echo "Installed in $SECONDS s."
