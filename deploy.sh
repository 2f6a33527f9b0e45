#!/usr/bin/env bash
# Usage: ./deploy.sh VERB. Every verb may be repeated: what is done already is skipped.
#
#   run [MODEL]     set up, fetch the default model, start the daemon, stream one answer, say how to talk to it
#   test [ARGS]     set up, then ruff, mypy and pytest; ARGS are pytest's
#   deb [FOLDER]    set up, and build a Debian package of what install puts in place, in FOLDER or dist/
#   stop            stop the daemon; running answers may end first
#   status          what the daemon does (exit status 3: it does not run)
#   logs [ARGS]     the end of the daemon's log; ARGS are tail's, as in: logs -f
#   install [--user] [--network] [--no-model] [--from-venv DIR]
#                   set up, and have systemd run the daemon when somebody connects: as root for all, or --user for you;
#                   again after an update. --network: it may PULL, and listen on ports that its configuration names;
#                   --no-model: without the default one; --from-venv: with the packages that lie in DIR, compiling nothing
#   uninstall [--user] [--purge]
#                   take that away; --purge: with its models, configuration, cache and user
#   check           what this machine has and what it lacks; changes nothing
#   help            this
#
# As the Llambo bridge had them: build-bridge (set up only), start-bridge [MODEL] (set up and start), stop-bridge,
# test-ffi [MODEL] and test-streaming [MODEL] (an answer whole, an answer streamed), all (as run).
#
#   PYTHON=python3.12           which Python makes .venv
#   CMAKE_ARGS=-DGGML_CUDA=on   how llama.cpp is built; remembered, and .venv is made anew when it changes
#   LLAMA_BRIDGE_SOCKET=/path   where the daemon listens

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh deploy.sh
set -euo pipefail

CALLED_FROM=$PWD
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
cd -- "$ROOT"
VENV=$ROOT/.venv
PY=$VENV/bin/python
LOCKS=(bridge/build.lock bridge/requirements.lock)
: "${HOME:=$(cd ~ && pwd)}"
STATE=${XDG_STATE_HOME:-$HOME/.local/state}/llama-bridge
PID_FILE=$STATE/bridge.pid
BRIDGE_LOG=$STATE/bridge.log

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$ROOT/deploy.sh"; }
say() { printf '==> %s\n' "$*"; }
warn() { printf 'deploy.sh: %s\n' "$*" >&2; }
die() { warn "$*" && exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }
has_compiler() { has "${CXX:-c++}" || has g++ || has clang++; }

# -- setting up ---------------------------------------------------------------------------------------------------

# logged WHAT COMMAND...: its output goes to $LOG, whose end is shown if it fails. Meanwhile shows the time that it
# takes, and of a compilation its [step/steps].
logged() {
    local what=$1 began=$SECONDS status=0 every=30 form='    %d:%02d %s\n' from ticker
    shift
    from=$(wc -c <"$LOG")
    [ ! -t 1 ] || { every=1 form='\r    %d:%02d %s\033[K'; }
    say "$what"
    while sleep "$every" >/dev/null 2>&1 9<&- && kill -0 $$ 2>/dev/null; do
        # shellcheck disable=SC2059
        printf "$form" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) \
            "$(tail -c "+$from" "$LOG" | grep -ao '\[[0-9]*/[0-9]*\]' | tail -n 1)"
    done &
    ticker=$!
    "$@" >>"$LOG" 2>&1 </dev/null || status=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    [ ! -t 1 ] || printf '\r\033[K'
    [ "$status" = 0 ] || { tail -n 25 "$LOG" >&2; die "that failed (exit status $status); all it said: $LOG"; }
}

# packages WHY PACKAGE...: installs Debian packages if it may, else names them; false if they are still missing.
packages() {
    if has apt-get && [ "$(id -u)" = 0 ]; then
        say "installing ${*:2} ($1)"
        apt-get -qq update || true # older lists may do
        DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends \
            "${@:2}" >/dev/null && return
    fi
    warn "missing: ${*:2} ($1). Install, as root: apt-get update && apt-get install ${*:2}"
    return 1
}

