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
        MAN=${XDG_DATA_HOME:-$HOME/.local/share}/man
        DATA=("${XDG_DATA_HOME:-$HOME/.local/share}/llama-bridge" "$STATE" "$ETC")
        systemctl --user show-environment >/dev/null 2>&1 ||
            die "no systemd of yours answers; log in anew, or as root: loginctl enable-linger $(id -un)"
        SOCKET=$XDG_RUNTIME_DIR/llama-bridge.sock
    else
        SYSTEMCTL=(systemctl)
        PREFIX=/opt/llama-bridge
        COMMAND=/usr/local/bin/llama-bridge
        UNITS=/etc/systemd/system
        ETC=/etc/llama-bridge
        MAN=/usr/local/share/man
        DATA=(/var/lib/llama-bridge /var/lib/llama-bridge-* /var/cache/llama-bridge /var/cache/llama-bridge-* "$ETC")
        SOCKET=/run/llama-bridge/bridge.sock
        [ "$(id -u)" = 0 ] || die "this is for root; a service of your own: ./deploy.sh ${verb:?} --user"
        [ -d /run/systemd/system ] || die "systemd does not run here"
    fi
    DATA+=("$UNITS"/llama-bridge{,@*}.{service,socket}.d) # what `systemctl edit` wrote
}

# Who masked a unit wants it not to run; to install it would undo that.
refuse_masked() {
    local unit
    for unit in llama-bridge{,@}.{service,socket}; do
        [ "$(readlink -- "$UNITS/$unit")" != /dev/null ] || die "$unit is masked; first: ${SYSTEMCTL[*]} unmask $unit"
    done
}

# put SOURCE TARGET [MODE [GROUP]]
put() {
    local note='' unit=${2##*/}
    cmp -s -- "$1" "$2" && return
    unit=${unit/@./@*.} # of a template, its instances
    [[ $unit == *.socket ]] && "${SYSTEMCTL[@]}" -q is-active "$unit" &&
        note=" (in force after: ${SYSTEMCTL[*]} restart '$unit', which closes it for a moment)"
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

put_manual() {
    local page
    for page in systemd/man/*.[1-8]; do
        put "$page" "$MAN/man${page##*.}/${page##*/}"
    done
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

# Has the services run what is installed now. Their sockets stay open, so nobody is refused; answers may end first.
start_units() {
    local older running=()
    "${SYSTEMCTL[@]}" daemon-reload
    if ! "${SYSTEMCTL[@]}" -q is-active llama-bridge.socket; then
        "${SYSTEMCTL[@]}" stop llama-bridge.service # which listens by itself, as one of an earlier version did
        "${SYSTEMCTL[@]}" -q enable --now llama-bridge.socket
        changed "enabled and started llama-bridge.socket: the first connection starts the daemon"
    fi
    # Where an install was cut short, something may still run out of an older one, although nothing changes now.
    mapfile -t -d '' older < <(environments ! -path "*/$(readlink -- "$PREFIX/current")/*")
    if [ "$CHANGED" = 1 ] || [ ${#older[@]} != 0 ]; then
        mapfile -t running < <(units_of service --state=active,activating,reloading)
    fi
    if [ ${#running[@]} != 0 ]; then
        changed "restarting ${running[*]}"
        "${SYSTEMCTL[@]}" try-restart "${running[@]}"
    fi
    [ ${#older[@]} = 0 ] || rm -rf -- "${older[@]}"
}

# units_of KIND OPTION...: their names, of all bridges; KIND may be a pattern.
units_of() {
    "${SYSTEMCTL[@]}" list-units --plain --no-legend "${@:2}" "llama-bridge.$1" "llama-bridge@*.$1" | awk '{print $1}'
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
    refuse_masked
    [ "$VENV" != "$ROOT/.venv" ] || set_up_as_owner
    umask 022
    export PYTHONDONTWRITEBYTECODE=1
    put_environment "$whose"
    "put_${whose}_files" "$network"
    put_command
    put_manual
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
    [ "$whose$purge" != useryes ] || ! daemon_pid >/dev/null ||
        die "the daemon of ./deploy.sh run keeps its jobs and its log where the service does; first: ./deploy.sh stop"
    places "$whose"
    stop_units
    gone "$UNITS"/llama-bridge{,@}.{service,socket}
    gone "$UNITS"/llama-bridge{,@}.service.d/{gpu-nvidia,gpu-rocm,network}.conf
    rmdir -- "$UNITS"/llama-bridge{,@}.service.d 2>/dev/null || true
    [ "$whose" = user ] ||
        gone /etc/tmpfiles.d/llama-bridge.conf /etc/sysusers.d/llama-bridge.conf /run/llama-bridge /run/llama-bridge-*
    [ "$(readlink -- "$COMMAND")" != "$PREFIX/current/bin/llama-bridge" ] || gone "$COMMAND"
    mapfile -t -d '' ours < <(environments)
    gone "$PREFIX/current" "${ours[@]}"
    gone "$MAN/man1/llama-bridge.1" "$MAN/man5/llama-bridge.toml.5"
    rmdir -- "$PREFIX" 2>/dev/null || true
    if [ -n "$purge" ]; then
        gone "${DATA[@]}"
        [ "$whose" = user ] || ! getent passwd llama-bridge >/dev/null || remove_user
    fi
    "${SYSTEMCTL[@]}" daemon-reload
    [ "$CHANGED" = 1 ] || say "nothing is installed"
    left=$(for path in "${DATA[@]}"; do [ ! -e "$path" ] || echo "$path"; done)
    [ -z "$left" ] || say "left, as data: $(xargs <<<"$left") (uninstall --purge removes them)"
}

# userdel takes the group along, unless it has members: those who might use the bridge.
remove_user() {
    gpasswd --members '' llama-bridge
    userdel llama-bridge
    changed "removed the user llama-bridge, and its group"
}

# Those of all bridges. Stopped sockets first, or the next connection would start it again.
stop_units() {
    local units
    mapfile -t units < <(units_of 's*' --all | sort -r)
    [ ${#units[@]} = 0 ] || "${SYSTEMCTL[@]}" stop "${units[@]}"
    # Not list-unit-files, which has no instances of templates.
    mapfile -t units < <(find "$UNITS"/*.wants -name 'llama-bridge*' -printf '%f\n' 2>/dev/null | sort -u)
    [ ${#units[@]} = 0 ] || "${SYSTEMCTL[@]}" -q disable "${units[@]}"
    "${SYSTEMCTL[@]}" reset-failed 'llama-bridge*' 2>/dev/null || true
}
