/*
 * Prints the layouts and numbers of the public headers as "name value" lines, for comparison with the Rust crates.
 *
 * Needs linux-libc-dev (xen/gntdev.h, xen/evtchn.h) and libxen-dev (the rest).
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <xen/xen.h>
#include <xen/grant_table.h>
#include <xen/io/ring.h>
#include <xen/io/xenbus.h>
#include <xen/io/blkif.h>
#include <xen/io/protocols.h>

#include <sys/ioctl.h>
#include <xen/gntdev.h>
#include <xen/evtchn.h>

/* The 32-bit x86 layout: the same declarations with 64-bit fields aligned to 4. */
#define blkif_request blkif32_request
#define blkif_request_segment blkif32_request_segment
#define blkif_request_discard blkif32_request_discard
#define blkif_request_indirect blkif32_request_indirect
#define blkif_response blkif32_response
#define blkif_request_t blkif32_request_t
#define blkif_request_discard_t blkif32_request_discard_t
#define blkif_request_indirect_t blkif32_request_indirect_t
#define blkif_response_t blkif32_response_t
#define blkif_sring blkif32_sring
#define blkif_sring_t blkif32_sring_t
#define blkif_sring_entry blkif32_sring_entry
#define blkif_front_ring blkif32_front_ring
#define blkif_front_ring_t blkif32_front_ring_t
#define blkif_back_ring blkif32_back_ring
#define blkif_back_ring_t blkif32_back_ring_t
#undef __XEN_PUBLIC_IO_BLKIF_H__
#pragma pack(push, 4)
#include <xen/io/blkif.h>
#pragma pack(pop)
#undef blkif_request
#undef blkif_response
#undef blkif_sring

static void number(const char *name, long long value)
{
    printf("%s %lld\n", name, value);
}

static void bytes(const char *name, const void *data, size_t size)
{
    const unsigned char *byte = data;

    printf("%s ", name);
    for (size_t i = 0; i < size; i++)
        printf("%02x", byte[i]);
    printf("\n");
}

/* The same field values as in the Rust test. */
#define FILL_REQUEST(r)                                          \
    do {                                                         \
        memset(&(r), 0, sizeof(r));                              \
        (r).operation = BLKIF_OP_WRITE;                          \
        (r).nr_segments = 11;                                    \
        (r).handle = 0x1234;                                     \
        (r).id = 0x1122334455667788ULL;                          \
        (r).sector_number = 0x99aabbccddeeff00ULL;               \
        for (int i = 0; i < 11; i++) {                           \
            (r).seg[i].gref = 0xa0b0c0d0u + i;                   \
            (r).seg[i].first_sect = i % 8;                       \
            (r).seg[i].last_sect = 7;                            \
        }                                                        \
    } while (0)

#define FILL_RESPONSE(r)                                         \
    do {                                                         \
        memset(&(r), 0, sizeof(r));                              \
        (r).id = 0x1122334455667788ULL;                          \
        (r).operation = BLKIF_OP_FLUSH_DISKCACHE;                \
        (r).status = BLKIF_RSP_EOPNOTSUPP;                       \
    } while (0)

