//! Simulated Xen: the devices and daemons that the backend talks to, in this process and without privileges.

pub mod calls;
pub mod domain;
pub mod events;
pub mod front_ring;
pub mod frontend;
pub mod grants;
pub mod host;
pub mod memory;
pub mod refuse;
pub mod store;