find_python() {
    local python
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$python" && return
    done
    return 1
}

# What .venv was made for. When any of it changes (the checkout moved, a new Python), it is made anew.
identity() { echo "$ROOT" "$("$PY" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null)" && echo "$CMAKE_ARGS"; }

make_venv() {
    local python version
    export CMAKE_ARGS=${CMAKE_ARGS-$(tail -n +2 "$VENV/identity" 2>/dev/null || true)}
    [ "$(cat "$VENV/identity" 2>/dev/null)" != "$(identity)" ] || return 0
    python=$(find_python) || die "no Python 3.11 or later here (${PYTHON:-python3}); name one: PYTHON=/path/to/python3"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import venv, ensurepip' 2>/dev/null || packages "to make .venv" "python$version-venv" || exit 1
    [ ! -e "$VENV" ] || say "removing .venv: it was made for another place, another Python or other CMAKE_ARGS"
    rm -rf -- "$VENV"
    mkdir -- "$VENV"
    : >"$LOG"
    logged "making .venv with $python (Python $version)" "$python" -m venv "$VENV"
    identity >"$VENV/identity"
}

# A stamp remembers the files that something was installed from: stamp NAME FILE..., stamped NAME FILE...
sum() { cat -- "$@" 2>/dev/null | sha256sum; }
stamp() { sum "${@:2}" >"$VENV/$1.stamp"; }
stamped() { [ "$(cat "$VENV/$1.stamp" 2>/dev/null)" = "$(sum "${@:2}")" ]; }

pip() { logged "$1" "$PY" -m pip --disable-pip-version-check --no-input install "${@:2}"; }

set_up() {
    local cache=() compiles="; llama.cpp is compiled, once, which takes 5 minutes or more on 2 cores"
    exec 9<"$ROOT/deploy.sh" # one at a time in a checkout
    flock -n 9 || { say "waiting for another ./deploy.sh in this checkout" && flock 9; }
    LOG=$VENV/setup.log
    make_venv
    stamped daemon "${LOCKS[@]}" pyproject.toml && return
    : >"$LOG"
    has_compiler || packages "a C++ compiler" g++ || exit 1
    # GCC 12 miscompiles llama.cpp's AMX code, which then crashes (ggml-org/llama.cpp#20824).
    local no_amx="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    # shellcheck disable=SC2086
    if "${CXX:-c++}" $no_amx -fsyntax-only -x c++ /dev/null 2>/dev/null; then
        export CFLAGS="$no_amx ${CFLAGS-}" CXXFLAGS="$no_amx ${CXXFLAGS-}"
    fi
    [ -z "$CMAKE_ARGS" ] || cache=(--no-cache-dir) # pip's cache does not know how a wheel was built
    pip "installing the build tools" --require-hashes -r "${LOCKS[0]}"
    pip "installing what the daemon needs$("$PY" -c 'import llama_cpp' 2>/dev/null || echo "$compiles")" \
        -v "${cache[@]}" --require-hashes --no-build-isolation -r "${LOCKS[1]}"
    pip "installing this checkout" --no-deps --no-build-isolation --editable .
    logged "checking that llama.cpp loads" "$PY" -c 'import llama_cpp'
    stamp daemon "${LOCKS[@]}" pyproject.toml
}

default_model() { "$PY" -m bridge.models.default; }

# -- the daemon ---------------------------------------------------------------------------------------------------

bridge() { "$VENV/bin/llama-bridge" "$@" 9<&-; }
answers() { bridge ping --timeout 5 >/dev/null 2>&1; }

# The daemon that this script started, if it still runs; in a stale file there may be a stranger's number.
daemon_pid() {
    local pid
    pid=$(cat "$PID_FILE" 2>/dev/null) && [[ $pid =~ ^[0-9]+$ ]] && [ -O "/proc/$pid" ] || return 1
    [[ $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null) == *"llama-bridge serve "* ]] && echo "$pid"
}

