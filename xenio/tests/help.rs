//! The help of `xenio`, byte for byte.

#[path = "../../integration/golden.rs"]
mod golden;

#[test]
fn the_help_is_the_one_on_record() {
    golden::check(env!("CARGO_BIN_EXE_xenio"), &[&["-h"], &["--help"], &["--nonsense"]]);
}
