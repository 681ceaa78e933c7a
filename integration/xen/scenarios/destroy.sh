# about: xl destroy of a busy guest and a guest's crash, ten times in a row, leave nothing behind
# limit: 420
start_xenio
job_of() {
    cat <<JOB
mount -t ext4 /dev/xvda /mnt || exit 1
(while true; do dd if=/dev/zero of=/mnt/busy bs=64k count=64 conv=fsync 2>/dev/null; echo >>/rounds; done) &
while [ ! -s /rounds ]; do usleep 20000; done
echo "GUEST BUSY"
$1
JOB
}
for round in 1 2 3 4 5 6 7 8 9 10; do
    name=g$round
    qemu-img convert -f raw -O vpc "$SRV/small.raw" disk.vhd
    if [ $((round % 2)) = 1 ]; then end='sleep 600'; else end='echo c >/proc/sysrq-trigger'; fi
    guest $name pv "$(vhd xvda disk.vhd)" < <(job_of "$end")
    create $name
    wait_console $name 'GUEST BUSY' 60
    if [ $((round % 2)) = 1 ]; then
        started=$SECONDS
        xl destroy $name >destroy.log 2>&1 || fail "xl destroy: $(cat destroy.log)"
        [ $((SECONDS - started)) -lt 9 ] || fail "xl destroy waited for the backend until its time was over"
        ! grep -i error destroy.log || fail "xl destroy complained"
    else
        within 30 "end of the crashed guest" gone $name
        ! grep -i 'error' "/var/log/xen/xl-$name.log" || fail "xl complained about the crashed guest's devices"
    fi
    assert_nothing_left
    step "round $round: nothing left"
    vhd-util check -n disk.vhd
done
kill -0 "$XENIO_PID" || fail "xenio has ended"
