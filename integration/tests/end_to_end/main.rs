//! The real programs on a simulated host.

mod control;
mod guest;
mod hostile;
