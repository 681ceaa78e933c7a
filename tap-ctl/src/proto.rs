//! The messages.
//!
//! A client connects to a tapdisk's control socket, sends one [`Request`] and gets one [`Reply`]; it may send more
//! requests on the same connection, each answered in turn. Only [`Request::Follow`] is answered for as long as the
//! connection lasts. Errors travel as a positive errno, which becomes the exit code of `tap-ctl`, and a sentence for
//! people.
//!
//! A tapdisk lives as long as its disk, so the xenio or tap-ctl that speaks to it may be of another release: what a
//! release adds to a message has a default, and what it does not know is skipped.

mod disk;
mod image;
pub mod latency;
mod limits;
mod minor;
mod open;
mod ring;
mod stats;

use serde::{Deserialize, Serialize};

pub use disk::{Discard, DiskInfo, VbdEntry};
pub use image::{ImageSpec, ImageSpecError, ImageType, null_size};
pub use latency::{Histogram, Latencies};
pub use limits::{LimitChange, LimitError, Limits};
pub use minor::{Minor, MinorError};
pub use open::{Key, OpenParams, Reopen, Secondary};
pub use ring::{Polling, QueueParams, RingEntry, RingParams};
pub use stats::{
    CacheStats, DiskStats, ImageStats, LATE, LocalCacheStats, MirrorStats, OldestRequest, ReadWrite,
    RingStats, StandbyStats, Stats, StoreOperation,
};

/// What a client asks of a tapdisk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Who are you?
    Pid,
    /// All VBDs of this tapdisk.
    List,
    /// Take charge of a minor: locks its marker. EEXIST if attached already, ENOENT without marker.
    Attach {
        /// The minor.
        minor: Minor,
    },
    /// Give a minor up: EBUSY while an image is open. The tapdisk ends with its last minor.
    Detach {
        /// The minor.
        minor: Minor,
    },
    /// Open an image. EALREADY if one is open.
    Open {
        /// The minor.
        minor: Minor,
        /// What and how.
        #[serde(flatten)]
        params: OpenParams,
    },
    /// Close the image: rings are disconnected first. ENODEV for an unknown minor.
    Close {
        /// The minor.
        minor: Minor,
    },
    /// Size of the open image.
    DiskInfo {
        /// The minor.
        minor: Minor,
    },
    /// Take up a new size of the open image, and tell it as [`Reply::DiskInfo`]. The frontends go on. EINVAL if the image
    /// would shrink, EOPNOTSUPP if its format cannot grow.
    Resize {
        /// The minor.
        minor: Minor,
        /// The new size in bytes; `None`: whatever the file or the block device has become.
        size: Option<u64>,
    },
    /// Let everything in flight end, take no more requests, and close the image, so that others may work on it. Frontends
    /// stay connected and wait. Nothing to do if it is paused.
    Pause {
        /// The minor.
        minor: Minor,
        /// If what is in flight has not ended after so many seconds, the pause is given up (ETIMEDOUT, which is told when it
        /// has ended), and the disk goes on.
        #[serde(default)]
        within: Option<u64>,
    },
    /// Open the image of a paused disk again, or another one, and go on. Answered as [`Request::Open`]. EINVAL if it is not
    /// paused. EMEDIUMTYPE if the disk would be smaller than before. After any failure it is still paused.
    ///
    /// A pause that is still under way is taken back, if nothing is to be other than before.
    Unpause {
        /// The minor.
        minor: Minor,
        /// What is other than before.
        #[serde(flatten)]
        change: Reopen,
    },
    /// Let everything in flight end on every disk, close the images, and end, so that another tapdisk goes on with the disks
    /// (`tapdisk --take-over`). Frontends stay connected and wait. Answered before the end. EBUSY if a minor has no image open,
    /// EINVAL if a disk cannot be taken over. After a failure everything is as it was.
    Leave,
    /// Make a new image that takes all writes from now on, with the present one, which is written no more, as its parent.
    /// After a failure the disk is as it was.
    Snapshot {
        /// The minor.
        minor: Minor,
        /// Where to make the new image. There must be no such file.
        image: ImageSpec,
        /// As in [`Request::Pause`].
        #[serde(default)]
        within: Option<u64>,
    },
    /// Change what the disk may do in a second; nothing named: only tell. Answered with [`Reply::Limits`].
    Limit {
        /// The minor.
        minor: Minor,
        /// The change.
        #[serde(flatten)]
        change: LimitChange,
    },
    /// What the disk has done.
    Stats {
        /// The minor.
        minor: Minor,
    },
    /// Answers with a stream of [`Reply::Changed`], until the client closes the connection: at once one for each open
    /// image, later one for each change. A client that does not read is disconnected. Nothing else may be asked on the
    /// connection.
    Follow,
    /// Serve a frontend's ring. EALREADY if this (domid, vdev) is served already.
    Connect {
        /// The minor.
        minor: Minor,
        /// The ring.
        ring: RingParams,
    },
    /// Stop serving a frontend: answered when every request is finished and nothing of the guest is mapped any more.
    /// ENODEV if it is not served.
    Disconnect {
        /// The minor.
        minor: Minor,
        /// The frontend's domain.
        domid: u16,
        /// The frontend's virtual device.
        vdev: u32,
    },
}

/// What a tapdisk answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// Done, nothing to tell.
    Done,
    /// Refused or failed.
    Error {
        /// Positive errno.
        errno: i32,
        /// What failed, on which file or device, and what to do.
        message: String,
    },
    /// The process.
    Pid {
        /// Its id.
        pid: i32,
    },
    /// All VBDs, newest first.
    List {
        /// The VBDs.
        vbds: Vec<VbdEntry>,
    },
    /// Size of a disk; answer to Open, DiskInfo, Resize and Unpause.
    DiskInfo(DiskInfo),
    /// Answer to Limit: what holds now.
    Limits(Limits),
    /// Answer to Stats.
    Stats(Box<Stats>),
    /// The state of an open image, unasked; see [`Request::Follow`].
    Changed {
        /// Its minor.
        minor: Minor,
        /// The disk as it is now.
        info: DiskInfo,
        /// The disk serves no writes any more, and its frontends wait for answers that will not come: why, for people.
        failed: Option<String>,
        /// The disk goes on, but not as it was asked for, such as without its mirror: why, for people.
        #[serde(default)]
        degraded: Option<String>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_wire() {
        let request = Request::Connect {
            minor: Minor(3),
            ring: RingParams {
                domid: 7,
                vdev: 51712,
                protocol: "x86_64-abi".into(),
                queues: vec![QueueParams { ring_refs: vec![8, 9], port: 4 }],
                readonly: true,
                persistent: true,
                discard: true,
                polling: Polling { duration_us: Some(0), idle_threshold: 50 },
            },
        };
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
    }

    #[test]
    fn what_an_older_release_does_not_say_has_a_default() {
        let ring = r#"{"domid":7,"vdev":51712,"protocol":"x86_64-abi","queues":[],"readonly":false}"#;
        let ring: RingParams = serde_json::from_str(ring).unwrap();
        assert_eq!(
            (ring.persistent, ring.polling),
            (false, Polling { duration_us: None, idle_threshold: 0 })
        );
        let info = r#"{"reply":"disk-info","sectors":8,"sector_size":512,"physical_sector_size":512,"readonly":true}"#;
        let Reply::DiskInfo(info) = serde_json::from_str(info).unwrap() else { panic!("{info}") };
        assert_eq!(info.discard, None);
    }
}