find_socket() {
    LLAMA_BRIDGE_SOCKET=$("$PY" -c 'from protocol.address import default_socket as path; print(path())')
    export LLAMA_BRIDGE_SOCKET
}

trouble() { tail -n 25 "$BRIDGE_LOG" >&2; die "$* All of its log: $BRIDGE_LOG"; }

start() {
    local model=${1:-} pid began
    [ -z "$model" ] || model=$(cd -- "$CALLED_FROM" && realpath -e -- "$model")
    set_up
    find_socket
    if answers; then
        say "a bridge answers on $LLAMA_BRIDGE_SOCKET already (to start it anew: ./deploy.sh stop)"
        return
    fi
    ! pid=$(daemon_pid) || die "pid $pid is our daemon, but does not answer on $LLAMA_BRIDGE_SOCKET: ./deploy.sh stop"
    [ -n "$model" ] || model=$(default_model) || exit
    (umask 077 && mkdir -p -- "$STATE")
    [ ! -e "$BRIDGE_LOG" ] || mv -f -- "$BRIDGE_LOG" "$BRIDGE_LOG.1"
    say "starting the daemon with ${model##*/}; waiting until PING is answered on $LLAMA_BRIDGE_SOCKET"
    setsid "$VENV/bin/llama-bridge" serve --socket "$LLAMA_BRIDGE_SOCKET" --load "$model" \
        </dev/null >"$BRIDGE_LOG" 2>&1 9<&- &
    pid=$! began=$SECONDS
    echo "$pid" >"$PID_FILE"
    until answers; do
        kill -0 "$pid" 2>/dev/null || trouble "The daemon ended."
        ((SECONDS - began < 60)) || trouble "No answer for 60 s."
        sleep 0.2
    done
    say "it runs as pid $pid; its log is $BRIDGE_LOG"
}

run() {
    start "$@"
    say "one answer, as it comes: llama-bridge infer --max-tokens 48 'Once upon a time'"
    bridge infer --max-tokens 48 'Once upon a time' || trouble "That failed."
    cat <<END

==> Talk to it; protocol/PROTOCOL.md has all the verbs:
  netcat   echo 'INFER_STREAM max_tokens=32 Once upon a time' | nc -N -U $LLAMA_BRIDGE_SOCKET
  shell    client/bridge.sh -s $LLAMA_BRIDGE_SOCKET stream 'Once upon a time'
  command  .venv/bin/llama-bridge infer --socket $LLAMA_BRIDGE_SOCKET 'Once upon a time'
  Python   .venv/bin/python -c 'import client; print(client.Client("$LLAMA_BRIDGE_SOCKET").infer("Once upon a time").text)'
  after    ./deploy.sh status, ./deploy.sh logs, ./deploy.sh stop
END
    [[ $(lacking_tools) != *netcat* ]] || say "this machine has no nc for Unix sockets: apt-get install netcat-openbsd"
}

try_out() { # MODEL OPTION...
    start "$1"
    bridge ping
    bridge infer "${@:2}" --max-tokens 32 'Once upon a time'
}

gone_within() { # PID SECONDS
    for ((i = 0; i < $2 * 5; i++)); do
        [ "$(daemon_pid)" = "$1" ] || return 0
        sleep 0.2
    done
    return 1
}

stop() {
    local pid
    if pid=$(daemon_pid); then
        say "stopping pid $pid; answers that run have 30 s to end"
        kill -TERM "$pid"
        gone_within "$pid" 40 || { kill -TERM "$pid" && gone_within "$pid" 5; } ||
            { kill -KILL "$pid" && gone_within "$pid" 5; } || die "pid $pid does not end"
        say "it is gone"
    else
        say "no daemon of ./deploy.sh runs"
    fi
    rm -f -- "$PID_FILE"
}

status() {
    { find_socket 2>/dev/null && answers; } || { say "no bridge answers; ./deploy.sh run starts one" && exit 3; }
    say "on $LLAMA_BRIDGE_SOCKET, pid $(daemon_pid || echo 'not known: ./deploy.sh did not start it')"
    bridge status
}

