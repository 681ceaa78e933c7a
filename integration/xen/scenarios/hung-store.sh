# about: a store stops answering: the guest waits, it is told of, others go on; then it answers, and then it is given up
# limit: 300
export DM_DISABLE_UDEV=1
modprobe dm-mod
truncate -s 64M backing.raw
loop=$(losetup -f --show --direct-io=off backing.raw)
dmsetup create store --table "0 131072 linear $loop 0"
store=/dev/mapper/store
cp "$SRV/small.raw" good.raw
start_xenio
guest g1 pv "$(raw xvda "$WORK/good.raw")" "$(raw xvdb "$store")" <<'JOB'
set -e
mount -t ext4 /dev/xvda /mnt
(while true; do
    dd if=/dev/urandom of=/dev/xvdb bs=64k count=4 conv=fsync 2>/dev/null || echo "GUEST FAILED: an error"
    echo >>/rounds
done) &
while [ ! -s /rounds ]; do usleep 50000; done
echo "GUEST BUSY"
read -r go
dd if=/dev/urandom of=/mnt/new bs=64k count=16 conv=fsync 2>/dev/null
echo "GUEST USED THE OTHER DISK"
before=$(wc -l </rounds)
read -r go
while [ "$(wc -l </rounds)" -lt $((before + 3)) ]; do usleep 50000; done
echo "GUEST GOES ON"
read -r go
JOB
create g1
wait_console g1 'GUEST BUSY' 60
locate "$store"

dmsetup suspend --noflush --nolockfs store
late() { tap-ctl stats -p "$pid" -m "$minor" --full | grep -q '"late":[1-9]'; }
within 30 "a late request in the statistics" late
step "$(tap-ctl stats -p "$pid" -m "$minor" --full | grep -o '"late":[0-9]*\|"oldest":{[^}]*}\|"store":{[^}]*}' | tr '\n' ' ')"
grep -q "tapdisk\[$pid\].*the store has not answered for 1[0-9] s" /var/log/xen/tapdisk.log || fail "it is not in the log"
code=0
tap-ctl pause -p "$pid" -m "$minor" -t 1 2>pause.log || code=$?
[ $code = 110 ] || fail "pause: exit code $code"
step "$(cat pause.log)"
type_to g1 go
wait_console g1 'GUEST USED THE OTHER DISK' 30
[ "$(tap-ctl list | wc -l)" = 2 ] || fail "tap-ctl list: $(tap-ctl list)"
dmsetup resume store
type_to g1 go
wait_console g1 'GUEST GOES ON' 60
grep -q "tapdisk\[$pid\].*the store answers again, after" /var/log/xen/tapdisk.log || fail "its end is not in the log"
[ "$(grep -c "the store has not answered" /var/log/xen/tapdisk.log)" = 1 ] || fail "it was told more than once"

dmsetup suspend --noflush --nolockfs store
flying() { tap-ctl stats -p "$pid" -m "$minor" | grep -q '"reqs_outstanding": [1-9]'; }
within 20 "requests in flight" flying
# libxl waits for ten seconds, and leaves the tapdisk behind.
timeout 60 xl destroy g1 >destroy.log 2>&1 || true
step "xl destroy: $(tr '\n' ' ' <destroy.log)"
code=0
tap-ctl destroy -p "$pid" -m "$minor" -f -t 1 2>force.log || code=$?
step "by force: exit code $code: $(cat force.log)"
case $code in
0) ;;
# The kernel may keep all of a killed process until its storage has answered; so long the command says that it is not done (EBUSY).
16) grep -q 'was killed, and stays until its storage' force.log || fail "the reason is not told" ;;
*) fail "by force: exit code $code" ;;
esac
! tap-ctl create -a "aio:$store" 2>again.log || fail "the image was opened while a dead process writes to it"
step "$(cat again.log)"
grep -q -E 'dead process in flight|is in use by' again.log || fail "the reason is not told"
dmsetup resume store
given_up() { tap-ctl destroy -p "$pid" -m "$minor" -f; }
[ $code = 0 ] || within 20 "the removal by force" given_up
opens() { tap-ctl create -a "aio:$store" >/dev/null 2>&1; }
within 20 "the image's opening" opens
locate "$store"
tap-ctl destroy -p "$pid" -m "$minor"
within 20 "end of guest g1" gone g1
assert_nothing_left
dmsetup remove store
losetup -d "$loop"
