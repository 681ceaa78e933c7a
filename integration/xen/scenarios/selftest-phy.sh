# about: the testbed itself, with the kernel's blkback
# extra: only on request
# limit: 120
modprobe xen-blkback
cp "$SRV/small.raw" disk.raw
loop=$(losetup -f --show --direct-io=on disk.raw)
guest g1 pv "format=raw,backendtype=phy,vdev=xvda,access=rw,target=$loop" <<'JOB'
set -e
mount -t ext4 /dev/xvda /mnt
cd /mnt && sha256sum -c SHA256SUMS >/tmp/sums && wc -l /tmp/sums
cd / && umount /mnt
JOB
create g1
finish g1 60
losetup -d "$loop"
