//! The messages.
//!
//! A client connects to a tapdisk's control socket, sends one [`Request`] and gets one [`Reply`]; it may send more
//! requests on the same connection, each answered in turn. Only [`Request::Follow`] is answered for as long as the
//! connection lasts. Errors travel as a positive errno, which becomes the exit code of `tap-ctl`, and a sentence for
//! people.
//!
//! A tapdisk lives as long as its disk, so the xenio or tap-ctl that speaks to it may be of another release: what a
//! release adds to a message has a default, and what it does not know is skipped.

mod image;

use std::fmt;
use std::str::FromStr;

use blkif::{DomId, GrantRef, Port, VdevId};
use serde::{Deserialize, Serialize};

pub use image::{ImageSpec, ImageSpecError, ImageType, null_size};

/// Names one VBD on this host: the number N of the marker file `tapdisk-N`. 0 to 16383.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Minor(pub u16);

impl Minor {
    /// The highest minor.
    pub const MAX: Minor = Minor(16383);
}

/// A string that is no decimal number from 0 to 16383.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no minor: minors are numbers from 0 to {max}", max = Minor::MAX)]
pub struct MinorError(String);

impl FromStr for Minor {
    type Err = MinorError;

    fn from_str(text: &str) -> Result<Minor, MinorError> {
        // The standard parser also takes a leading plus sign.
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let number = text.parse().ok().filter(|&number| digits && number <= Minor::MAX.0);
        number.map(Minor).ok_or_else(|| MinorError(text.to_owned()))
    }
}

impl fmt::Display for Minor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How to open an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenParams {
    /// What to open.
    pub image: ImageSpec,
    /// `-R`: no writes, whoever asks.
    pub readonly: bool,
    /// `-D`: through the page cache instead of O_DIRECT.
    pub buffered: bool,
}

/// A frontend's ring: everything tapdisk needs to serve it, read from XenStore by xenio.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingParams {
    /// The frontend's domain.
    pub domid: u16,
    /// The frontend's virtual device.
    pub vdev: u32,
    /// Value of the `protocol` key after its default rule: `x86_64-abi`, `x86_32-abi` or `arm-abi`.
    pub protocol: String,
    /// One entry a queue, at least one.
    pub queues: Vec<QueueParams>,
    /// The toolstack's mode is not `w`: every request that would change the disk is refused.
    pub readonly: bool,
    /// Both ends offered `feature-persistent`: the frontend uses the same grants again, so they may stay mapped.
    #[serde(default)]
    pub persistent: bool,
    /// `feature-discard` was published as 1.
    #[serde(default)]
    pub discard: bool,
    /// When to look for requests before sleeping.
    #[serde(default)]
    pub polling: Polling,
}

/// When to look for requests before sleeping until the frontend notifies the next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Polling {
    /// How long at most, in microseconds; 0: not at all; `None`: as long as tapdisk finds best.
    pub duration_us: Option<u32>,
    /// Not while the host's processors are idle for less than this share, in percent, 0 to 100.
    pub idle_threshold: u8,
}

/// One queue of a frontend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueParams {
    /// Grant references of the ring's pages, in order: 1, 2, 4, 8 or 16.
    pub ring_refs: Vec<u32>,
    /// The frontend's unbound event channel.
    pub port: u32,
}

impl RingParams {
    /// The frontend's domain.
    pub fn dom(&self) -> DomId {
        DomId(self.domid)
    }

    /// The frontend's virtual device.
    pub fn device(&self) -> VdevId {
        VdevId(self.vdev)
    }
}

impl QueueParams {
    /// The ring's pages.
    pub fn refs(&self) -> Vec<GrantRef> {
        self.ring_refs.iter().copied().map(GrantRef).collect()
    }

    /// The frontend's event channel.
    pub fn remote_port(&self) -> Port {
        Port(self.port)
    }
}

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
    /// Size of a disk; answer to Open, DiskInfo and Resize.
    DiskInfo(DiskInfo),
    /// The state of an open image, unasked; see [`Request::Follow`].
    Changed {
        /// Its minor.
        minor: Minor,
        /// The disk as it is now.
        info: DiskInfo,
        /// The disk serves no writes any more, and its frontends wait for answers that will not come: why, for people.
        failed: Option<String>,
    },
}

/// A VBD in [`Reply::List`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VbdEntry {
    /// Its minor.
    pub minor: Minor,
    /// State bits as XenServer's tapdisk shows them: 0 running or only attached, 2 closed.
    pub state: u32,
    /// The open image.
    pub image: Option<ImageSpec>,
    /// The frontends being served.
    pub rings: Vec<RingEntry>,
}

/// A served frontend in [`VbdEntry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingEntry {
    /// The frontend's domain.
    pub domid: u16,
    /// The frontend's virtual device.
    pub vdev: u32,
}

/// What xenio publishes about a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Capacity in units of 512 bytes.
    pub sectors: u64,
    /// Logical block size in bytes.
    pub sector_size: u32,
    /// Physical block size in bytes.
    pub physical_sector_size: u32,
    /// The image was opened read-only.
    pub readonly: bool,
    /// What a discard may be; `None`: the image cannot discard.
    #[serde(default)]
    pub discard: Option<Discard>,
    /// The most rings this disk serves with a thread each; further ones share. 1 for formats with metadata.
    #[serde(default = "one")]
    pub queues: u32,
}

fn one() -> u32 {
    1
}

/// What a disk can discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discard {
    /// Smallest unit, in bytes; a power of two from 512 on.
    pub granularity: u32,
    /// Offset of the first unit, in bytes.
    pub alignment: u32,
    /// Whether the old content can be made unreadable.
    pub secure: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minors_are_0_to_16383_and_nothing_else() {
        assert_eq!("0".parse(), Ok(Minor(0)));
        assert_eq!("16383".parse(), Ok(Minor::MAX));
        for text in ["", "16384", "-1", "+1", "1 ", "0x1", "70000"] {
            assert!(text.parse::<Minor>().is_err(), "{text:?}");
        }
    }

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
        assert_eq!((info.discard, info.queues), (None, 1));
    }
}
