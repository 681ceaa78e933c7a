//! Every case of `docs/malformed-images.md` has its tests.

use std::collections::BTreeSet;
use std::path::Path;

/// The names of all functions in the Rust files below a folder.
fn functions(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let hidden = name.as_encoded_bytes().starts_with(b".");
        if path.is_dir() && !hidden && name != "target" {
            functions(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let starts = text.split("fn ").skip(1);
            names.extend(starts.filter_map(|rest| Some(rest.split_once('(')?.0.to_owned())));
        }
    }
}

#[test]
fn every_case_of_a_malformed_image_has_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut names = BTreeSet::new();
    functions(root, &mut names);
    let text = std::fs::read_to_string(root.join("docs/malformed-images.md")).unwrap();
    let rows = text.lines().filter_map(|line| {
        let cells = line.strip_prefix("| ")?.strip_suffix(" |")?.split(" | ").collect::<Vec<_>>();
        Some((cells[0].parse::<u32>().ok()?, *cells.last()?))
    });
    let mut numbers = Vec::new();
    for (number, tests) in rows {
        numbers.push(number);
        for test in tests.split(", ") {
            assert!(names.contains(test), "case {number}: there is no test {test}");
        }
    }
    assert!(numbers.into_iter().eq(1..=85), "each case once, in order");
}
