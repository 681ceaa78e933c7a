# about: access=ro: the guest reads, its writes fail, the images keep their bytes
# limit: 120
qemu-img convert -f raw -O vpc "$SRV/small.raw" disk.vhd
cp "$SRV/small.raw" disk.raw
sha256sum disk.vhd disk.raw >before
start_xenio
guest g1 pv "$(vhd xvda disk.vhd ro)" "$(raw xvdb "$WORK/disk.raw" ro)" <<'JOB'
for disk in xvda xvdb; do
    [ "$(cat /sys/block/$disk/ro)" = 1 ] || { echo "$disk is writable"; exit 1; }
    mount -t ext4 -o ro,noload /dev/$disk /mnt || exit 1
    (cd /mnt && sha256sum -c SHA256SUMS >/dev/null) || exit 1
    umount /mnt
    if dd if=/dev/zero of=/dev/$disk bs=4096 count=1 conv=fsync 2>/tmp/dd; then
        echo "$disk took a write"
        exit 1
    fi
    echo "GUEST REFUSED: $(head -n 1 /tmp/dd)"
done
JOB
create g1
finish g1 60
assert_nothing_left
sha256sum --check --quiet before || fail "a read-only image has changed"
