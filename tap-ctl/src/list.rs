//! What is there: all tapdisks with their VBDs, and minors that nobody serves.

use std::fs;
use std::io::ErrorKind;

use crate::client::{self, QUICK};
use crate::dir::ControlDir;
use crate::error::Error;
use crate::minors;
use crate::proto::{ImageSpec, Minor, Reply, Request};

/// One line of `tap-ctl list`; `None` where something is not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The tapdisk's process id; `None` for an orphan minor.
    pub pid: Option<i32>,
    /// The minor; `None` for a tapdisk that serves none yet.
    pub minor: Option<Minor>,
    /// State bits of the VBD, see [`crate::proto::VbdEntry`].
    pub state: Option<u32>,
    /// The open image.
    pub image: Option<ImageSpec>,
    /// Where it is served by NBD, where that was looked for.
    pub uri: Option<String>,
}

impl Entry {
    /// Has the entry tell where its disk is served by NBD.
    pub fn add_uri(&mut self, dir: &ControlDir) {
        if let (Some(pid), Some(minor), Some(_)) = (self.pid, self.minor, &self.image) {
            self.uri = Some(dir.nbd_uri(pid, minor));
        }
    }
}

/// What to show. An entry passes if it agrees with every criterion given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Of this tapdisk only.
    pub pid: Option<i32>,
    /// This minor only.
    pub minor: Option<Minor>,
    /// Images of this type only, compared as text: an unknown type is no error, it matches nothing.
    pub kind: Option<String>,
    /// Images with this path only, compared as text.
    pub path: Option<String>,
}

impl Filter {
    fn passes(&self, entry: &Entry) -> bool {
        let image = entry.image.as_ref();
        self.pid.is_none_or(|pid| entry.pid == Some(pid))
            && self.minor.is_none_or(|minor| entry.minor == Some(minor))
            && self.kind.as_ref().is_none_or(|kind| image.is_some_and(|image| image.kind.name() == kind))
            && self.path.as_ref().is_none_or(|path| image.is_some_and(|image| image.path == *path))
    }
}

/// All entries that pass `filter`, and what could not be asked: a tapdisk that hangs must not hide the others.
///
/// Order: tapdisks by the name of their socket, their VBDs newest first, then orphan minors.
///
/// # Errors
///
/// [`Error::File`] when the runtime folder cannot be read. A tapdisk that has ended is no error.
pub fn gather(dir: &ControlDir, filter: &Filter) -> Result<(Vec<Entry>, Vec<Error>), Error> {
    let pids = match filter.pid {
        Some(pid) => vec![pid],
        None => tapdisks(dir)?,
    };
    let mut entries = Vec::new();
    let mut problems = Vec::new();
    for pid in pids {
        match ask(dir, pid) {
            Ok(mut vbds) => entries.append(&mut vbds),
            Err(error) if error.is_dead() => {}
            Err(error) => problems.push(error),
        }
    }
    for minor in minors::allocated(dir)? {
        if !entries.iter().any(|entry| entry.minor == Some(minor)) {
            entries.push(Entry { minor: Some(minor), ..Entry::default() });
        }
    }
    entries.retain(|entry| filter.passes(entry));
    Ok((entries, problems))
}

/// Process ids that have a control socket, in the order of its name.
pub(crate) fn tapdisks(dir: &ControlDir) -> Result<Vec<i32>, Error> {
    let root = dir.root();
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::File { action: "read", path: root.to_owned(), source }),
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("ctl").map(str::to_owned))
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .collect();
    names.sort_unstable();
    Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
}

fn ask(dir: &ControlDir, pid: i32) -> Result<Vec<Entry>, Error> {
    let Reply::List { vbds } = client::call(dir, pid, &Request::List, Some(QUICK))? else {
        return Err(Error::Unexpected { pid });
    };
    if vbds.is_empty() {
        return Ok(vec![Entry { pid: Some(pid), ..Entry::default() }]);
    }
    let entry = |vbd: crate::proto::VbdEntry| Entry {
        pid: Some(pid),
        minor: Some(vbd.minor),
        state: Some(vbd.state),
        image: vbd.image,
        uri: None,
    };
    Ok(vbds.into_iter().map(entry).collect())
}

/// `%#x` of C: zero has no prefix.
fn hex(state: u32) -> String {
    if state == 0 { "0".to_owned() } else { format!("{state:#x}") }
}

