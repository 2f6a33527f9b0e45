# shellcheck shell=bash
# Installs llama-bridge as a service, and takes it away again. deploy.sh reads this; its functions and variables count.
# What is there already, and as it should be, is left alone: only what changes is said.

CHANGED=0
changed() { CHANGED=1 && say "$*"; }

# Where things go: of the machine, or with --user of who calls.
places() {
    if [ "$1" = user ]; then
        SYSTEMCTL=(systemctl --user)
        PREFIX=$HOME/.local/lib/llama-bridge
        COMMAND=$HOME/.local/bin/llama-bridge
        UNITS=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user
        ETC=${XDG_CONFIG_HOME:-$HOME/.config}/llama-bridge
        DATA=("${XDG_DATA_HOME:-$HOME/.local/share}/llama-bridge" "$ETC")
        systemctl --user show-environment >/dev/null 2>&1 ||
            die "no systemd of yours answers; log in anew, or as root: loginctl enable-linger $(id -un)"
        SOCKET=$XDG_RUNTIME_DIR/llama-bridge.sock
    else
        SYSTEMCTL=(systemctl)
        PREFIX=/opt/llama-bridge
        COMMAND=/usr/local/bin/llama-bridge
        UNITS=/etc/systemd/system
        ETC=/etc/llama-bridge
        DATA=(/var/lib/llama-bridge /var/lib/llama-bridge-* /var/cache/llama-bridge /var/cache/llama-bridge-* "$ETC")
        SOCKET=/run/llama-bridge/bridge.sock
        [ "$(id -u)" = 0 ] || die "this is for root; a service of your own: ./deploy.sh ${verb:?} --user"
        [ -d /run/systemd/system ] || die "systemd does not run here"
    fi
}

# put SOURCE TARGET [MODE [GROUP]]
put() {
    local note=
    cmp -s -- "$1" "$2" && return
    [[ $2 == *.socket && -e $2 ]] && note=" (in force after: ${SYSTEMCTL[*]} restart ${2##*/}, which closes it for a moment)"
    install -D -m "${3:-644}" -g "${4:-$(id -g)}" -- "$1" "$2"
    changed "installed $2$note"
}

# With sudo the checkout stays its owner's: what is made in there is made as him.
set_up_as_owner() {
    local owner
    owner=$(stat -c %U "$ROOT")
    if [ "$(id -u)" != 0 ] || [ "$owner" = root ]; then
        set_up
    else
        runuser -u "$owner" -- env "HOME=$(getent passwd "$owner" | cut -d: -f6)" bash "$ROOT/deploy.sh" build-bridge
    fi
}

put_environment() {
    local any=() folder
    [ "$1" = user ] && any=(--any-python)
    mkdir -p -- "$PREFIX"
    folder=$("$PY" systemd/environment.py "${any[@]}" "$PREFIX") || exit 1
    [ "$(readlink -- "$PREFIX/current")" = "${folder##*/}" ] && return
    ln -sfn -- "${folder##*/}" "$PREFIX/current"
    changed "installed $folder, with $("$folder/bin/python" --version)"
}

put_command() {
    [ "$(readlink -- "$COMMAND")" = "$PREFIX/current/bin/llama-bridge" ] && return
    [ ! -e "$COMMAND" ] || { warn "$COMMAND is another one, and stays" && return; }
    mkdir -p -- "${COMMAND%/*}"
    ln -sfn -- "$PREFIX/current/bin/llama-bridge" "$COMMAND"
    changed "installed $COMMAND"
}

put_system_files() { # [--network]
    local unit gpu
    put systemd/sysusers.conf /etc/sysusers.d/llama-bridge.conf
    getent passwd llama-bridge >/dev/null || { systemd-sysusers llama-bridge.conf && changed "made the user llama-bridge"; }
    put systemd/tmpfiles.conf /etc/tmpfiles.d/llama-bridge.conf
    systemd-tmpfiles --create llama-bridge.conf
    for unit in bridge.service bridge.socket bridge@.service bridge@.socket; do
        put "systemd/$unit" "$UNITS/llama-$unit"
    done
    for gpu in nvidia:/dev/nvidiactl rocm:/dev/kfd; do
        [ ! -e "${gpu#*:}" ] || put_dropin "gpu-${gpu%%:*}.conf"
    done
    [ -z "$1" ] || put_dropin network.conf
    [ -e "$ETC/config.toml" ] || put systemd/config.toml "$ETC/config.toml" 640 llama-bridge
}

put_dropin() {
    put "systemd/$1" "$UNITS/llama-bridge.service.d/$1"
    put "systemd/$1" "$UNITS/llama-bridge@.service.d/$1"
}

put_user_files() {
    put systemd/user/bridge.service "$UNITS/llama-bridge.service"
    put systemd/user/bridge.socket "$UNITS/llama-bridge.socket"
    [ -e "$ETC/config.toml" ] || put systemd/user/config.toml "$ETC/config.toml" 600
}

# The default model, if the configuration wants it; the service starts without it, too.
put_model() {
    local model to=/var/lib/llama-bridge/models
    model=$("$PY" -m bridge.models.default --path-only)
    [ "$1" = system ] || to=${model%/*}
    grep -qs "${model##*/}\|$(basename "$model" .gguf)\"" "$ETC/config.toml" && [ ! -e "$to/${model##*/}" ] || return 0
    model=$(default_model) || { warn "going on without the default model" && return; }
    [ ! -e "$to/${model##*/}" ] || return 0
    install -m 640 -o llama-bridge -g llama-bridge -- "$model" "$to/.${model##*/}"
    mv -- "$to/.${model##*/}" "$to/${model##*/}"
    changed "installed $to/${model##*/}"
}

