# about: a guest that writes and verifies all the time migrates to the same host, twice; then it is suspended and resumed
# limit: 420
. /testbed/dom0/busy-guest.sh
# A domain that arrives has another name until the one that leaves is gone; it is the same guest.
ln -s guest-g1.log "$CONSOLES/guest-g1--incoming.log"
# Xen marks what a PV guest dirties in shadow page tables, which Debian's Xen is built without: so a PVH guest.
busy_guest pvh

one_domain() {
    [ "$(xl list | grep -c '^g1')" = 1 ]
}
# What xl starts to reach the other host: here it is the same one.
cat >here <<'END'
#!/bin/bash
shift
exec "$@"
END
chmod 755 here
for n in 1 2; do
    before=$(domid g1)
    timeout 90 xl migrate -s "$WORK/here" g1 localhost >migrate.log 2>&1 || fail "xl migrate"
    within 20 "one domain" one_domain
    [ "$(domid g1)" != "$before" ] || fail "the guest has not moved"
    goes_on "migration $n"
    [ "$(pgrep -c -x tapdisk)" = 2 ] || fail "not two tapdisks for two disks: $(pgrep -a -x tapdisk)"
done

timeout 30 xl suspend g1
seen=$(ticks)
timeout 30 xl resume g1
goes_on "suspend and resume"

finish_busy_guest
