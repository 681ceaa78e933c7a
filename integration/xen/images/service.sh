# A dom0 as an administrator has it: Debian installed in full, with systemd and its package database, for scenarios that
# say "# machine: service".
# shellcheck shell=bash

SERVICE_PACKAGES=(
    xen-utils-4.20 xenstore-utils systemd-sysv kmod busybox-static procps qemu-utils e2fsprogs iproute2
)

build_servicedom0() {
    local root=$1/root include from version
    version=$(kernel_version "$WORLD")
    from=$(mirror)
    include=$(IFS=, && echo "${SERVICE_PACKAGES[*]}")
    quiet "$CACHE/mmdebstrap-service.log" mmdebstrap --mode=root --variant=apt --format=directory --architectures=amd64 \
        --components=main --keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
        --aptopt='APT::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --include="$include" "$SUITE" "$root" "$from"
    # The host may have no way to the mirror from inside, and the scenario needs none.
    rm -rf "$root"/etc/apt/sources.list* "$root"/var/lib/apt/lists/* "$root"/usr/share/{locale,man,info}
    copy_modules "$root" "$version"
    mkdir -p "$root"/{testbed,out,srv/testbed}
    cp "$BOOT/vmlinux" "$BOOT/guest.initrd" "$FIXTURES"/*.* "$root/srv/testbed/"
    echo testbed >"$root/etc/hostname"
    mkdir -p "$root/var/log/xen/console"
    echo 'XENCONSOLED_ARGS="--log=guest --log-dir=/var/log/xen/console"' >>"$root/etc/default/xen"
    # The scenarios are a service of this system, beside its own.
    install -D -m 644 "$HERE/images/testbed.service" "$root/etc/systemd/system/testbed.service"
    mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
    ln -s ../testbed.service "$root/etc/systemd/system/multi-user.target.wants/testbed.service"
    # Without udev the console's device unit never comes up, and the boot would wait 90 s for it.
    ln -s /dev/null "$root/etc/systemd/system/serial-getty@hvc0.service"
    ln -s /dev/null "$root/etc/systemd/system/proc-sys-fs-binfmt_misc.automount"
    make_ext4 "$root" "$1/disk.img" 3G -O '^has_journal'
    rm -r "$root"
}
