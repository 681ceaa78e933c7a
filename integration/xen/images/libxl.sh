# libxl of a release of Xen with the patches of libxl-patch/, for scenarios that say "# libxl: VERSION".
# shellcheck shell=bash

# What deps.sh installs for it.
# shellcheck disable=SC2034 # run.sh
LIBXL_PACKAGES=(
    build-essential autoconf autotools-dev bison flex acpica-tools pkg-config patch python3-dev python3-setuptools
    libncurses-dev libyajl-dev uuid-dev zlib1g-dev
)

# wants_libxl VERSION SCENARIO...: one of them does.
wants_libxl() {
    local version=$1 name
    shift
    for name in "$@"; do
        [ "$(header "$name" libxl)" != "$version" ] || return 0
    done
    return 1
}

# patched_libxl SCENARIO...: adds the folder with the one of the release that images are made of to LIBXL, if it is wanted.
patched_libxl() {
    wants_libxl "$XEN" "$@" || return 0
    artefact "libxl$XEN" build_libxl "$WORLD" "$HERE/images/libxl.sh" "$TOP/libxl-patch/$XEN"/*
    LIBXL+=("$artefact")
}

# build_libxl FOLDER: FOLDER/libxenlight.so.*, from the source of Debian's package. The other libraries that are made with
# it, because it is linked with them, are the same as the package's.
build_libxl() {
    local source=$1/source name
    fetch_xen_source "$1"
    apply_series "$source" "$source/debian/patches"
    apply_series "$source" "$TOP/libxl-patch/$XEN"
    (
        cd "$source" || exit
        cp /usr/share/misc/config.{guess,sub} .
        # Debian's changes ask for these; the build shall fetch nothing.
        export DEB_VERSION=$XEN DEB_MAINTAINER=testbed WGET=false GIT=false
        quiet "$CACHE/libxl.log" ./autogen.sh
        quiet "$CACHE/libxl.log" ./configure --prefix=/usr --disable-xen --disable-docs --disable-stubdom \
            --disable-ocamltools --disable-golang --disable-qemu-traditional --disable-seabios --disable-ovmf \
            --disable-pvshim --with-system-qemu=/usr/bin/qemu-system-x86_64
        quiet "$CACHE/libxl.log" make -C tools/include
        quiet "$CACHE/libxl.log" make -j "$(nproc)" -C tools/libs
    )
    name=$(basename "$(find "$source/tools/libs/light" -name 'libxenlight.so.4.*.*')")
    install -s "$source/tools/libs/light/$name" "$1/${name%.*}"
    rm -r "$source"
}

# fetch_xen_source FOLDER: FOLDER/source, as the package's archives have it. An own list of sources, because the host is of
# another release.
fetch_xen_source() {
    local apt=$1/apt list options
    mkdir -p "$apt"/{lists/partial,cache/archives/partial} "$1/source"
    list=$apt/sources.list
    echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(mirror) $SUITE main" >"$list"
    options=(-o "Dir::Etc::SourceList=$list" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$apt/lists"
        -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root)
    quiet "$CACHE/libxl.log" apt-get "${options[@]}" update
    # apt checks each archive against the signed index; it may say that the description is missing, which nobody needs.
    (cd "$apt" && apt-get "${options[@]}" source --download-only xen >"$CACHE/libxl.log" 2>&1) || true
    quiet "$CACHE/libxl.log" tar -x --strip-components=1 -C "$1/source" -f "$apt"/xen_*.orig.tar.xz
    quiet "$CACHE/libxl.log" tar -x -C "$1/source" -f "$apt"/xen_*.debian.tar.xz
    rm -r "$apt"
}

# apply_series SOURCE PATCHES: what the file "series" in PATCHES names.
apply_series() {
    local name
    while read -r name _; do
        case $name in '' | '#'*) continue ;; esac
        quiet "$CACHE/libxl.log" patch --silent --fuzz=0 -d "$1" -p1 -i "$2/$name"
    done <"$2/series"
}
