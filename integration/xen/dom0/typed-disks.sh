# Formats that libxl does not know yet: it is told "raw", and the ending of the file's name says the format.
# shellcheck shell=bash

SCRIPTS=/etc/xen/scripts

# typed_disks: from now on, in this scenario, block-tap is upstream's behind a few lines that put the format right.
typed_disks() {
    cp -p "$SCRIPTS/block-tap" "$SCRIPTS/block-tap-upstream"
    cat >"$WORK/block-tap" <<'END'
#!/bin/bash
set -e
params=$(xenstore-read "$XENBUS_PATH/params")
case $params in
aio:*.qcow | aio:*.qcow2 | aio:*.vmdk) xenstore-write "$XENBUS_PATH/params" "${params##*.}:${params#aio:}" ;;
esac
exec /etc/xen/scripts/block-tap-upstream "$@"
END
    chmod 755 "$WORK/block-tap"
    mount --bind "$WORK/block-tap" "$SCRIPTS/block-tap"
    trap untyped_disks EXIT
}

untyped_disks() {
    umount "$SCRIPTS/block-tap" || true
    rm -f "$SCRIPTS/block-tap-upstream"
}
