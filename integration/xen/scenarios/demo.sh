# about: what an administrator sees: a guest on a VHD, from its configuration to its end
# extra: "make demo"
# speaks: yes
# limit: 300
title() {
    printf '\n=== %s\n' "$*" | tell
}

cp "$SRV/files.vhd" files.vhd
title "the image, made by qemu-img from a filesystem with 2500 files"
vhd-util query -n files.vhd -v -s | paste -sd ' ' | sed 's/\(.*\) \(.*\)/virtual size \1 MiB, file size \2 bytes/' | tell
title "start the backend: xenio"
xenio -p /run/xenio.pid
guest demo pv "$(vhd xvda files.vhd)" <<'JOB'
set -e
uname -sr
cat /proc/partitions
mount -t ext4 /dev/xvda /mnt
cd /mnt
for dir in d*[0-9]; do
    grep " $dir/" SHA256SUMS | sha256sum -c >/tmp/sums || { grep -v ': OK$' /tmp/sums; exit 1; }
    cat /tmp/sums >>/tmp/all
    case $dir in *9) echo "verified $(wc -l </tmp/all) files" ;; esac
done
[ "$(wc -l </tmp/all)" = "$(wc -l <SHA256SUMS)" ]
dd if=/dev/urandom of=new bs=1M count=16 2>/dev/null
sha256sum new >>SHA256SUMS
cd /
umount /mnt
echo "wrote 16 MiB more"
JOB
title "xl create demo.cfg"
tell <demo.cfg
create demo >/dev/null
title "xl list"
xl list | tell
title "tap-ctl list"
tap-ctl list | tell
wait_console demo 'GUEST UP' 60 >/dev/null
node=$BACKEND/$(domid demo)/51712
connected() {
    [ "$(xenstore-read "$node/state")" = 4 ]
}
within 30 "the disk's connection" connected
title "XenStore: what libxl, block-tap and xenio agreed on in $node"
xenstore-ls "$node" | tell
finish demo 120 >/dev/null
title "the guest's own console"
tr -d '\r' <"$CONSOLES/guest-demo.log" | grep -a -v -E '^\[|^$' | tell
assert_nothing_left
title "afterwards, in dom0: no process, marker, socket or XenStore node is left; qemu-img reads the guest's work"
raw_of files.vhd files.raw
verify_files files.raw | tell
kill "$(cat /run/xenio.pid)"
