//! The help of `vhd-util`, byte for byte.

#[path = "../../integration/golden.rs"]
mod golden;

#[test]
fn the_help_of_each_command_is_the_one_on_record() {
    let commands = [
        "create", "snapshot", "query", "read", "set", "repair", "resize", "fill", "coalesce", "modify",
        "scan", "check", "revert", "key", "copy",
    ];
    let each: Vec<[&str; 2]> = commands.iter().map(|command| [*command, "-h"]).collect();
    let general: [&[&str]; 2] = [&[], &["--help"]];
    let calls: Vec<&[&str]> = general.into_iter().chain(each.iter().map(|call| &call[..])).collect();
    golden::check(env!("CARGO_BIN_EXE_vhd-util"), &calls);
}
