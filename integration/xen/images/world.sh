# Debian packages, unpacked: everything that dom0, the guests and the emulator are made of.
# shellcheck shell=bash

# The Debian that images are made of, and the Xen that it has. build_debian12 has others for its own.
SUITE=trixie
XEN=4.20
WORLD_PACKAGES=(
    # a minimal system
    base-files base-passwd bash bsdutils coreutils dash diffutils findutils grep gzip mawk mount procps sed tar
    util-linux
    # Xen's tools and the kernel of dom0 and the guests; Xen itself is chosen when it is unpacked
    xenstore-utils linux-image-amd64 kmod busybox-static
    # what scenarios use in dom0: a second opinion on VHD files, a load generator, the backend to compare with
    python3-libvhdi qemu-utils e2fsprogs fio qemu-system-xen
    # the emulator, for the host
    qemu-system-x86
)
GUEST_PACKAGES=(
    base-files base-passwd bash coreutils dash diffutils findutils grep mawk mount sed sysvinit-core util-linux
)

# The Debian mirror that this machine's apt uses.
mirror() {
    apt-get indextargets --format '$(REPO_URI) $(ORIGIN)/$(LABEL)' 'Created-By: Packages' |
        awk '$2 == "Debian/Debian" { print $1; exit }'
}

# unpack_debian FOLDER PACKAGE...: the packages with all they need, unpacked but not configured: nothing here runs a
# package's scripts, which would cost a minute for an initramfs and caches that the testbed does not use.
unpack_debian() {
    local folder=$1 from include
    shift
    from=$(mirror)
    [ -n "$from" ] || die "apt knows no Debian mirror: add one to /etc/apt and run 'apt-get update'"
    include=$(IFS=, && echo "$*")
    quiet "$CACHE/mmdebstrap.log" mmdebstrap --mode=root --variant=extract --format=directory --architectures=amd64 \
        --components=main --keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
        --aptopt='APT::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --setup-hook='cd "$1" && mkdir -p usr/bin usr/sbin usr/lib usr/lib64 &&
            ln -s usr/bin bin && ln -s usr/sbin sbin && ln -s usr/lib lib && ln -s usr/lib64 lib64' \
        --include="$include" "$SUITE" "$folder" "$from"
    # What the packages' scripts would have made and is needed here.
    ln -s mawk "$folder/usr/bin/awk"
    rm -rf "$folder"/var/{run,lock}
    ln -s /run "$folder/var/run"
    ln -s /run/lock "$folder/var/lock"
    cp "$folder/usr/share/base-passwd/passwd.master" "$folder/etc/passwd"
    cp "$folder/usr/share/base-passwd/group.master" "$folder/etc/group"
    ldconfig -r "$folder"
}

build_world() {
    unpack_debian "$1" "${WORLD_PACKAGES[@]}" "xen-hypervisor-$XEN-amd64" "xen-utils-$XEN"
    quiet "$CACHE/depmod.log" depmod --basedir "$1" "$(kernel_version "$1")"
}

build_guestworld() {
    unpack_debian "$1" "${GUEST_PACKAGES[@]}"
    rm -rf "$1"/usr/share/{locale,man,info,zoneinfo,i18n} "$1"/usr/lib/x86_64-linux-gnu/gconv
}