int main(void)
{
    struct blkif_request native;
    struct blkif32_request packed;
    struct blkif_response response;
    struct blkif32_response packed_response;
    struct gntdev_grant_copy_segment from_guest, to_guest;

    FILL_REQUEST(native);
    FILL_REQUEST(packed);
    bytes("request_x86_64", &native, sizeof(native));
    bytes("request_x86_32", &packed, sizeof(packed));
    FILL_RESPONSE(response);
    FILL_RESPONSE(packed_response);
    bytes("response_x86_64", &response, sizeof(response));
    bytes("response_x86_32", &packed_response, sizeof(packed_response));

    number("ring_header", offsetof(struct blkif_sring, ring));
    number("req_prod", offsetof(struct blkif_sring, req_prod));
    number("req_event", offsetof(struct blkif_sring, req_event));
    number("rsp_prod", offsetof(struct blkif_sring, rsp_prod));
    number("rsp_event", offsetof(struct blkif_sring, rsp_event));
    for (int order = 0; order <= 4; order++) {
        char name[32];

        snprintf(name, sizeof(name), "slots_x86_64_%d", order);
        number(name, __CONST_RING_SIZE(blkif, 4096 << order));
        snprintf(name, sizeof(name), "slots_x86_32_%d", order);
        number(name, __CONST_RING_SIZE(blkif32, 4096 << order));
    }

    number("op_read", BLKIF_OP_READ);
    number("op_write", BLKIF_OP_WRITE);
    number("op_barrier", BLKIF_OP_WRITE_BARRIER);
    number("op_flush", BLKIF_OP_FLUSH_DISKCACHE);
    number("op_discard", BLKIF_OP_DISCARD);
    number("op_indirect", BLKIF_OP_INDIRECT);
    number("max_segments", BLKIF_MAX_SEGMENTS_PER_REQUEST);
    number("okay", BLKIF_RSP_OKAY);
    number("error", BLKIF_RSP_ERROR);
    number("not_supported", BLKIF_RSP_EOPNOTSUPP);
    number("info_cdrom", VDISK_CDROM);
    number("info_removable", VDISK_REMOVABLE);
    number("info_readonly", VDISK_READONLY);

    number("state_unknown", XenbusStateUnknown);
    number("state_initialising", XenbusStateInitialising);
    number("state_initwait", XenbusStateInitWait);
    number("state_initialised", XenbusStateInitialised);
    number("state_connected", XenbusStateConnected);
    number("state_closing", XenbusStateClosing);
    number("state_closed", XenbusStateClosed);
    number("state_reconfiguring", XenbusStateReconfiguring);
    number("state_reconfigured", XenbusStateReconfigured);

    printf("protocol_x86_64 %s\n", XEN_IO_PROTO_ABI_X86_64);
    printf("protocol_x86_32 %s\n", XEN_IO_PROTO_ABI_X86_32);
    printf("protocol_arm %s\n", XEN_IO_PROTO_ABI_ARM);

    number("gntdev_map", IOCTL_GNTDEV_MAP_GRANT_REF);
    number("gntdev_unmap", IOCTL_GNTDEV_UNMAP_GRANT_REF);
    number("gntdev_copy", IOCTL_GNTDEV_GRANT_COPY);
    number("gntdev_map_index", offsetof(struct ioctl_gntdev_map_grant_ref, index));
    number("gntdev_map_refs", offsetof(struct ioctl_gntdev_map_grant_ref, refs));
    number("gntdev_ref_domid", offsetof(struct ioctl_gntdev_grant_ref, domid));
    number("gntdev_ref_ref", offsetof(struct ioctl_gntdev_grant_ref, ref));
    number("gntdev_unmap_count", offsetof(struct ioctl_gntdev_unmap_grant_ref, count));
    number("gntdev_copy_segments", offsetof(struct ioctl_gntdev_grant_copy, segments));

    memset(&from_guest, 0, sizeof(from_guest));
    from_guest.source.foreign.ref = 0x11223344;
    from_guest.source.foreign.offset = 0x0a00;
    from_guest.source.foreign.domid = 0x0506;
    from_guest.dest.virt = (void *)0x7788;
    from_guest.len = 512;
    from_guest.flags = GNTCOPY_source_gref;
    from_guest.status = GNTST_bad_gntref;
    bytes("copy_from_guest", &from_guest, sizeof(from_guest));
    memset(&to_guest, 0, sizeof(to_guest));
    to_guest.dest.foreign.ref = 0x11223344;
    to_guest.dest.foreign.offset = 0x0a00;
    to_guest.dest.foreign.domid = 0x0506;
    to_guest.source.virt = (void *)0x7788;
    to_guest.len = 512;
    to_guest.flags = GNTCOPY_dest_gref;
    to_guest.status = GNTST_bad_gntref;
    bytes("copy_to_guest", &to_guest, sizeof(to_guest));

    number("evtchn_bind", IOCTL_EVTCHN_BIND_INTERDOMAIN);
    number("evtchn_unbind", IOCTL_EVTCHN_UNBIND);
    number("evtchn_notify", IOCTL_EVTCHN_NOTIFY);
    number("evtchn_reset", IOCTL_EVTCHN_RESET);
    number("evtchn_restrict", IOCTL_EVTCHN_RESTRICT_DOMID);
    number("evtchn_bind_domain", offsetof(struct ioctl_evtchn_bind_interdomain, remote_domain));
    number("evtchn_bind_port", offsetof(struct ioctl_evtchn_bind_interdomain, remote_port));
    return 0;
}
