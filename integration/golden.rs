//! Compares what a program prints with a file on record. Included by the tests of the crates that have programs.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

/// Runs `program` with each of the argument lists, and compares all it prints, with its exit codes, with `tests/help/NAME.txt`
/// of the crate under test, byte for byte. With `UPDATE_HELP` in the environment that file is written instead.
///
/// # Panics
///
/// When they differ.
pub fn check(program: &str, calls: &[&[&str]]) {
    let name = Path::new(program).file_name().unwrap().to_str().unwrap();
    let mut seen = String::new();
    for call in calls {
        let output = Command::new(program).args(*call).output().unwrap();
        writeln!(seen, "$ {}", [&[name], *call].concat().join(" ")).unwrap();
        seen.push_str(str::from_utf8(&output.stdout).unwrap());
        for line in str::from_utf8(&output.stderr).unwrap().lines() {
            writeln!(seen, "stderr: {line}").unwrap();
        }
        writeln!(seen, "exit {}\n", output.status.code().unwrap()).unwrap();
    }
    let record = Path::new("tests/help").join(format!("{name}.txt"));
    if std::env::var_os("UPDATE_HELP").is_some() {
        std::fs::create_dir_all("tests/help").unwrap();
        std::fs::write(&record, &seen).unwrap();
    }
    let expected = std::fs::read_to_string(&record).unwrap_or_default();
    assert!(
        seen == expected,
        "{} is not what {name} says now; if it should be, run the test with UPDATE_HELP=1\n{seen}",
        record.display()
    );
}
