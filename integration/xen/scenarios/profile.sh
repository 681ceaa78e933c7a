# about: instructions by symbol (Xen, kernels, tapdisk) and request, for each of ROWS and JOBS
# extra: only on request
# speaks: yes
# machine: profiled
# limit: 1200
. /testbed/dom0/bench.sh
: "${ROWS:=blkback xenio-raw}" "${JOBS:=rr4k_qd1 rr4k_qd32 sr1m_qd4}"
# Two runs of a job: what the longer one needs more than the shorter one is what requests cost.
declare -A SHORT=([rr4k_qd1]=512 [rr4k_qd32]=2048 [rw4k_qd32]=2048 [sr1m_qd4]=16 [sw1m_qd4]=16)
declare -A LONG=([rr4k_qd1]=2560 [rr4k_qd32]=10240 [rw4k_qd32]=10240 [sr1m_qd4]=144 [sw1m_qd4]=144)

guest_job() {
    local name run
    echo 'set -e; echo 0 >/proc/sys/kernel/randomize_va_space'
    echo "sed -n '/\[xen_blkfront\]/s/^/SYMBOL /p' /proc/kallsyms"
    for name in $JOBS; do
        run="$(fio_command) $(fio_job "$name") >/dev/null --number_ios"
        # The first run fills caches, and the guest's set of grants that stay mapped.
        echo "$run=${SHORT[$name]}; mark; $run=${SHORT[$name]}; mark; $run=${LONG[$name]}; mark"
    done
}

# Where the process that serves the disk has its programs.
save_mappings() {
    case $1 in
    blkback*) : >"/out/$1.maps" ;;
    qdisk*) cat "/proc/$(pgrep -f 'qemu-system.* -xen-domid [1-9]')/maps" >"/out/$1.maps" ;;
    *)
        within 20 "a tapdisk" pgrep -x tapdisk
        cat "/proc/$(pgrep -x tapdisk)/maps" >"/out/$1.maps"
        ;;
    esac
}

# profile NAME
profile() {
    local disk type options name
    row "$1"
    guest_job | GUEST_CPUS=1 GUEST_CMDLINE=$options guest "$1" "$type" "$disk"
    create "$1"
    wait_console "$1" 'GUEST UP' 60
    save_mappings "$1"
    finish_quietly "$1" 600
    tr -d '\r' <"$CONSOLES/guest-$1.log" | sed -n 's/^SYMBOL //p' >/out/guest.symbols
    row_done
    for name in $JOBS; do
        echo "$1 $name $((LONG[$name] - SHORT[$name]))" >>/out/profile.plan
    done
    echo "$1 done" | tell
}

echo 0 >/proc/sys/kernel/randomize_va_space
cat /proc/xen/xensyms >/out/xensyms
install -m 755 /testbed/profile/mark /usr/sbin/mark
bench_setup /usr/sbin/mark
for name in $ROWS; do
    profile "$name"
done
cat /proc/kallsyms >/out/kallsyms
