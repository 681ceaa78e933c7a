//! The porter as a process.