/// An entry as scripts read it: known fields only, one blank between them. A path is not escaped.
pub fn script_line(entry: &Entry) -> String {
    let fields = [
        entry.pid.map(|pid| format!("pid={pid}")),
        entry.minor.map(|minor| format!("minor={minor}")),
        entry.state.map(|state| format!("state={}", hex(state))),
        entry.image.as_ref().map(|image| format!("args={image}")),
    ];
    fields.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// An entry as people read it: columns, `-` for what is not known.
pub fn people_line(entry: &Entry) -> String {
    let dash = || "-".to_owned();
    format!(
        "{:>8} {:>4} {:>4} {:>10} {}",
        entry.pid.map_or_else(dash, |pid| pid.to_string()),
        entry.minor.map_or_else(dash, |minor| minor.to_string()),
        entry.state.map_or_else(dash, hex),
        entry.image.as_ref().map_or("-", |image| image.kind.name()),
        entry.image.as_ref().map_or("-", |image| image.path.as_str()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::VbdEntry;
    use crate::testing::{FakeTapdisk, Script};

    fn vbd(minor: u16, state: u32, image: Option<&str>) -> VbdEntry {
        VbdEntry { minor: Minor(minor), state, image: image.map(|i| i.parse().unwrap()), rings: Vec::new() }
    }

    fn lines(dir: &ControlDir, filter: &Filter) -> Vec<String> {
        let (entries, problems) = gather(dir, filter).unwrap();
        assert!(problems.is_empty(), "{problems:?}");
        entries.iter().map(script_line).collect()
    }

    fn two_disks() -> FakeTapdisk {
        let vbds = vec![vbd(1, 0x2a, Some("vhd:/srv/a b.vhd")), vbd(0, 0, None)];
        let fake = FakeTapdisk::start(Script::Always(Reply::List { vbds }));
        for _ in 0..3 {
            minors::allocate(&fake.dir).unwrap();
        }
        fake
    }

    #[test]
    fn lines_for_scripts_name_known_fields_only() {
        let fake = two_disks();
        assert_eq!(
            lines(&fake.dir, &Filter::default()),
            ["pid=4711 minor=1 state=0x2a args=vhd:/srv/a b.vhd", "pid=4711 minor=0 state=0", "minor=2"]
        );
    }

    #[test]
    fn lines_for_people_have_columns_and_dashes() {
        let fake = two_disks();
        let (entries, _) = gather(&fake.dir, &Filter::default()).unwrap();
        let lines: Vec<_> = entries.iter().map(people_line).collect();
        assert_eq!(
            lines,
            [
                "    4711    1 0x2a        vhd /srv/a b.vhd",
                "    4711    0    0          - -",
                "       -    2    -          - -"
            ]
        );
    }

    #[test]
    fn every_criterion_must_agree() {
        let fake = two_disks();
        let count = |filter: Filter| lines(&fake.dir, &filter).len();
        let path = Some("/srv/a b.vhd".to_owned());
        assert_eq!(count(Filter { path: path.clone(), kind: Some("vhd".into()), ..Filter::default() }), 1);
        assert_eq!(count(Filter { path, kind: Some("aio".into()), ..Filter::default() }), 0);
        assert_eq!(count(Filter { kind: Some("qcow9".into()), ..Filter::default() }), 0);
        assert_eq!(count(Filter { minor: Some(Minor(2)), ..Filter::default() }), 1);
        assert_eq!(count(Filter { minor: Some(Minor(2)), pid: Some(4711), ..Filter::default() }), 0);
        assert_eq!(count(Filter { pid: Some(4711), ..Filter::default() }), 2);
    }

    #[test]
    fn dead_tapdisks_and_an_absent_folder_list_as_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let dir = ControlDir::at(folder.path().join("absent"));
        assert!(lines(&dir, &Filter::default()).is_empty());
        assert!(lines(&dir, &Filter { pid: Some(9), ..Filter::default() }).is_empty());
        let dir = ControlDir::at(folder.path());
        drop(std::os::unix::net::UnixListener::bind(dir.control_socket(9)).unwrap());
        assert!(lines(&dir, &Filter::default()).is_empty());
    }

    #[test]
    fn a_tapdisk_without_vbd_shows_its_pid_and_one_that_talks_nonsense_is_a_problem() {
        let fake = FakeTapdisk::start(Script::Always(Reply::List { vbds: Vec::new() }));
        assert_eq!(lines(&fake.dir, &Filter::default()), ["pid=4711"]);
        let fake = FakeTapdisk::start(Script::Always(Reply::Done));
        let (entries, problems) = gather(&fake.dir, &Filter::default()).unwrap();
        assert_eq!((entries.len(), problems.len()), (0, 1));
    }
}
