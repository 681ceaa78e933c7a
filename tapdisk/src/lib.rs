//! The data plane: one process that serves guests' block rings from image chains.
//!
//! ```text
//!  tap-ctl, xenio --control socket--> server ---commands---> worker thread, one for each disk
//!                                    (main thread)            │
//!  guest's ring <--mapped pages, event channel--> ring ─ slot tasks ─ disk ─ layers ─ reactor (io_uring)
//!                                                        └ copier (one grant copy a turn)
//! ```
//!
//! | module | concern |
//! |---|---|
//! | [`cli`] | the process: options, start-up, the hand-shake with `tap-ctl spawn` |
//! | [`confine`] | what the process gives up first |
//! | [`porter`] | the process that opens files for this one |
//! | [`server`], [`vbd`] | the control socket |
//! | [`journal`] | requests in memory that outlives the process |
//! | [`worker`] | a disk's thread: its loop, rings, and the way from a request to its answer |
//! | [`nbd`] | the disk's NBD server |
//! | [`image`] | chains of layers, and opening them |
//! | [`io`], [`reactor`], [`buf`], [`copier`] | moving bytes |
//! | [`flight`] | requests under way, as they are told to people |
//! | [`executor`], [`sync`], [`tick`] | tasks, waiting, the time |
//! | [`alone`] | the same without rings, for tools |
//! | [`xen`] | real devices or simulated ones |
//! | [`xentop`] | what frontends have done, where xentop looks |
//!
//! Unsafe code is in `buf`, `copier`, `image::store`, `reactor::{uring, pool}` `words` and `worker::mapped` only; each begins
//! with its invariants.

pub mod alone;
pub mod buf;
pub mod cli;
pub mod confine;
pub mod copier;
pub mod executor;
pub mod flight;
pub mod image;
pub mod io;
pub mod journal;
pub mod nbd;
pub mod porter;
pub mod reactor;
pub mod server;
mod socket;
pub mod sync;
pub mod tick;
pub mod vbd;
mod words;
pub mod worker;
pub mod xen;
pub mod xentop;
