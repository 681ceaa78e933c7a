# about: images that cannot be used: xl create fails soon and names the file, the logs say why, nothing is left
# limit: 240
start_xenio
make_bad() {
    case $1 in
    missing) ;;
    zero-size) : >zero-size.vhd ;;
    corrupt-header)
        qemu-img convert -f raw -O vpc "$SRV/small.raw" corrupt-header.vhd
        # The dynamic header follows the first copy of the footer; its first bytes are its cookie.
        printf 'XXXXXXXX' | dd of=corrupt-header.vhd bs=1 seek=512 conv=notrunc status=none
        ;;
    parent-missing)
        vhd-util create -n lost.vhd -s 16
        vhd-util snapshot -n parent-missing.vhd -p lost.vhd
        rm lost.vhd
        ;;
    circle)
        vhd-util create -n circle.vhd -s 16
        vhd-util snapshot -n two.vhd -p circle.vhd
        vhd-util snapshot -n three.vhd -p two.vhd
        cp three.vhd circle.vhd
        ;;
    esac
}

# refused CASE REASON: the reason is a pattern for the hotplug log and for tapdisk's own.
refused() {
    local file=$WORK/$1.vhd started
    make_bad "$1"
    : >"$HOTPLUG_LOG"
    rm -f /var/log/xen/tapdisk.log
    guest "$1" pv "$(vhd xvda "$1.vhd")" <<<'exit 1'
    started=$SECONDS
    ! timeout 60 xl create "$1.cfg" >"$1-create.log" 2>&1 || fail "$1: the guest was created"
    [ $((SECONDS - started)) -lt 15 ] || fail "$1: xl create took $((SECONDS - started)) s"
    grep -q -F "$file" "$1-create.log" || fail "$1: xl create does not name the file: $(cat "$1-create.log")"
    grep -q -i -E "$1\.vhd.*($2)" "$HOTPLUG_LOG" || fail "$1: the hotplug log does not say '$2': $(cat "$HOTPLUG_LOG")"
    grep -q -i -E "$2" /var/log/xen/tapdisk.log || fail "$1: tapdisk's log does not say '$2'"
    assert_nothing_left
    step "$1: $(grep -m 1 -F "$file" "$1-create.log")"
    grep -m 1 '^tap-ctl' "$HOTPLUG_LOG" || true
}
refused missing 'no such file'
refused zero-size '0 bytes'
refused corrupt-header 'header|cookie'
refused parent-missing 'lost\.vhd'
refused circle 'loop|cycle|itself|twice'
kill -0 "$XENIO_PID" || fail "xenio has ended"
