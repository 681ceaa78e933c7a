//! The help of `tapdisk`, byte for byte.

#[path = "../../integration/golden.rs"]
mod golden;

#[test]
fn the_help_is_the_one_on_record() {
    golden::check(env!("CARGO_BIN_EXE_tapdisk"), &[&["-h"], &["--help"], &["--nonsense"]]);
}
