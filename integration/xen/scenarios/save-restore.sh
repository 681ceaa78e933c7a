# about: checkpoint, save and restore of a PV guest that writes and verifies all the time
# limit: 300
. /testbed/dom0/busy-guest.sh
busy_guest pv

before=$(domid g1)
timeout 60 xl save -c g1 saved
goes_on "a checkpoint"
expect "the domain's number" "$before" domid g1

timeout 60 xl save g1 saved
within 20 "end of the saved domain" gone g1
assert_nothing_left
timeout 60 xl restore saved
goes_on "save and restore"

finish_busy_guest
