//! What a disk has done since it was opened, pauses not counted as an end.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ImageSpec, Latencies, Limits, RingEntry};

/// The statistics of an open disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// The leaf.
    pub image: ImageSpec,
    /// It is paused.
    #[serde(default)]
    pub paused: bool,
    /// Sectors of 512 bytes moved for frontends.
    pub sectors: ReadWrite,
    /// Requests served for frontends, whatever came of them.
    #[serde(default)]
    pub requests: ReadWrite,
    /// How long they took.
    #[serde(default)]
    pub latency: Latencies,
    /// Requests in flight, of frontends and of NBD clients.
    pub outstanding: u64,
    /// Requests that are never answered, because the disk was stopped.
    #[serde(default)]
    pub held: u64,
    /// Age of the oldest request in flight, in milliseconds.
    #[serde(default)]
    pub oldest_ms: Option<u64>,
    /// Requests in flight for longer than [`LATE`]: the store does not answer.
    #[serde(default)]
    pub late: u64,
    /// The oldest request in flight.
    #[serde(default)]
    pub oldest: Option<OldestRequest>,
    /// The oldest operation that the system has not ended, of those on files and devices.
    #[serde(default)]
    pub store: Option<StoreOperation>,
    /// How often a frontend had requests and had to wait, because the limits did not allow them yet.
    #[serde(default)]
    pub throttled: u64,
    /// What it may do in a second.
    #[serde(default)]
    pub limit: Limits,
    /// The frontends.
    pub rings: Vec<RingStats>,
    /// What the disk itself tells.
    pub disk: DiskStats,
}

/// How long a request may be in flight before it is late.
pub const LATE: Duration = Duration::from_secs(10);

/// A request that was not answered yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldestRequest {
    /// Milliseconds since it was taken.
    pub age_ms: u64,
    /// `read`, `write`, `flush`, `discard` or another word.
    pub operation: String,
    /// Its first sector.
    pub sector: u64,
    /// Its sectors of 512 bytes; of one whose segments were not looked at yet, as many as there may be at most.
    pub sectors: u64,
    /// Who asks.
    pub by: String,
}

/// An operation on a file or a device that was not ended yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreOperation {
    /// Milliseconds since it was started.
    pub age_ms: u64,
    /// `read`, `write`, `fdatasync` or another word.
    pub operation: String,
    /// Byte position.
    pub offset: u64,
    /// Bytes; 0 for an operation on the whole file.
    pub bytes: u64,
    /// The file, if it has a name.
    pub file: String,
}

/// What a disk tells of its images. Those of a paused disk are not known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStats {
    /// The images, the leaf first.
    pub images: Vec<ImageStats>,
    /// The secondary image.
    #[serde(default)]
    pub mirror: Option<MirrorStats>,
    /// The secondary image that waits, or has waited, for the first to be full.
    #[serde(default)]
    pub standby: Option<StandbyStats>,
    /// A read cache.
    #[serde(default)]
    pub cache: Option<CacheStats>,
    /// The local read cache.
    #[serde(default)]
    pub local_cache: Option<LocalCacheStats>,
}

/// A number for reads, and one for writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadWrite {
    /// For reads.
    pub read: u64,
    /// For writes.
    pub write: u64,
}

/// An image of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStats {
    /// Which.
    pub image: ImageSpec,
    /// Sectors that were found in it, and written to it.
    pub hits: ReadWrite,
    /// Transfers that failed.
    pub fail: ReadWrite,
}

/// A frontend: all its rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingStats {
    /// Which.
    pub entry: RingEntry,
    /// Its rings.
    pub queues: u64,
    /// Requests taken.
    pub taken: u64,
    /// Requests answered.
    pub answered: u64,
    /// Notifications heard.
    pub kicked: u64,
    /// Notifications sent.
    pub kicks: u64,
    /// Requests refused because they make no sense.
    pub malformed: u64,
    /// Requests answered with an error.
    pub failed: u64,
}

/// The state of a secondary image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorStats {
    /// Bytes of the disk that both images are known to agree on.
    pub copied: u64,
    /// Bytes of the disk.
    pub total: u64,
    /// Why it gets no more writes, if so.
    pub failed: Option<String>,
    /// It has had something to do for so many milliseconds and has finished nothing: guests' writes wait for it.
    #[serde(default)]
    pub stuck_ms: Option<u64>,
}

/// The state of a standby image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandbyStats {
    /// Which.
    pub image: ImageSpec,
    /// It has taken over: all writes go there.
    pub serving: bool,
    /// Bytes that guests have written to it since the disk was opened.
    pub written: u64,
}

/// The state of a read cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheStats {
    /// Sectors found in it.
    pub hits: u64,
    /// Sectors that were not.
    pub misses: u64,
    /// Bytes it holds.
    pub bytes: u64,
    /// Bytes it may hold.
    pub limit: u64,
}

/// The state of a local read cache.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalCacheStats {
    /// Sectors from parents that were written to the leaf.
    pub kept: u64,
    /// Sectors that were not, for want of memory or of room.
    pub left_out: u64,
    /// Why nothing more is kept, if so.
    pub failed: Option<String>,
}
