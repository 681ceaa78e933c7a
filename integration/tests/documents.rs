//! Links in the documents lead somewhere, and the documents name only files and scenarios that there are.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

fn top() -> PathBuf {
    fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).unwrap()
}

/// All documents of the repository, by their path in it.
fn documents() -> HashMap<PathBuf, String> {
    let mut found = HashMap::new();
    let mut folders = vec![top()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                folders.push(path);
            } else if name.ends_with(".md") {
                found
                    .insert(path.strip_prefix(top()).unwrap().to_owned(), fs::read_to_string(&path).unwrap());
            }
        }
    }
    found
}

/// The lines that are prose, tables and headings, and not code blocks.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    text.lines().filter(move |line| {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            return false;
        }
        !fenced && !line.starts_with("    ")
    })
}

/// What stands behind `](`, up to the bracket, outside of `code`.
fn links(text: &str) -> Vec<&str> {
    let mut links = Vec::new();
    for line in prose(text) {
        for (place, part) in line.match_indices("](") {
            let quoted = line[..place].matches('`').count() % 2 == 1;
            let link = line[place + part.len()..].split_once(')').map(|(link, _)| link);
            links.extend(link.filter(|_| !quoted));
        }
    }
    links
}

/// The anchors that readers of Markdown give to headings: small letters, blanks as hyphens, no punctuation; the second one of the
/// same name has `-1`.
fn anchors(text: &str) -> HashSet<String> {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let headings = prose(text).filter(|line| line.starts_with('#'));
    headings
        .map(|line| {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            let kept = title.chars().filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter));
            let anchor: String = kept.map(|letter| if letter == ' ' { '-' } else { letter }).collect();
            let times = seen.entry(anchor.clone()).or_default();
            *times += 1;
            if *times == 1 { anchor } else { format!("{anchor}-{}", *times - 1) }
        })
        .collect()
}

/// `path` without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => assert!(plain.pop(), "{} leaves the repository", path.display()),
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

#[test]
fn every_link_leads_to_a_file_and_a_heading_of_this_repository() {
    let documents = documents();
    assert!(documents.contains_key(Path::new("README.md")), "{:?}", documents.keys());
    let mut dead = Vec::new();
    let mut count = 0;
    for (document, text) in &documents {
        for link in links(text).into_iter().filter(|link| !link.contains("://")) {
            count += 1;
            let (file, anchor) =
                link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
            let target = match file {
                "" => document.clone(),
                file => plain(&document.parent().unwrap().join(file)),
            };
            let there = match anchor {
                None => top().join(&target).exists(),
                Some(anchor) => documents.get(&target).is_some_and(|text| anchors(text).contains(anchor)),
            };
            if !there {
                dead.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(count > 20, "only {count} links were found");
    assert!(dead.is_empty(), "links that lead nowhere:\n{}", dead.join("\n"));
}

#[test]
fn headings_get_the_anchors_that_readers_of_markdown_give_them() {
    let text =
        "# Who may open what\n## `tap-ctl`: limits & more\n## Again\n```\n# no heading\n```\n## Again\n";
    let expected = ["who-may-open-what", "tap-ctl-limits--more", "again", "again-1"];
    assert_eq!(anchors(text), expected.map(str::to_owned).into());
}

#[test]
fn programs_named_in_the_commands_of_the_readme_are_installed_or_known() {
    let makefile = fs::read_to_string(top().join("Makefile")).unwrap();
    let tools = makefile.lines().find_map(|line| line.strip_prefix("TOOLS := ")).unwrap();
    let known: Vec<&str> = tools.split(' ').chain(["make", "xl", "apt", "systemctl", "disk"]).collect();
    let documents = documents();
    let readme = &documents[Path::new("README.md")];
    let commands: Vec<&str> = readme.lines().filter(|line| line.starts_with("    ")).collect();
    assert!(commands.len() > 10, "{commands:?}");
    for command in commands {
        let program = command.split_whitespace().next().unwrap_or_default();
        let starts_a_command = !program.is_empty() && !program.starts_with(['A', '[', '-', '/']);
        assert!(!starts_a_command || known.contains(&program), "{command}");
    }
    let targets = readme.lines().filter_map(|line| line.trim_start().strip_prefix("make "));
    for target in targets.filter_map(|rest| rest.split_whitespace().next()) {
        let rule = format!("\n{target}:");
        assert!(makefile.contains(&rule), "make {target}");
    }
}

#[test]
fn every_scenario_tells_what_it_is_about_and_how_long_it_may_take() {
    let run = top().join("integration/xen/run.sh");
    let output = Command::new("bash").arg(run).arg("--list").output().unwrap();
    let list = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && list.lines().count() > 30, "{list}");
    for line in list.lines() {
        let (name, about) = line.split_once(' ').unwrap();
        assert!(about.trim().trim_end_matches("(extra)").len() > 10, "{line}");
        let text = fs::read_to_string(top().join(format!("integration/xen/scenarios/{name}.sh"))).unwrap();
        let limit = text.lines().find_map(|line| line.strip_prefix("# limit: ")).unwrap_or_default();
        assert!(limit.parse::<u32>().is_ok_and(|limit| limit > 0), "{name}: {limit:?}");
    }
}
