# about: xentop shows what a guest does with its disk, tap-ctl for how long, and nothing stays behind a crash
# limit: 180
truncate -s 16M disk.raw
start_xenio
guest g1 pv "$(raw xvda "$WORK/disk.raw")" <<'JOB'
set -e
dd if=/dev/zero of=/dev/xvda bs=64k count=160 oflag=direct 2>/dev/null
dd if=/dev/xvda of=/dev/null bs=64k count=96 iflag=direct 2>/dev/null
echo "GUEST USED xvda"
read -r _ </dev/hvc0
JOB
create g1
wait_console g1 'GUEST USED xvda' 60
domid=$(xl domid g1)
locate

# xentop -b -x: after a domain's line one for each of its disks, with requests and sectors.
xentop -b -x -f -i 2 -d 1 | tee xentop.txt
line=$(grep -a 'VBD Tapdisk3 51712' xentop.txt | tail -n 1) || fail "xentop does not show the disk"
# number NAME: what stands behind it.
number() {
    sed "s/.* $1: *\([0-9]*\).*/\1/" <<<"$line"
}
# 10 MiB written, 6 MiB read, and what the guest's kernel has read of its own accord.
[ "$(number WSECT)" = 20480 ] || fail "xentop shows other sectors written than 20480: $line"
rsect=$(number RSECT)
{ [ "$rsect" -ge 12288 ] && [ "$rsect" -lt 14336 ]; } || fail "xentop shows other sectors read than 12288: $line"
[ "$(number WR)" -ge 40 ] || fail "xentop shows too few writes: $line"

tap-ctl stats -p "$pid" -m "$minor" --full | tee stats.json
grep -q '"write":{[^}]*"p99_us":[1-9]' stats.json || fail "tap-ctl tells no time for writes"

file=/dev/shm/td3-$pid/vbd-$domid-51712
[ "$(stat -c '%a %s' "$file")" = '600 4096' ] || fail "$file has another mode or length"
kill -KILL "$pid"
within 10 "removal of the crashed tapdisk's statistics" test ! -e "${file%/*}"
xl destroy g1
