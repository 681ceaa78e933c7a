//! Simulated Xen: the devices and daemons that the backend talks to, in this process and without privileges.

pub mod store;
