//! The names of the XenStore keys of a block device.
//!
//! A device has two directories. The **backend's** is `/local/domain/<backend>/backend/<kind>/<frontend>/<vdev>`: the
//! toolstack fills in what the device is, the backend what it offers. The **frontend's** is the one that the backend's
//! [`FRONTEND`] key names; the guest owns it, so every value there may be anything.
//!
//! Numbers are decimal ASCII unless said otherwise; flags are `0` or `1`. Source: `blkif.h`, and for the keys of the
//! hotplug protocol libxl's `libxl_disk.c` and `libxl_device.c`.

/// Either directory: the end's [`XenbusState`](crate::XenbusState).
pub const STATE: &str = "state";

// ---- backend directory, written by the toolstack ----

/// Path of the frontend's directory.
pub const FRONTEND: &str = "frontend";
/// Domain id of the frontend.
pub const FRONTEND_ID: &str = "frontend-id";
/// Flag: 0 asks the backend to remove the device when it is closed.
pub const ONLINE: &str = "online";
/// What to serve: `<format>:<path>` for the backends of kind `vbd3` and `qdisk`.
pub const PARAMS: &str = "params";
/// `w` or `r` as first character: whether the guest may write.
pub const MODE: &str = "mode";
/// `disk` or `cdrom`.
pub const DEVICE_TYPE: &str = "device-type";
/// The device's name in the guest, such as `xvda`.
pub const DEV: &str = "dev";
/// Kind of backend; some frontends insist on its presence.
pub const TYPE: &str = "type";
/// Flag: the medium can be taken out.
pub const REMOVABLE: &str = "removable";
/// Flag: the guest boots from it.
pub const BOOTABLE: &str = "bootable";
/// Flag: 0 forbids offering discard.
pub const DISCARD_ENABLE: &str = "discard-enable";
/// Flag: the file's pages are not referenced after an O_DIRECT transfer has completed.
pub const DIRECT_IO_SAFE: &str = "direct-io-safe";
/// How long to look for requests before sleeping, in microseconds (XenServer's key); 0: never.
pub const POLLING_DURATION: &str = "polling-duration";
/// Do not look for requests while the host's processors are idle for less than this share, in percent (XenServer's key).
pub const POLLING_IDLE_THRESHOLD: &str = "polling-idle-threshold";
/// Path of the hotplug script.
pub const SCRIPT: &str = "script";
/// Outcome of the hotplug script, `connected` or `error`.
pub const HOTPLUG_STATUS: &str = "hotplug-status";
/// The hotplug script's message.
pub const HOTPLUG_ERROR: &str = "hotplug-error";
/// The host's block device as `<major>:<minor>` in hexadecimal, from the hotplug script.
pub const PHYSICAL_DEVICE: &str = "physical-device";
/// Path of the host's block device, from the hotplug script.
pub const PHYSICAL_DEVICE_PATH: &str = "physical-device-path";

// ---- backend directory, published by the backend ----

/// Flag: WRITE_BARRIER is served.
pub const FEATURE_BARRIER: &str = "feature-barrier";
/// Flag: FLUSH_DISKCACHE is served.
pub const FEATURE_FLUSH_CACHE: &str = "feature-flush-cache";
/// Flag: DISCARD is served.
pub const FEATURE_DISCARD: &str = "feature-discard";
/// Smallest unit of a discard, in bytes.
pub const DISCARD_GRANULARITY: &str = "discard-granularity";
/// Offset of the first unit of a discard, in bytes.
pub const DISCARD_ALIGNMENT: &str = "discard-alignment";
/// Flag: a discard with the secure flag is honoured.
pub const DISCARD_SECURE: &str = "discard-secure";
/// Either directory: grants are kept mapped and used again.
pub const FEATURE_PERSISTENT: &str = "feature-persistent";
/// Most segments of an INDIRECT request; absent: INDIRECT is not served.
pub const FEATURE_MAX_INDIRECT_SEGMENTS: &str = "feature-max-indirect-segments";
/// Largest ring, as an order of pages.
pub const MAX_RING_PAGE_ORDER: &str = "max-ring-page-order";
/// Largest ring in pages: the older spelling of [`MAX_RING_PAGE_ORDER`].
pub const MAX_RING_PAGES: &str = "max-ring-pages";
/// Most rings of one device.
pub const MULTI_QUEUE_MAX_QUEUES: &str = "multi-queue-max-queues";
/// Size of the disk in 512-byte sectors.
pub const SECTORS: &str = "sectors";
/// Logical block size in bytes.
pub const SECTOR_SIZE: &str = "sector-size";
/// Physical block size in bytes.
pub const PHYSICAL_SECTOR_SIZE: &str = "physical-sector-size";
/// Sum of [`info`] bits.
pub const INFO: &str = "info";

/// The bits of [`INFO`] (`VDISK_*`).
pub mod info {
    /// The device is a CD-ROM drive.
    pub const CDROM: u32 = 1;
    /// The medium can be taken out.
    pub const REMOVABLE: u32 = 2;
    /// Writes are refused.
    pub const READONLY: u32 = 4;
}

// ---- frontend directory ----

/// The ring's grant reference, when it has one page and the key [`RING_PAGE_ORDER`] is absent. With a number behind it
/// (`ring-ref0`, `ring-ref1`...) that of one page of several.
pub const RING_REF: &str = "ring-ref";
/// The guest's unbound event channel port for us.
pub const EVENT_CHANNEL: &str = "event-channel";
/// Name of the entries' layout, see [`Abi::from_protocol_key`](crate::Abi::from_protocol_key).
pub const PROTOCOL: &str = "protocol";
/// Size of the ring as an order of pages.
pub const RING_PAGE_ORDER: &str = "ring-page-order";
/// Size of the ring in pages: the older spelling of [`RING_PAGE_ORDER`].
pub const NUM_RING_PAGES: &str = "num-ring-pages";
/// Number of rings; with more than one their keys stand in folders [`queue`].
pub const MULTI_QUEUE_NUM_QUEUES: &str = "multi-queue-num-queues";
/// Flag: the frontend counts sectors in units of `sector-size`.
pub const FEATURE_LARGE_SECTOR_SIZE: &str = "feature-large-sector-size";
/// The device's number.
pub const VIRTUAL_DEVICE: &str = "virtual-device";
/// Path of the backend's directory.
pub const BACKEND: &str = "backend";
/// Domain id of the backend.
pub const BACKEND_ID: &str = "backend-id";

/// The folder of one ring's keys inside the frontend's directory, when it has several; counted from 0.
pub fn queue(number: u32) -> String {
    format!("queue-{number}")
}
