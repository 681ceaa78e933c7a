# Completion for the tools of xenio in bash; installed under the name of each tool.
# shellcheck shell=bash

_xenio_words() {
    mapfile -t COMPREPLY < <(compgen -W "$1" -- "$2")
}

# Options that name a file, and words without an option, complete to files.
_xenio_files() {
    mapfile -t COMPREPLY < <(compgen -f -- "$1")
    compopt -o filenames
}

# After TYPE: comes a path; bash takes the colon for the end of a word.
_xenio_image() {
    local types='aio: sync: vhd: qcow: qcow2: vmdk: nbd: ram: x-chain: null:'
    case ${COMP_WORDS[COMP_CWORD - 1]}$1 in
    :* | *::*) _xenio_files "${1#:}" ;;
    *)
        _xenio_words "$types" "$1"
        compopt -o nospace
        ;;
    esac
}

# The disks in use: pids after -p, minors after -m.
_xenio_disks() {
    _xenio_words "$(tap-ctl list 2>/dev/null | sed -n "s/.*\b$1=\([0-9]*\).*/\1/p")" "$2"
}

_tap_ctl() {
    local word=$2 before=$3 command=${COMP_WORDS[1]} opening='-a -R -D -r -e -2 -s -t -C -E --limit'
    if [ "$COMP_CWORD" = 1 ]; then
        _xenio_words "$(tap-ctl 2>/dev/null | awk '/^  [a-z]/ { print $1 }')" "$word"
        return
    fi
    case $before in
    -p) _xenio_disks pid "$word" ;;
    -m | -e) _xenio_disks minor "$word" ;;
    -a | -2 | :) _xenio_image "$word" ;;
    -f | -C | -c) _xenio_files "$word" ;;
    --engine) _xenio_words 'uring pool auto' "$word" ;;
    *)
        case $command in
        list) _xenio_words '-p -m -t -f --json' "$word" ;;
        allocate) _xenio_words '--json' "$word" ;;
        free) _xenio_words '-m' "$word" ;;
        create) _xenio_words "$opening --engine --json" "$word" ;;
        open) _xenio_words "-p -m $opening" "$word" ;;
        spawn) _xenio_words '--engine --json' "$word" ;;
        unpause) _xenio_words '-p -m -a -2 -c' "$word" ;;
        snapshot) _xenio_words '-p -m -a' "$word" ;;
        resize) _xenio_words '-p -m -s' "$word" ;;
        limit) _xenio_words '-p -m --iops --bps --burst-iops --burst-bps --json' "$word" ;;
        stats) _xenio_words '-p -m --full --json' "$word" ;;
        top) _xenio_words '-p -m -d -n -s -b' "$word" ;;
        upgrade) _xenio_words '-p --all' "$word" ;;
        metrics) _xenio_words '-l' "$word" ;;
        nbd-tls) _xenio_words '-p -m -l -c' "$word" ;;
        *) _xenio_words '-p -m -t' "$word" ;;
        esac
        ;;
    esac
}

# COMMAND, then options and files.
_xenio_tool() {
    local commands=$1 options=$2 word=$3
    if [ "$COMP_CWORD" = 1 ]; then
        _xenio_words "$commands" "$word"
    elif [[ $word == -* ]]; then
        _xenio_words "$options" "$word"
    else
        _xenio_files "$word"
    fi
}

_vhd_util() {
    _xenio_tool 'create snapshot query read set repair resize fill coalesce modify scan check revert key copy' '-n -p -s -h' "$2"
}

_cbt_util() {
    _xenio_tool 'create set get coalesce' '-n -p -c -f -s -b -h' "$2"
}

_tap_img() {
    case $3 in
    -f | -F | -O) _xenio_words 'raw vhd qcow qcow2 vmdk' "$2" ;;
    *) _xenio_tool 'convert compare info map check create' '-f -F -O -n -s -q --json --cached --key' "$2" ;;
    esac
}

complete -F _tap_ctl tap-ctl
complete -F _vhd_util vhd-util
complete -F _cbt_util cbt-util
complete -F _tap_img tap-img
