//! The control plane against a simulated XenStore and a stand-in for tapdisk that speaks the real control protocol; and
//! what the real tapdisk says in it.
//!
//! The tests play the toolstack and the guest, and look at nothing but what those could see: XenStore, and what the
//! tapdisk is asked.

mod fake_tapdisk;
mod features;
mod hostile;
mod kill_points;
mod lifecycle;
mod news;
mod publishing;
mod removal;
mod restart;
mod rig;
mod tapdisk;
