# The emulated machine: starts it, follows its events, ends it when it hangs.
# shellcheck shell=bash

LOGS=$CACHE/logs
PAYLOAD=$CACHE/payload
PASSED=0
FAILED=0
QEMU_PID=

# One run at a time: the next one may replace the images.
lock_cache() {
    mkdir -p "$CACHE"
    exec {LOCK}>"$CACHE/lock"
    flock --nonblock "$LOCK" || die "another testbed is running with $CACHE"
}

# prepare_machine SCENARIO...: the folders that dom0 mounts: what it runs (read-only) and where its logs go.
prepare_machine() {
    local program name
    rm -rf "$PAYLOAD" "$LOGS"
    mkdir -p "$PAYLOAD/bin" "$LOGS"
    cp -r "$HERE/dom0" "$HERE/scenarios" "$PAYLOAD/"
    for program in "${PROGRAMS[@]}"; do
        if [ -x "$BIN/$program" ]; then
            install -s "$BIN/$program" "$PAYLOAD/bin/"
        else
            say "warning: $BIN/$program is missing (cargo build --release makes it)"
        fi
    done
    for name in "${PARAMETERS[@]}"; do
        printf '%s=%q\n' "${name%%=*}" "${name#*=}"
    done >"$PAYLOAD/parameters"
    install -m 755 "$TOP/dist/hotplug/block-xenio" "$PAYLOAD/bin/"
    cp "$TOP/dist/systemd/xenio.sysusers" "$PAYLOAD/sysusers"
    # Libraries of several releases are told apart by their names.
    mkdir "$PAYLOAD/libxl"
    for name in "${LIBXL[@]}"; do
        cp "$name"/* "$PAYLOAD/libxl/"
    done
    cp "$TOP/README.md" "$PAYLOAD/"
    [ -z "$(of_kind service "$@")" ] || prepare_packages
    prepare_profile
    trap stop_qemu EXIT
}

# The Debian package with the programs under test, and one that is the same but newer.
prepare_packages() {
    local next=$PAYLOAD/next
    quiet "$CACHE/deb.log" make -C "$TOP" deb-files "BUILT=$BIN" "DEB_DIR=$PAYLOAD/deb"
    dpkg-deb --raw-extract "$PAYLOAD"/deb/xenio_*.deb "$next"
    sed -i 's/^Version: .*/&+next/' "$next/DEBIAN/control"
    dpkg-deb --build --root-owner-group "$next" "$PAYLOAD/deb/next.deb" >/dev/null
    rm -r "$next"
}

# of_kind KIND SCENARIO...: those that want a machine of this kind.
of_kind() {
    local kind=$1 name machine
    shift
    for name in "$@"; do
        machine=$(header "$name" machine)
        [ "${machine:-plain}" != "$kind" ] || echo "$name"
    done
}

# run_machine SCENARIO...: one boot for all that can share one; "# machine: KIND" asks for a boot of another kind.
run_machine() {
    local kind names
    for kind in plain service debian12 counted profiled; do
        mapfile -t names < <(of_kind "$kind" "$@")
        [ ${#names[@]} = 0 ] || boot_and_follow "$kind" "${names[@]}"
    done
}

# The CPU: PVH guests need SVM with nested paging, which "max" emulates. Xen 4.20 cannot start dom0 with its SMAP, and
# guests die early with its RDTSCP; QEMU's x2APIC stops a counted machine with "Bad icount read".
# "spec-ctrl=no" alone makes Xen switch FPU registers lazily, and with that the emulated machine mixes up vector
# registers between domains: wrong hashes, programs that crash (selftest-load shows it).
start_qemu() {
    local kind=$1 cpu dom0 boot=$BOOT disk=$DOM0 init=
    case $kind in
    plain | service | debian12)
        cpu=(-accel "tcg,thread=multi,tb-size=1024" -cpu max,-smap,-la57,-rdtscp,-umip,-x2apic)
        dom0=dom0_max_vcpus=2
        ;;&
    service)
        disk=$SERVICEDOM0
        init=testbed.init=systemd
        ;;
    debian12)
        boot=$BOOT12
        disk=$DEBIAN12DOM0
        ;;
    # One instruction is one nanosecond of the machine's time: figures that do not depend on the host. The CPU is one
    # that people have: on "max" the kernel copies byte by byte (FSRM), and every byte would count as an instruction.
    counted | profiled)
        cpu=(-accel tcg -icount "shift=0,sleep=off" -cpu Haswell-noTSX,-x2apic)
        dom0=dom0_max_vcpus=1
        ;;&
    profiled)
        cpu+=(-plugin "file=$COUNTER,out=$LOGS/counts")
        dom0+=" dom0_vcpus_pin"
        ;;
    esac
    exec {EVENTS}< <(exec "$WORLD/usr/lib64/ld-linux-x86-64.so.2" --library-path "$WORLD/usr/lib/x86_64-linux-gnu" \
        "$WORLD/usr/bin/qemu-system-x86_64" -L "$WORLD/usr/share/qemu" -L "$WORLD/usr/share/seabios" \
        "${cpu[@]}" -machine q35 -smp 2 -m 3072 \
        -no-reboot -nodefaults -no-user-config -display none -vga none \
        -chardev "file,id=console,path=$LOGS/console-$kind.log" -serial chardev:console \
        -chardev stdio,id=events,signal=off -serial chardev:events \
        -kernel "$boot/xen" \
        -append "dom0_mem=1280M,max:1280M com1=115200,8n1 console=com1 loglvl=warning \
guest_loglvl=warning ucode=no smt=0 spec-ctrl=no,eager-fpu $dom0" \
        -initrd "$boot/vmlinux console=hvc0 quiet mitigations=off $init,$boot/dom0.initrd" \
        -drive "file=$disk/disk.img,if=virtio,format=raw,cache=unsafe,snapshot=on" \
        -virtfs "local,path=$PAYLOAD,mount_tag=testbed,security_model=none,readonly=on" \
        -virtfs "local,path=$LOGS,mount_tag=out,security_model=none" \
        </dev/null 2>"$LOGS/qemu-$kind.log")
    QEMU_PID=$!
}

