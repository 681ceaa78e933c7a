//! Manual pages and completion know what the programs know.

use std::fs;
use std::os::unix::fs::PermissionsExt;
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
    let commands = commands(&usage);
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

/// The commands in a usage text of `tap-ctl`.
fn commands(usage: &str) -> Vec<&str> {
    let lines = usage.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    lines.filter(|name| !name.is_empty()).collect()
}

/// A folder with a `tap-ctl` that says of itself what the real one says, and does nothing.
fn with_tap_ctl() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let usage = tap_ctl::args::usage();
    for command in commands(&usage) {
        fs::write(at(command), tap_ctl::args::help_of(command)).unwrap();
    }
    fs::write(at("usage"), &usage).unwrap();
    let here = folder.path().display();
    let script = format!("#!/bin/sh\n[ \"$2\" = -h ] && exec cat {here}/$1\nexec cat {here}/usage\n");
    fs::write(at("tap-ctl"), script).unwrap();
    fs::set_permissions(at("tap-ctl"), PermissionsExt::from_mode(0o755)).unwrap();
    folder
}

/// What a shell prints where `tap-ctl` is the one under test.
fn shell(shell: &[&str], script: &str) -> Vec<String> {
    let folder = with_tap_ctl();
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let output = Command::new(shell[0])
        .args(&shell[1..])
        .args(["-c", script])
        .env("PATH", path)
        .current_dir(folder.path())
        .output()
        .unwrap_or_else(|error| panic!("{}: {error} (integration/deps.sh installs it)", shell[0]));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().split_whitespace().map(str::to_owned).collect()
}

#[test]
fn fish_and_zsh_complete_what_tap_ctl_says_of_itself() {
    let completions = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../dist/completions");
    let (fish, zsh) = (completions.join("xenio.fish"), completions.join("xenio.zsh"));
    let in_fish = |line: &str| {
        shell(&["fish", "--no-config"], &format!("source {}; complete -C '{line}'", fish.display()))
    };
    // Without the last line, which begins the completion.
    let in_zsh = |call: &str| shell(&["zsh", "-f"], &format!("source <(sed '$d' {}); {call}", zsh.display()));
    let usage = tap_ctl::args::usage();
    let mut commands = commands(&usage);
    assert_eq!(in_zsh("_xenio_commands tap-ctl"), commands);
    commands.sort_unstable();
    assert_eq!(in_fish("tap-ctl "), commands);
    for command in ["list", "create", "limit", "stats"] {
        let usage = tap_ctl::args::usage_of(command);
        let (seen_in_fish, seen_in_zsh) =
            (in_fish(&format!("tap-ctl {command} -")), in_zsh(&format!("_xenio_options tap-ctl {command}")));
        for option in options(&usage) {
            assert!(seen_in_zsh.iter().any(|seen| seen == option), "{command} {option}: {seen_in_zsh:?}");
            assert!(seen_in_fish.iter().any(|seen| seen == option), "{command} {option}: {seen_in_fish:?}");
        }
    }
    assert_eq!(in_fish("tap-ctl spawn --engine "), ["auto", "pool", "uring"]);
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
