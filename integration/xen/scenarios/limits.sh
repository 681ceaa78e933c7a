# about: a guest sees the limit of its disk within 5 percent, and its end
# limit: 240
truncate -s 8M disk.raw
vhd-util create -n disk.vhd -s 8
start_xenio
guest g1 pv "$(raw xvda "$WORK/disk.raw")" "$(vhd xvdb disk.vhd)" <<'JOB'
set -e
for disk in xvda xvdb; do
    dd if=/dev/zero of=/dev/$disk bs=1M count=8 oflag=direct 2>/dev/null
    echo "GUEST READS $disk"
    slow=
    while :; do
        # In hundredths of a second.
        start=$(cut -d ' ' -f 1 /proc/uptime | tr -d .)
        dd if=/dev/$disk of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null
        took=$(($(cut -d ' ' -f 1 /proc/uptime | tr -d .) - start))
        echo "GUEST TOOK $disk $took"
        [ $took -lt 600 ] || slow=yes
        [ -z "$slow" ] || [ $took -gt 400 ] || break
    done
    echo "GUEST FREE $disk"
done
JOB
create g1

# limit FILE OPTION...: tells the tapdisk of the file.
limit() {
    local pid minor file=$1
    shift
    locate "/$file"
    tap-ctl limit -p "$pid" -m "$minor" "$@"
}

for disk in 'xvda disk.raw' 'xvdb disk.vhd'; do
    set -- $disk
    wait_console g1 "GUEST READS $1" 90
    # 4 MiB in 8 seconds.
    limit "$2" --bps 512K --burst-bps 64K
    wait_console g1 "GUEST TOOK $1 (7[6-9][0-9]|8[0-3][0-9])[[:space:]]*\$" 60
    limit "$2" --bps 0
    wait_console g1 "GUEST FREE $1" 60
done
finish g1 60
assert_nothing_left
