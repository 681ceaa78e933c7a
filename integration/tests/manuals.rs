//! Manual pages and completion know what the programs know.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

fn dist(file: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../dist").join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The text of a manual page without its markup.
fn page(name: &str) -> String {
    dist(&format!("man/{name}")).replace("\\-", "-").replace("\\fI", "").replace("\\fP", "")
}

/// Words of a usage text that begin with `-`.
fn options(usage: &str) -> Vec<&str> {
    let words = usage.split(|character: char| character.is_whitespace() || "[](|),".contains(character));
    words.filter(|word| word.len() > 1 && word.starts_with('-')).collect()
}

#[test]
fn the_page_and_the_completion_of_tap_ctl_have_every_command_and_option() {
    let (page, completion) = (page("tap-ctl.8"), dist("completions/xenio.bash"));
    let usage = tap_ctl::args::usage();
    let commands: Vec<&str> = usage
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|name| !name.is_empty()))
        .collect();
    assert!(commands.contains(&"snapshot"), "{usage}");
    for command in commands {
        assert!(page.contains(command), "{command} is not in tap-ctl.8");
        for option in options(&tap_ctl::args::usage_of(command)) {
            assert!(page.contains(option), "{command} {option} is not in tap-ctl.8");
            // What XenServer's scripts may say and nobody needs to type.
            let needless = ["-d", "--debug"].contains(&option) || (command, option) == ("close", "-f");
            assert!(needless || completion.contains(option), "{command} {option} is not completed");
        }
    }
}

#[test]
fn every_installed_program_has_a_page_that_man_reads_without_a_warning() {
    let makefile = dist("../Makefile");
    let tools = makefile.lines().find_map(|line| line.strip_prefix("TOOLS := ")).unwrap();
    for tool in tools.split_whitespace().chain(["tapdisk", "xenio-disk"]) {
        let pages = [1, 5, 8].map(|section| format!("man/{tool}.{section}"));
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../dist");
        let file = pages.iter().map(|page| folder.join(page)).find(|path| path.exists());
        let file = file.unwrap_or_else(|| panic!("{tool} has no manual page"));
        let output = Command::new("groff").args(["-man", "-ww", "-z", "-Tutf8"]).arg(&file).output();
        let output = output.expect("groff-base is installed (integration/deps.sh)");
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && words.is_empty(), "{}: {words}", file.display());
    }
}
