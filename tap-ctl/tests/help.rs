//! The help of `tap-ctl`, byte for byte.

#[path = "../../integration/golden.rs"]
mod golden;

#[test]
fn the_help_of_each_command_is_the_one_on_record() {
    let usage = tap_ctl::args::usage();
    let commands = usage
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|name| !name.is_empty()));
    let each: Vec<[&str; 2]> = commands.map(|command| [command, "--help"]).collect();
    let general: [&[&str]; 2] = [&[], &["--help"]];
    let calls: Vec<&[&str]> = general.into_iter().chain(each.iter().map(|call| &call[..])).collect();
    golden::check(env!("CARGO_BIN_EXE_tap-ctl"), &calls);
}
