//! The help of `cbt-util`, byte for byte.

#[path = "../../integration/golden.rs"]
mod golden;

#[test]
fn the_help_of_each_command_is_the_one_on_record() {
    let program = env!("CARGO_BIN_EXE_cbt-util");
    golden::check(
        program,
        &[&["--help"], &["create", "-h"], &["set", "-h"], &["get", "-h"], &["coalesce", "-h"]],
    );
}
