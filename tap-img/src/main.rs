//! Converts, compares and describes disk images of every format that tapdisk serves.

fn main() {}
