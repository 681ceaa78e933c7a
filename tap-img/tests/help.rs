//! The help of the tools, byte for byte.

#[path = "../../integration/golden.rs"]
mod golden;

#[test]
fn the_help_of_each_tool_is_the_one_on_record() {
    golden::check(env!("CARGO_BIN_EXE_tap-img"), &[&["--help"], &["convert", "-h"], &["nonsense"]]);
    golden::check(env!("CARGO_BIN_EXE_img2qcow"), &[&[]]);
    golden::check(env!("CARGO_BIN_EXE_qcow2raw"), &[&[]]);
    golden::check(env!("CARGO_BIN_EXE_qcow-create"), &[&[]]);
}
