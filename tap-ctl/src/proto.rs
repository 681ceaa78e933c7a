//! The messages.
//!
//! A client connects to a tapdisk's control socket, sends one [`Request`] and gets one [`Reply`]; it may send more
//! requests on the same connection, each answered in turn. Errors travel as a positive errno, which becomes the exit
//! code of `tap-ctl`, and a sentence for people.

use std::fmt;
use std::str::FromStr;

use blkif::{DomId, GrantRef, Port, VdevId};
use serde::{Deserialize, Serialize};

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

/// The format of an image, as the part of `type:path` before the colon. Never guessed from content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageType {
    /// A raw file or block device.
    Aio,
    /// A VHD with its chain of parents.
    Vhd,
}

impl ImageType {
    /// The name in `type:path`.
    pub fn name(self) -> &'static str {
        match self {
            ImageType::Aio => "aio",
            ImageType::Vhd => "vhd",
        }
    }
}

/// An image as users name it: `type:path`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// The format.
    pub kind: ImageType,
    /// The path; any characters, `:` and blanks included.
    pub path: String,
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind.name(), self.path)
    }
}

/// Why a string is no [`ImageSpec`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageSpecError {
    /// There is no `:`.
    #[error("{0:?} is no image: write type:path, for example vhd:/srv/debian.vhd")]
    NoType(String),
    /// The type is not known.
    #[error("unknown image type {0:?}: known are aio (raw) and vhd")]
    UnknownType(String),
    /// Nothing follows the colon.
    #[error("the image {0:?} has an empty path")]
    EmptyPath(String),
}

impl FromStr for ImageSpec {
    type Err = ImageSpecError;

    fn from_str(text: &str) -> Result<ImageSpec, ImageSpecError> {
        let (kind, path) = text.split_once(':').ok_or_else(|| ImageSpecError::NoType(text.to_owned()))?;
        let kind = match kind {
            "aio" => ImageType::Aio,
            "vhd" => ImageType::Vhd,
            _ => return Err(ImageSpecError::UnknownType(kind.to_owned())),
        };
        if path.is_empty() {
            return Err(ImageSpecError::EmptyPath(text.to_owned()));
        }
        Ok(ImageSpec { kind, path: path.to_owned() })
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
    /// One entry a queue.
    pub queues: Vec<QueueParams>,
    /// The toolstack's mode is not `w`: every request that would change the disk is refused.
    pub readonly: bool,
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
    /// Size of a disk; answer to Open and DiskInfo.
    DiskInfo(DiskInfo),
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
    fn image_spec_keeps_colons_and_blanks_of_the_path() {
        let spec: ImageSpec = "vhd:/srv/a b:c.vhd".parse().unwrap();
        assert_eq!(spec.path, "/srv/a b:c.vhd");
        assert_eq!(spec.to_string(), "vhd:/srv/a b:c.vhd");
    }

    #[test]
    fn image_spec_without_known_type_is_refused() {
        assert!(matches!("/srv/a.vhd".parse::<ImageSpec>(), Err(ImageSpecError::NoType(_))));
        assert!(matches!("raw:/srv/a".parse::<ImageSpec>(), Err(ImageSpecError::UnknownType(_))));
        assert!(matches!("vhd:".parse::<ImageSpec>(), Err(ImageSpecError::EmptyPath(_))));
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
            },
        };
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
    }
}
