#compdef tap-ctl vhd-util cbt-util tap-img
# Completion for the tools of xenio in zsh; installed as _xenio. Commands and options are those that the program itself tells
# of.

_xenio_commands() {
    $1 --help 2>/dev/null | sed -n \
        -e 's/^  \([a-z][a-z-]*\).*/\1/p' \
        -e "s/^$1 \([a-z][a-z-]*\) .*/\1/p" \
        -e '/^COMMAND :=/{s/^[^{]*{ *//;s/ *}.*//;s/ *| */\n/g;p}'
}

_xenio_options() {
    { [[ $1 == tap-img ]] && tap-img --help || $1 $2 -h } 2>/dev/null | tr '[]()<>|,:=' ' ' | tr -s ' ' '\n' |
        grep -E -x -e '-[0-9A-Za-z]|--[a-z][a-z-]*' | sort -u
}

# What tap-ctl's list says in the field: pid or minor.
_xenio_disks() {
    tap-ctl list 2>/dev/null | sed -n "s/.*\<$1=\([0-9]*\).*/\1/p"
}

_xenio() {
    local program=${words[1]:t} command=$words[2] before=$words[CURRENT-1]
    if (( CURRENT == 2 )); then
        compadd -- ${(f)"$(_xenio_commands $program)"}
        return
    fi
    case $program:$before in
    tap-ctl:-p) compadd -- ${(f)"$(_xenio_disks pid)"} ;;
    tap-ctl:(-m|-e)) compadd -- ${(f)"$(_xenio_disks minor)"} ;;
    tap-ctl:(-a|-2))
        if compset -P 1 '[a-z0-9-]#:'; then
            _files
        else
            compadd -S '' -- {aio,sync,vhd,qcow,qcow2,vmdk,nbd,ram,x-chain,null}:
        fi
        ;;
    tap-ctl:--engine) compadd -- uring pool auto ;;
    tap-img:-(f|F|O)) compadd -- raw vhd qcow qcow2 vmdk ;;
    *)
        if [[ $words[CURRENT] == -* ]]; then
            compadd -- ${(f)"$(_xenio_options $program $command)"}
        else
            _files
        fi
        ;;
    esac
}

_xenio "$@"
