//! The control plane of the block backend: finds VBDs in XenStore, runs each one's xenbus state machine, and tells
//! tapdisks which rings to serve. It never touches a ring, a grant or an image.
//!
//! | module | holds |
//! |---|---|
//! | [`daemon`] | the event loop |
//! | [`control`] | all devices: look, decide, act |
//! | [`machine`] | decide: a pure function of what was seen |
//! | [`device`] | what is remembered of a device |
//! | [`input`] | look: XenStore values, read strictly |
//! | [`connect`] | look: the frontend's ring |
//! | [`publish`] | act: guarded writes to the backend's directory |
//! | [`features`] | what is published |
//! | [`revive`] | act: other tapdisks for disks whose tapdisks died |
//! | [`tapdisk`] | act: control connections that never block |
//! | [`leftovers`] | statistics of tapdisks that have crashed |
//! | [`limit`] | how much work a guest may cause |
//! | [`notify`] | telling systemd how we are |
//! | [`paths`], [`problem`] | names and reasons |
//! | [`cli`] | the command line |
//!
//! All state is in XenStore and in the tapdisks: xenio can be killed and started again at any moment.

#![forbid(unsafe_code)]

pub mod cli;
pub mod connect;
pub mod control;
pub mod daemon;
pub mod device;
pub mod features;
pub mod input;
pub mod leftovers;
pub mod limit;
pub mod machine;
pub mod notify;
pub mod paths;
pub mod problem;
pub mod publish;
pub mod revive;
pub mod tapdisk;

pub use daemon::{Config, RunError, run};
