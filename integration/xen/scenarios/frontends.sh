# about: guests that use persistent grants, indirect segments and larger rings, or not; each moves checked data
# limit: 300
. /testbed/dom0/fio.sh
# What the driver is loaded with, and what it then says: persistent grants, indirect segments, ring order.
VARIANTS=(
    "feature_persistent=1 max_indirect_segments=32 max_ring_page_order=0:enabled enabled 0"
    "feature_persistent=0 max_indirect_segments=256 max_ring_page_order=4:disabled enabled 4"
    "feature_persistent=1 max_indirect_segments=11 max_ring_page_order=2:enabled disabled 2"
    "feature_persistent=0 max_indirect_segments=11 max_ring_page_order=0:disabled disabled 0"
    # Persistent grants for every segment of every slot: 256 segments of 512 slots would not fit into the guest.
    "feature_persistent=1 max_indirect_segments=64 max_ring_page_order=3:enabled enabled 3"
)
truncate -s 48M disk.raw
start_xenio
with_fio
{
    echo 'set -e'
    for variant in "${VARIANTS[@]}"; do
        cat <<JOB
# The driver is busy for a moment after its last device has gone.
until rmmod xen_blkfront 2>/dev/null; do usleep 50000; done
dmesg -c >/dev/null
insmod /modules/xen-blkfront.ko ${variant%:*}
echo "GUEST READY ${variant%:*}"
while [ ! -b /dev/xvda ]; do usleep 20000; done
dmesg | sed -n 's/.*blkfront: xvda: .*persistent grants: \([a-z]*\); indirect descriptors: \([a-z]*\).*/\1 \2/p' >/seen
$(verified xvda 48)
echo "GUEST SUM \$(dd if=/dev/xvda bs=1M iflag=direct 2>/dev/null | sha256sum | cut -c 1-64) \$(cat /seen)"
while [ -b /dev/xvda ]; do usleep 20000; done
JOB
    done
} >job
guest g1 pv <job
create g1
for variant in "${VARIANTS[@]}"; do
    wait_console g1 "GUEST READY ${variant%:*}" 60
    xl block-attach g1 "$(raw xvda "$WORK/disk.raw")"
    read -r persistent indirect order <<<"${variant#*:}"
    # The console has the lines of all variants: this is the newest.
    sums=$((${sums:-0} + 1))
    has_sums() { [ "$(grep -a -c 'GUEST SUM' "$CONSOLES/guest-g1.log")" = $sums ] || says g1 "$GUEST_TROUBLE"; }
    within 90 "checked data with ${variant%:*}" has_sums
    ! says g1 "$GUEST_TROUBLE" || fail "$(said g1 "$GUEST_TROUBLE")"
    line=$(grep -a 'GUEST SUM' "$CONSOLES/guest-g1.log" | tail -n 1 | tr -d '\r')
    step "${variant%:*}: $line"
    read -r _ _ sum grants segments <<<"$line"
    [ "$grants $segments" = "$persistent $indirect" ] ||
        fail "${variant%:*}: grants $grants and segments $segments instead of $persistent and $indirect"
    [ "$sum" = "$(sha256sum <disk.raw | cut -c 1-64)" ] || fail "${variant%:*}: the guest reads another disk than dom0"
    seen=$(frontend g1 xvda ring-page-order)
    [ "${seen:-0}" = "$order" ] || fail "${variant%:*}: ring order ${seen:-0} instead of $order"
    expect "the frontend's feature-persistent" "$([ "$persistent" = enabled ] && echo 1 || echo 0)" \
        frontend g1 xvda feature-persistent
    expect "the backend's state" 4 backend g1 xvda state
    xl block-detach g1 xvda
done
finish g1 30
assert_nothing_left
