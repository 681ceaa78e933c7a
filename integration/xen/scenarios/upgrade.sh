# about: tapdisk is replaced by another release under a busy guest, which does not notice
# limit: 300
. /testbed/dom0/busy-guest.sh
program=/usr/libexec/xenio/tapdisk
busy_guest pv
for round in 1 2 3; do
    old=$(pgrep -x tapdisk | tr '\n' ' ')
    # As a package manager does it: another file under the same name.
    cp $program $program.new
    mv $program.new $program
    tap-ctl upgrade --all
    new=$(pgrep -x tapdisk | tr '\n' ' ')
    step "upgrade $round: tapdisks $old-> $new"
    [ "$(pgrep -c -x tapdisk)" = 2 ] || fail "there are other tapdisks than one for each disk: $new"
    for pid in $new; do
        [[ " $old" != *" $pid "* ]] || fail "tapdisk $pid is still there"
        [ "$(stat -L -c %i "/proc/$pid/exe")" = "$(stat -c %i $program)" ] || fail "tapdisk $pid is of the old release"
    done
    goes_on "upgrade $round"
done
finish_busy_guest