# Has the service run what is installed now. Its sockets stay open, so nobody is refused; answers may end first.
start_units() {
    "${SYSTEMCTL[@]}" daemon-reload
    if ! "${SYSTEMCTL[@]}" -q is-active llama-bridge.socket; then
        "${SYSTEMCTL[@]}" stop llama-bridge.service # which listens by itself, as one of an earlier version did
        "${SYSTEMCTL[@]}" -q enable --now llama-bridge.socket
        changed "enabled and started llama-bridge.socket: the first connection starts the daemon"
    elif [ "$CHANGED" = 1 ]; then
        "${SYSTEMCTL[@]}" try-restart llama-bridge.service 'llama-bridge@*.service'
        say "restarted what ran"
    fi
    environments ! -path "*/$(readlink -- "$PREFIX/current")/*" | xargs -r -0 rm -rf --
}

# Those that systemd/environment.py made, each ended by a NUL: nothing else in that folder is ours. TEST... are find's.
environments() {
    find "$PREFIX" -mindepth 2 -maxdepth 2 -name .complete "$@" -printf '%h\0' 2>/dev/null || true
}

install_service() {
    local whose=system network='' model=put_model
    while [ $# -gt 0 ]; do
        case $1 in
        --user) whose=user ;;
        --network) network=yes ;;
        --no-model) model=: ;;
        --from-venv) VENV=$(cd -- "${2:?--from-venv needs a folder}" && pwd) && PY=$VENV/bin/python && shift ;;
        *) die "install takes --user, --network, --no-model and --from-venv DIR, not $1" ;;
        esac
        shift
    done
    places "$whose"
    [ "$VENV" != "$ROOT/.venv" ] || set_up_as_owner
    umask 022
    export PYTHONDONTWRITEBYTECODE=1
    put_environment "$whose"
    "put_${whose}_files" "$network"
    put_command
    "$model" "$whose"
    start_units
    [ "$CHANGED" = 1 ] || say "all is installed already"
    cat <<END
==> It listens on $SOCKET; try:
  LLAMA_BRIDGE_SOCKET=$SOCKET llama-bridge status
  its configuration: $ETC/config.toml, then: ${SYSTEMCTL[*]} reload llama-bridge
  its log: journalctl${SYSTEMCTL[1]:+ --user} -u llama-bridge
END
    [ "$whose" = user ] || echo "  who may use it: members of the group llama-bridge, as after: usermod -a -G llama-bridge ALICE"
}

gone() { # PATH...
    local path
    for path; do
        [ -e "$path" ] || [ -L "$path" ] || continue
        rm -rf -- "$path"
        changed "removed $path"
    done
}

uninstall_service() {
    local whose=system purge='' ours left path
    while [ $# -gt 0 ]; do
        case $1 in
        --user) whose=user ;;
        --purge) purge=yes ;;
        *) die "uninstall takes --user and --purge, not $1" ;;
        esac
        shift
    done
    places "$whose"
    stop_units
    gone "$UNITS"/llama-bridge{,@}.{service,socket} "$UNITS"/llama-bridge{,@}.service.d
    [ "$whose" = user ] ||
        gone /etc/tmpfiles.d/llama-bridge.conf /etc/sysusers.d/llama-bridge.conf /run/llama-bridge /run/llama-bridge-*
    [ "$(readlink -- "$COMMAND")" != "$PREFIX/current/bin/llama-bridge" ] || gone "$COMMAND"
    mapfile -t -d '' ours < <(environments)
    gone "$PREFIX/current" "${ours[@]}"
    rmdir -- "$PREFIX" 2>/dev/null || true
    "${SYSTEMCTL[@]}" daemon-reload
    if [ -n "$purge" ]; then
        gone "${DATA[@]}"
        [ "$whose" = user ] || ! getent passwd llama-bridge >/dev/null ||
            { userdel llama-bridge && changed "removed the user llama-bridge"; }
    fi
    [ "$CHANGED" = 1 ] || say "nothing is installed"
    left=$(for path in "${DATA[@]}"; do [ ! -e "$path" ] || echo "$path"; done)
    [ -z "$left" ] || say "left, as data: $(xargs <<<"$left") (uninstall --purge removes them)"
}

# Those of all bridges. Stopped sockets first, or the next connection would start it again.
stop_units() {
    local units
    mapfile -t units < <("${SYSTEMCTL[@]}" list-units --all --plain --no-legend 'llama-bridge.s*' 'llama-bridge@*.s*' |
        awk '{print $1}' | sort -r)
    [ ${#units[@]} = 0 ] || "${SYSTEMCTL[@]}" stop "${units[@]}"
    # Not list-unit-files, which has no instances of templates.
    mapfile -t units < <(find "$UNITS"/*.wants -name 'llama-bridge*' -printf '%f\n' 2>/dev/null | sort -u)
    [ ${#units[@]} = 0 ] || "${SYSTEMCTL[@]}" -q disable "${units[@]}"
    "${SYSTEMCTL[@]}" reset-failed 'llama-bridge*' 2>/dev/null || true
}