# -- packaging ----------------------------------------------------------------------------------------------------

deb() { # [FOLDER]
    local folder=$ROOT/dist
    [ -z "${1:-}" ] || folder=$(cd -- "$CALLED_FROM" && realpath -m -- "$1")
    has dpkg-deb || die "dpkg-deb is not here: this is for Debian and its kin"
    set_up
    "$PY" systemd/deb/package.py "$folder" 9<&-
    say "to install it, as root: apt-get install /path/to/the.deb"
}

# -- tests, and what this machine has -----------------------------------------------------------------------------

# As Debian packages; the nc of netcat-traditional speaks no Unix sockets. Not lintian, which brings 150 packages, nor
# man-db, which makes an index of all pages whenever anything is installed: their tests run where these are.
lacking_tools() {
    [[ $(nc -h 2>&1) == *-U* ]] || echo netcat-openbsd
    has socat || echo socat
    has shellcheck || echo shellcheck
    has haproxy || echo haproxy
    has systemd-nspawn || echo systemd-container
    has fish || echo fish
    has zsh || echo zsh
    has mandoc || echo mandoc
}

tests() {
    local lacks=() failed=()
    set_up
    stamped tests tests/requirements.lock "$VENV/daemon.stamp" ||
        pip "installing what the tests need" --require-hashes -r tests/requirements.lock
    stamp tests tests/requirements.lock "$VENV/daemon.stamp"
    mapfile -t lacks < <(lacking_tools)
    [ ${#lacks[@]} = 0 ] || packages "for tests" "${lacks[@]}" || say "going on: tests that need them are skipped"
    default_model >/dev/null || say "going on: tests that need the model are skipped"
    exec 9<&- # the tests run this script, too
    step() { say "$*" && "$VENV/bin/$1" "${@:2}" || failed+=("$1"); }
    step ruff check .
    step ruff format --check .
    step mypy
    if [ $# != 0 ]; then
        step pytest "$@"
    else
        # Half of their time they wait, so 3 keep 2 cores busy. In the order of their names: sorted by how many tests
        # they have, the files whose few tests take longest would be left for the end.
        step pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=8 -m 'not model'
        step pytest --durations=8 -m model # whose threads do not share a core well
    fi
    [ ${#failed[@]} = 0 ] || die "failed: ${failed[*]}"
}

check() {
    row() { # WHAT REMEDY COMMAND...
        if "${@:3}" >/dev/null 2>&1; then echo "  ok       $1"; else echo "  missing  $1 ($2)" && return 1; fi
    }
    local status=0
    row "Python 3.11 or later" "needed; name one: PYTHON=/path/to/python3" find_python || status=1
    row "C++ compiler" "needed to set up: apt-get install g++" has_compiler || status=1
    row ".venv" "run and test make it" stamped daemon "${LOCKS[@]}" pyproject.toml || true
    row "default model" "run and test fetch it" default_model --check || true
    row "tools of the tests" "test installs them as root: $(lacking_tools | xargs)" test -z "$(lacking_tools)" || true
    row "running daemon" "run starts it" daemon_pid || true
    return "$status"
}

verb=${1:-help}
[ $# = 0 ] || shift
case $verb in
run | all) run "$@" ;;
test) tests "$@" ;;
stop | stop-bridge) stop ;;
status) status ;;
logs) exec tail "${@:--n100}" -- "$BRIDGE_LOG" ;;
install | uninstall)
    # shellcheck source=systemd/install.sh
    . "$ROOT/systemd/install.sh"
    "${verb}_service" "$@"
    ;;
check) check ;;
deb) deb "$@" ;;
help | -h | --help) usage ;;
build-bridge) set_up ;;
start-bridge) start "$@" ;;
test-ffi) try_out "${1:-}" --no-stream ;;
test-streaming) try_out "${1:-}" ;;
*) usage >&2 && warn "unknown verb: $verb" && exit 2 ;;
esac
