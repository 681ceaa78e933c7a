# about: instructions by symbol (Xen, kernels, tapdisk) and request; BACKENDS="blkback xenio" and JOBS="rr4k_qd1 ..." choose
# extra: only on request
# speaks: yes
# machine: profiled
# limit: 1200
. /testbed/dom0/bench.sh
modprobe xen-blkback
modprobe null_blk nr_devices=1 irqmode=0 queue_mode=2 bs=512
echo 0 >/proc/sys/kernel/randomize_va_space
cat /proc/xen/xensyms >/out/xensyms
install -m 755 /testbed/profile/mark /usr/sbin/mark
fio_guests /usr/sbin/mark
start_xenio

# What stands for a job: fio's options, and how many requests its short and its long run have.
job() {
    case $1 in
    rr4k_qd1) echo "--rw=randread --bs=4k --iodepth=1 512 2560" ;;
    rr4k_qd32) echo "--rw=randread --bs=4k --iodepth=32 2048 10240" ;;
    rw4k_qd32) echo "--rw=randwrite --bs=4k --iodepth=32 2048 10240" ;;
    sr1m_qd4) echo "--rw=read --bs=1m --iodepth=4 16 144" ;;
    sw1m_qd4) echo "--rw=write --bs=1m --iodepth=4 16 144" ;;
    *) fail "there is no job '$1'" ;;
    esac
}

# profile BACKEND DISK: two runs of each job; what the longer one needs more than the shorter one is what requests cost.
profile() {
    local name options=() script
    script=$(
        echo 'set -e; echo 0 >/proc/sys/kernel/randomize_va_space'
        echo "sed -n '/\[xen_blkfront\]/s/^/SYMBOL /p' /proc/kallsyms"
        echo 'run() { n=$1; shift; fio --minimal --name=job --filename=/dev/xvda --direct=1 --ioengine=libaio --thread --randseed=1 --size=1g --number_ios=$n "$@" >/dev/null; mark; }'
        for name in $JOBS; do
            read -r -a options <<<"$(job "$name")"
            # The first run fills caches and the grants that stay mapped.
            echo "run ${options[3]} ${options[*]:0:3}; run ${options[3]} ${options[*]:0:3}; run ${options[4]} ${options[*]:0:3}"
        done
    )
    guest "$1" pv "$2" <<<"$script"
    create "$1"
    wait_console "$1" 'GUEST UP' 60
    case $1 in
    blkback) ;;
    qdisk) cp "/proc/$(pgrep -f 'qemu-system.*xenpv.*-xen-domid [1-9]')/maps" "/out/$1.maps" ;;
    *)
        within 20 "a tapdisk" pgrep -x tapdisk
        cp "/proc/$(pgrep -x tapdisk)/maps" "/out/$1.maps"
        ;;
    esac
    finish_quietly "$1" 600
    tr -d '\r' <"$CONSOLES/guest-$1.log" | sed -n 's/^SYMBOL //p' >/out/guest.symbols
    for name in $JOBS; do
        read -r -a options <<<"$(job "$name")"
        echo "$1 $name $((options[4] - options[3]))" >>/out/profile.plan
    done
}

: "${BACKENDS:=blkback xenio}" "${JOBS:=rr4k_qd1 rr4k_qd32 sr1m_qd4}"
for backend in $BACKENDS; do
    case $backend in
    blkback) disk="format=raw,backendtype=phy,vdev=xvda,access=rw,target=/dev/nullb0" ;;
    qdisk) disk="format=raw,backendtype=qdisk,vdev=xvda,access=rw,target=/dev/nullb0" ;;
    xenio) disk=$(raw xvda /dev/nullb0) ;;
    *) fail "there is no backend '$backend'" ;;
    esac
    GUEST_CPUS=1 profile "$backend" "$disk"
    echo "$backend done" | tell
done
cat /proc/kallsyms >/out/kallsyms
