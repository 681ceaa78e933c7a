# about: the tapdisks of a raw, a VHD and a qcow2 disk are killed every 2 s while fio checks what it writes; KILLING=seconds of it
# limit: 560
. /testbed/dom0/fio.sh
. /testbed/dom0/typed-disks.sh
: "${KILLING:=60}"
typed_disks
truncate -s 32M disk.raw
vhd-util create -n disk.vhd -s 32
qemu-img create -q -f qcow2 disk.qcow2 32M
start_xenio
with_fio
guest g1 pv "$(raw xvda "$WORK/disk.raw")" "$(vhd xvdb disk.vhd)" "$(raw xvdc "$WORK/disk.qcow2")" <<JOB
set -e
(read -r go </dev/console; touch /stop) &
busy() {
    round=0
    while [ ! -e /stop ]; do
        round=\$((round + 1))
        fio --minimal --name=verified --filename=/dev/\$1 --direct=1 --ioengine=libaio --thread --iodepth=8 --rw=randrw \
            --bsrange=4k-256k --size=32m --io_size=16m --fsync=32 --verify=crc32c --verify_fatal=1 --randseed=\$round \
            >/tmp/\$1.log 2>&1 || { cat /tmp/\$1.log; touch /failed; return; }
        # The longest time of a read and of a write in us (fio's HOWTO, "Terse output").
        echo "GUEST ROUND \$1 \$round WAITED \$(tail -n 1 /tmp/\$1.log | cut -d ';' -f 15,56)"
    done
}
for disk in xvda xvdb xvdc; do busy \$disk & busy="\$busy \$!"; done
wait \$busy
[ ! -e /failed ]
if dmesg | grep -i -E 'I/O error|xenbus.*error|blkfront.*(error|failed)'; then exit 1; fi
JOB
rounds() {
    grep -a -c "GUEST ROUND $1" "$CONSOLES/guest-g1.log" || true
}
more_rounds() {
    ! says g1 "$GUEST_TROUBLE" || fail "guest g1: $(said g1 "$GUEST_TROUBLE")"
    for disk in xvda xvdb xvdc; do
        [ "$(rounds $disk)" -gt "${seen[$disk]}" ] || return 1
    done
}
create g1
wait_console g1 'GUEST ROUND' 90
kills=0
ends=$((SECONDS + KILLING))
while [ $SECONDS -lt $ends ]; do
    pids=$(pgrep -x tapdisk | tr '\n' ' ')
    # shellcheck disable=SC2086
    for pid in $pids; do
        # One that is just being started, which takes seconds here, has served nothing yet: deaths without progress are another matter.
        grep -q "tapdisk\[$pid\]: serving" /var/log/xen/tapdisk.log || continue
        kill -KILL "$pid" && kills=$((kills + 1))
    done
    read -r -t 2 <> <(:) || true
done
step "killed $kills tapdisks in $KILLING s"
[ $kills -ge $((KILLING / 4)) ] || fail "only $kills tapdisks were there to be killed"
declare -A seen
for disk in xvda xvdb xvdc; do seen[$disk]=$(rounds $disk); done
within 90 "another round on each disk" more_rounds
waited=$(grep -a -o 'WAITED [0-9;]*' "$CONSOLES/guest-g1.log" | tr -c '0-9\n' '\n' | sort -n | tail -n 1)
step "the longest time of a request in the guest: $((waited / 1000)) ms"
step "rounds: raw $(rounds xvda), VHD $(rounds xvdb), qcow2 $(rounds xvdc)"
type_to g1 stop
finish g1 90
assert_nothing_left
vhd-util check -n disk.vhd
# Status 3: clusters that nothing refers to, which is what a stopped process may leave, and no errors.
qemu-img check -q -f qcow2 disk.qcow2 || [ $? = 3 ]
