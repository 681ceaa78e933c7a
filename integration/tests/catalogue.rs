//! Every case of `docs/malformed-images.md` has its tests.

use std::collections::BTreeMap;
use std::path::Path;

/// All functions in the Rust files below a folder: their text by their names.
fn functions(folder: &Path, found: &mut BTreeMap<String, String>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let hidden = name.as_encoded_bytes().starts_with(b".");
        if path.is_dir() && !hidden && name != "target" {
            functions(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            for (name, rest) in text.split("fn ").skip(1).filter_map(|rest| rest.split_once('(')) {
                found.entry(name.to_owned()).or_default().push_str(rest);
            }
        }
    }
}

/// The errnos that a text names.
fn errnos(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split(|character: char| !character.is_ascii_alphanumeric());
    words.filter(|word| word.len() > 3 && word.starts_with('E') && !word.contains(|c: char| c.is_lowercase()))
}

/// Whether a test looks for an errno, by Linux's name or by that of the NBD protocol.
fn looks_for(test: &str, errno: &str) -> bool {
    let of_nbd = format!("errorcode::{}", errno[1..].to_lowercase());
    test.contains(&format!("::{errno}")) || test.to_lowercase().contains(&of_nbd)
}

#[test]
fn every_case_of_a_malformed_image_has_tests_that_exist_and_look_for_its_errnos() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut found = BTreeMap::new();
    functions(root, &mut found);
    let text = std::fs::read_to_string(root.join("docs/malformed-images.md")).unwrap();
    let rows = text.lines().filter_map(|line| {
        let cells = line.strip_prefix("| ")?.strip_suffix(" |")?.split(" | ").collect::<Vec<_>>();
        let [number, _, behaviour, tests] = cells[..] else { return None };
        Some((number.parse::<u32>().ok()?, behaviour, tests))
    });
    let mut numbers = Vec::new();
    for (number, behaviour, tests) in rows {
        numbers.push(number);
        let texts = tests.split(", ").map(|test| {
            found.get(test).unwrap_or_else(|| panic!("case {number}: there is no test {test}")).as_str()
        });
        let texts = texts.collect::<String>();
        for errno in errnos(behaviour) {
            assert!(looks_for(&texts, errno), "case {number}: no test looks for {errno}");
        }
    }
    assert!(numbers.into_iter().eq(1..=85), "each case once, in order");
}