stop_qemu() {
    [ -z "$QEMU_PID" ] || kill -KILL "$QEMU_PID" 2>/dev/null || true
    QEMU_PID=
}

# host_limit KIND SCENARIO: seconds after which the machine has hung. The scenario's own limit is kept inside, in the
# machine's own time; this one also covers cleaning up.
host_limit() {
    local limit
    limit=$(($(header "$2" limit) + 150))
    case $1 in
    counted | profiled) echo $((limit * 4)) ;;
    *) echo "$limit" ;;
    esac
}

# boot_and_follow KIND SCENARIO...: every scenario named gets its line, also when the machine stops half way.
boot_and_follow() {
    local kind=$1 name limit end current='' todo=() line word rest
    shift
    todo=("$@")
    end=$((SECONDS + 2 * BOOT_LIMIT))
    for name in "$@"; do
        echo "$name $(header "$name" limit)"
        end=$((end + $(host_limit "$kind" "$name")))
    done >"$PAYLOAD/plan"
    say "booting Xen in QEMU ..."
    start_qemu "$kind"
    limit=$BOOT_LIMIT
    # All of Debian's own services start as well.
    [ "$kind" != service ] || limit=$((2 * BOOT_LIMIT))
    # Each event has to come in time, and all of them together.
    while [ $SECONDS -lt $end ] && IFS= read -r -t "$limit" -u "$EVENTS" line; do
        line=${line//$'\r'/}
        read -r word name rest <<<"$line"
        case $word in
        say) echo "    ${line#say }" ;;
        broken)
            say "dom0 could not be set up: $name $rest"
            break
            ;;
        ready)
            say "dom0 is up"
            limit=60
            ;;
        start)
            current=$name
            if speaks "$name"; then echo "scenario $name ..."; else printf 'scenario %s ... ' "$name"; fi
            limit=$(host_limit "$kind" "$name")
            ;;
        pass | fail)
            outcome "$word" "$name" "$rest"
            todo=("${todo[@]:1}")
            current=
            limit=60
            ;;
        end) break ;;
        esac
    done
    stop_qemu
    [ ${#todo[@]} = 0 ] || stopped "$kind" "$current" "${todo[@]}"
}

# A scenario marked "speaks" has something to show while it runs.
speaks() {
    [ -n "$(header "$1" speaks)" ]
}

# outcome pass|fail NAME "SECONDS [REASON]"
outcome() {
    local seconds reason
    read -r seconds reason <<<"$3"
    ! speaks "$2" || printf 'scenario %s ... ' "$2"
    if [ "$1" = pass ]; then
        echo "ok ($seconds s)"
        PASSED=$((PASSED + 1))
    else
        echo "FAILED ($seconds s): $reason"
        FAILED=$((FAILED + 1))
        sed 's/^/    /' "$LOGS/$2.log"
    fi
}

# stopped KIND CURRENT SCENARIO...: the machine ended or hung before these were through.
stopped() {
    local kind=$1 current=$2 name
    shift 2
    [ -z "$current" ] || echo "FAILED: the machine stopped or hung"
    for name in "$@"; do
        [ "$name" = "$current" ] || echo "scenario $name ... FAILED: not run, the machine had stopped or hung"
        FAILED=$((FAILED + 1))
    done
    echo "the end of the console ($LOGS/console-$kind.log):"
    tail -n 40 "$LOGS/console-$kind.log" | sed 's/^/    /'
    [ ! -s "$LOGS/qemu-$kind.log" ] || sed 's/^/    qemu: /' "$LOGS/qemu-$kind.log"
}

# report KEEP: the last line of a run; the exit status says the same.
report() {
    if [ "$FAILED" -gt 0 ] || [ -n "$1" ]; then
        say "logs: $LOGS"
    else
        rm -rf "$LOGS" "$PAYLOAD"
    fi
    echo "$PASSED passed, $FAILED failed"
    [ "$FAILED" = 0 ]
}
