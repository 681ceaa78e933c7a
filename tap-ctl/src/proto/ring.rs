//! How a frontend's rings are described.

use blkif::{DomId, GrantRef, Port, VdevId};
use serde::{Deserialize, Serialize};

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

    /// The frontend.
    pub fn entry(&self) -> RingEntry {
        RingEntry { domid: self.domid, vdev: self.vdev }
    }

    /// The same frontend with this queue only.
    pub fn with_queue(&self, queue: &QueueParams) -> RingParams {
        RingParams { queues: vec![queue.clone()], ..self.clone() }
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

/// A served frontend in [`VbdEntry`](super::VbdEntry).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingEntry {
    /// The frontend's domain.
    pub domid: u16,
    /// The frontend's virtual device.
    pub vdev: u32,
}
