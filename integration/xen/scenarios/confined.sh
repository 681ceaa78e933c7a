# about: a tapdisk has its own user and no rights, its porter refuses what is none of its business, and folders bound what it opens
# limit: 300
. /testbed/dom0/busy-guest.sh
passwd=/etc/passwd
cleanup() {
    rm -f /etc/xenio/disk-folders
    [ ! -e $passwd.whole ] || mv $passwd.whole $passwd
}
trap cleanup EXIT
# of PID KEY: what the kernel says of a process.
of() {
    sed -n "s/^$2:[[:space:]]*//p" "/proc/$1/status" | tr '\t' ' '
}
porter_of() {
    pgrep -x tapdisk-porter -P "$1" || fail "tapdisk $1 has no porter"
}
# confined PID: it is nobody of importance.
confined() {
    local key id=$user
    expect "the user of tapdisk $1" "$id $id $id $id" of "$1" Uid
    id=$group
    expect "the group of tapdisk $1" "$id $id $id $id" of "$1" Gid
    expect "more groups of tapdisk $1" '' of "$1" Groups
    for key in CapInh CapPrm CapEff CapBnd CapAmb; do
        expect "$key of tapdisk $1" 0000000000000000 of "$1" $key
    done
    expect "NoNewPrivs of tapdisk $1" 1 of "$1" NoNewPrivs
    expect "Seccomp of tapdisk $1" 2 of "$1" Seccomp
    porter_of "$1" >/dev/null
}

user=$(id -u xenio-tapdisk)
group=$(id -g xenio-tapdisk)
[ "$user" != 0 ] || fail "tapdisks have no user of their own"
mkdir -p images elsewhere
qemu-img convert -f raw -O vpc "$SRV/small.raw" images/parent.vhd
vhd-util snapshot -n images/disk.vhd -p images/parent.vhd
cp "$SRV/small.raw" images/second.raw
cp "$SRV/small.raw" elsewhere/other.raw
chmod 700 images elsewhere
chmod 600 images/* elsewhere/*
start_xenio
until_second_disk | guest g1 pv "$(vhd xvda images/disk.vhd)"
create g1
wait_console g1 'GUEST TICK' 60
locate /disk.vhd
confined "$pid"
porter=$(porter_of "$pid")
expect "the porter's user" '0 0 0 0' of "$porter" Uid
expect "the porter's system calls" 2 of "$porter" Seccomp
[ "$(readlink /proc/"$pid"/fd/* | grep -c '^/dev/xen/gntdev$')" -ge 1 ] || fail "the tapdisk maps no grants"
tap-ctl create -a "aio:$WORK/elsewhere/other.raw"
disk=("$pid" "$porter" "$WORK/images/disk.vhd" "$minor" "$(domid g1)")
locate /other.raw
confined "$pid"

step "errands that are none of its business"
python3 /testbed/dom0/attack-porter.py "${disk[@]}" "$pid" "$minor" "$WORK/elsewhere/other.raw" || fail "a porter does what it must not"
goes_on "the attack"
tap-ctl destroy -p "$pid" -m "$minor"

step "a snapshot, the end of the porter, an upgrade and a crash"
locate /disk.vhd
tap-ctl snapshot -p "$pid" -m "$minor" -a "vhd:$WORK/images/child.vhd"
goes_on "a snapshot"
kill -KILL "$porter"
goes_on "the end of the porter"
mkdir -p /etc/xenio
echo "$WORK/images" >/etc/xenio/disk-folders
tap-ctl upgrade --all
goes_on "an upgrade"
locate /child.vhd
confined "$pid"
kill -KILL "$(pgrep -x tapdisk)"
goes_on "a crash"
locate /child.vhd
confined "$pid"

step "folders"
! tap-ctl create -a "aio:$WORK/elsewhere/other.raw" 2>refused.log || fail "an image elsewhere was opened"
step "$(cat refused.log)"
grep -q 'Permission denied.*disk-folders' refused.log || fail "the reason is not told"
! tap-ctl snapshot -p "$pid" -m "$minor" -a "vhd:$WORK/elsewhere/child.vhd" 2>refused.log || fail "a snapshot was made elsewhere"
step "$(cat refused.log)"
goes_on "a snapshot that was refused"
rm /etc/xenio/disk-folders

step "a host without the user"
cp $passwd $passwd.whole
sed -i /^xenio-tapdisk:/d $passwd
tap-ctl create -a "aio:$WORK/elsewhere/other.raw"
locate /other.raw
expect "the user of a tapdisk that finds none" '0 0 0 0' of "$pid" Uid
! pgrep -x tapdisk-porter -P "$pid" || fail "a tapdisk with root's rights has a porter"
grep "tapdisk\[$pid\].*xenio-tapdisk" /var/log/xen/tapdisk.log || fail "the log does not say that there is no user"
tap-ctl destroy -p "$pid" -m "$minor"
mv $passwd.whole $passwd

xl block-attach g1 "$(raw xvdb "$WORK/images/second.raw")"
finish g1 60
assert_nothing_left
vhd-util check -n images/child.vhd
