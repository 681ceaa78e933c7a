# about: a guest's disks come from another domain, where xenio reaches XenStore by the kernel and xl devd runs the scripts
# extra: make test-full
# limit: 900
. /testbed/dom0/driver-domain.sh
mkdir images mnt
qemu-img convert -f raw -O vpc "$SRV/small.raw" images/first.vhd
cp "$SRV/small.raw" images/second.raw
truncate -s 192M store.raw
mke2fs -q -F -t ext4 -d images store.raw
start_xenio
(
    with_driver_tools
    driver_domain store "$(raw xvda "$WORK/store.raw")"
)
create store
wait_console store 'GUEST SERVES AS DOMAIN' 90
expect "the number that the driver domain sees" "GUEST SERVES AS DOMAIN $(domid store)" said store 'GUEST SERVES'

# from_store FORMAT VDEV FILE
from_store() {
    echo "backendtype=tap,backend=store,format=$1,vdev=$2,access=rw,target=/srv/$3"
}
guest g1 pv "$(from_store vhd xvda first.vhd)" <<'JOB'
set -e
for disk in xvda xvdb; do
    echo "GUEST WAITS FOR $disk"
    while [ ! -b /dev/$disk ]; do usleep 50000; done
    mount -t ext4 /dev/$disk /mnt
    (cd /mnt && sha256sum -c SHA256SUMS >/dev/null)
    dd if=/dev/urandom of=/mnt/new bs=1M count=4 2>/dev/null
    (cd /mnt && sha256sum new >>SHA256SUMS)
    umount /mnt
    echo "GUEST USED $disk"
done
read -r go
while [ -b /dev/xvdb ]; do usleep 50000; done
JOB
create g1
wait_console g1 'GUEST USED xvda' 150
timeout 60 xl block-attach g1 "$(from_store raw xvdb second.raw)"
wait_console g1 'GUEST USED xvdb' 150
[ "$(pgrep -c -x tapdisk)" = 1 ] || fail "dom0 serves more than the driver domain: $(pgrep -a -x tapdisk)"
xenstore-control quota "$(domid store)"
type_to g1 go
timeout 60 xl block-detach g1 xvdb
finish g1 90

step "a guest that is destroyed while it writes"
guest g2 pv "$(from_store vhd xvda first.vhd)" <<'JOB'
while true; do dd if=/dev/xvda of=/dev/xvda bs=64k oflag=direct 2>/dev/null; echo "GUEST GOES ON"; done
JOB
create g2
wait_console g2 'GUEST GOES ON' 240
timeout 60 xl destroy g2

step "the driver domain ends"
type_to store end
finish store 90
assert_nothing_left
mount -o loop store.raw mnt
vhd-util check -n mnt/first.vhd
raw_of mnt/first.vhd first.raw
verify_files first.raw || fail "the first disk's files"
cp mnt/second.raw .
umount mnt
verify_files second.raw || fail "the second disk's files"
