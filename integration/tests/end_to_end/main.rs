//! The real programs on a simulated host.

#![expect(clippy::cast_possible_truncation, reason = "positions on small test disks, and seeds of patterns")]

mod control;
mod guest;
mod hostile;
