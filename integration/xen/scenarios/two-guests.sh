# about: two busy guests share a read-only parent, and neither tapdisk reaches the other's guest; a second writer on an image is refused with the reason in the log
# limit: 300
qemu-img convert -f raw -O vpc "$SRV/small.raw" base.vhd
start_xenio
for n in 1 2; do
    vhd-util snapshot -n leaf$n.vhd -p base.vhd
    guest g$n pv "$(vhd xvda leaf$n.vhd)" <<'JOB'
set -e
mount -t ext4 /dev/xvda /mnt
cd /mnt
sha256sum -c SHA256SUMS >/dev/null
dd if=/dev/urandom of=new bs=1M count=16 2>/dev/null
sha256sum new >>SHA256SUMS
sync
echo "GUEST WROTE"
n=0
while [ ! -e /stop ] && [ ! -b /dev/xvdz ]; do
    dd if=/dev/urandom of=busy bs=64k count=16 conv=fsync 2>/dev/null
    n=$((n + 1))
done
cd /
umount /mnt
JOB
done
sha256sum base.vhd >parent
create g1 &
first=$!
create g2
wait $first
wait_console g1 'GUEST WROTE' 90
wait_console g2 'GUEST WROTE' 90

expect "the event channels' domains" "$(printf '%s\n' "$(domid g1)" "$(domid g2)" | sort -n | xargs)" event_channels

# refused NAME DISK: xl create fails and leaves what runs alone.
refused() {
    guest "$1" pv "$2" <<<'exit 1'
    ! timeout 60 xl create "$1.cfg" >"$1-create.log" 2>&1 || fail "a second writer was let in: $2"
    step "refused: $(grep -m 1 'hotplug-error\|script' "$1-create.log" || tail -n 1 "$1-create.log")"
}
: >"$HOTPLUG_LOG"
refused g3 "$(vhd xvda leaf1.vhd)"
[ -s "$HOTPLUG_LOG" ] || fail "the hotplug log is empty"
# Another name of the same file is not noticed by the script: the image's lock has to.
ln leaf1.vhd alias.vhd
: >"$HOTPLUG_LOG"
refused g4 "$(vhd xvda alias.vhd)"
grep -q -i -E 'alias\.vhd.*(use|lock)' "$HOTPLUG_LOG" || fail "the hotplug log does not say that alias.vhd is in use"
[ "$(pgrep -c -x tapdisk)" = 2 ] || fail "a refused guest's tapdisk is still there: $(pgrep -a -x tapdisk)"

cp "$SRV/small.raw" end.raw
for n in 1 2; do
    xl block-attach g$n "$(raw xvdz "$WORK/end.raw" ro)"
done
finish g1 60
finish g2 60
assert_nothing_left
sha256sum --check --quiet parent || fail "the shared parent has changed"
for n in 1 2; do
    read_chain leaf$n.raw leaf$n.vhd base.vhd
    verify_files leaf$n.raw
    vhd-util check -n leaf$n.vhd
done
