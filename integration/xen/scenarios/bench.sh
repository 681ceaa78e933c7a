# about: instruction-counted IOPS of xenio, blkback and qdisk, for each of ROWS
# extra: "make bench-xen"
# speaks: yes
# machine: counted
# limit: 1200
. /testbed/dom0/bench.sh
: "${ROWS:=blkback blkback-copy qdisk xenio-raw xenio-copy xenio-raw-ram xenio-vhd xenio-raw-file qdisk-raw-file xenio-vhd-file}"
JOBS="rr4k_qd1 rr4k_qd32 rw4k_qd32 sr1m_qd4 sw1m_qd4"

# How many requests: fio computes from milliseconds, so every job takes a few hundred of them.
requests() {
    case $1 in
    rr4k_qd1) echo 4096 ;;
    *_qd32) echo 8192 ;;
    *) echo 256 ;;
    esac
}

# measure NAME: a row of the table, which the host makes the comparison from.
measure() {
    local disk type options job result
    row "$1"
    # Terse version 3: the eighth field is read IOPS, the forty-ninth write IOPS.
    for job in $JOBS; do
        echo "$(fio_command) $(fio_job "$job") --number_ios=$(requests "$job") >/tmp/$job"
        echo "echo IOPS $job \$(awk -F ';' '{ print \$8 + \$49 }' /tmp/$job)"
    done >job
    { echo 'set -e' && cat job; } | GUEST_CMDLINE=$options guest "$1" "$type" "$disk"
    create "$1" >/dev/null
    finish_quietly "$1" 300 >/dev/null
    result=$(tr -d '\r' <"$CONSOLES/guest-$1.log" | awk '$1 == "IOPS" { printf " %d", $3 }')
    row_done
    echo "$1$result" >>/out/bench.rows
    # shellcheck disable=SC2086
    printf '%-18s %9s %9s %9s %9s %9s\n' "$1" $result | tell
}

bench_setup
# shellcheck disable=SC2086
printf '%-18s %9s %9s %9s %9s %9s\n' IOPS $JOBS | tell
for name in $ROWS; do
    measure "$name"
done
