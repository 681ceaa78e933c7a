# about: debug
# extra: y
# limit: 180
cp "$SRV/small.raw" file.raw
start_xenio
guest g1 pv "$(raw xvda "$WORK/file.raw")" <<'JOB'
dmesg | grep -i blkfront
dd if=/dev/xvda of=/dev/null bs=1M count=8 iflag=direct
echo "GUEST USED xvda"
sleep 5
JOB
create g1
wait_console g1 'GUEST USED xvda' 60
xenstore-ls -f /local/domain | grep -E "persist|indirect|queue|ring|flush"
P=$(pgrep -x tapdisk)
grep -c xen/gntdev /proc/$P/maps || true
finish g1 60
cat "$CONSOLES/guest-g1.log" | grep -a -i -E "blkfront|error" || true
cat /var/log/xen/tapdisk.log || true
cat $XENIO_LOG | tail -40
ls /var/log/xen
fail x
