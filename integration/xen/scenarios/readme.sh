# about: the commands of the README's ten minutes in dom0, as they stand there
# limit: 240
commands=$(sed -n '/^## Ten minutes/,/^### /s/^       \([^ ]\)/\1/p' /testbed/README.md | sed 's/  *# .*//')
: >used

# readme BEGINNING [IMAGE]: executes the README's command that begins so; PID and MINOR are those of the image's disk.
readme() {
    local command pid=PID minor=MINOR
    command=$(grep -m 1 "^$1" <<<"$commands") || fail "the README does not say '$1'"
    echo "$command" >>used
    if [ "${2-}" ]; then
        locate ":$2"
    fi
    command=${command//PID/$pid}
    step "$command"
    eval "timeout 60 ${command//MINOR/$minor}"
}
cleanup() {
    rm -f /srv/{debian,debian-2,base,guest1,data}.vhd
}
trap cleanup EXIT

start_xenio
readme 'vhd-util create '
vhd-util check -n /srv/debian.vhd
mv /srv/debian.vhd /srv/data.vhd
qemu-img convert -f raw -O qcow2 "$SRV/small.raw" disk.qcow2
readme 'tap-img convert '
tap-img compare -f qcow2 -F vhd disk.qcow2 /srv/debian.vhd

disk=$(sed -n "s/^disk = \['\(.*\)'\]$/\1/p" <<<"$commands")
guest guest pv "$disk" <<'JOB'
set -e
mount -t ext4 /dev/xvda /mnt
(cd /mnt && sha256sum -c SHA256SUMS >/dev/null)
echo "GUEST VERIFIED"
while [ ! -b /dev/xvdb ]; do usleep 50000; done
old=$(cat /sys/block/xvdb/size)
echo "GUEST HAS $old"
while [ "$(cat /sys/block/xvdb/size)" = "$old" ]; do usleep 50000; done
echo "GUEST SEES $(cat /sys/block/xvdb/size)"
while [ -b /dev/xvdb ]; do usleep 50000; done
dd if=/dev/urandom of=/mnt/new bs=1M count=2 conv=fsync 2>/dev/null
umount /mnt
JOB
readme 'xl create '
wait_console guest 'GUEST VERIFIED' 60
readme 'tap-ctl list'

cp /srv/debian.vhd /srv/base.vhd
readme 'vhd-util snapshot '
readme 'vhd-util query '
tap-img compare -f vhd -F vhd /srv/base.vhd /srv/guest1.vhd

readme 'tap-ctl snapshot ' /srv/debian.vhd
sha256sum /srv/debian.vhd >parent
readme 'xl block-attach '
wait_console guest 'GUEST HAS 20971520' 30
readme 'tap-ctl resize ' /srv/data.vhd
wait_console guest 'GUEST SEES 41943040' 30
readme 'xl block-detach '
finish guest 60
assert_nothing_left
sha256sum --check --quiet parent || fail "the image under the snapshot has changed"
for image in /srv/*.vhd; do
    vhd-util check -n "$image"
done

# Installing has a scenario of its own.
missing=$(grep -v -E '^(make|systemctl|disk) ' <<<"$commands" | grep -v -x -F -f used || true)
[ -z "$missing" ] || fail "commands of the README that nothing executes: $missing"
