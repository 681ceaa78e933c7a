//! `vhd-util scan`: one line for each of many images.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::args::Args;
use super::disk::{Disk, open_parent};
use super::query::LOOK;
use super::{Failure, errno_of};
use crate::{DiskType, Error, OpenOptions, SECTOR_SIZE, print};

pub(super) const OPTIONS: &str = "m:fcl:pavM";
pub(super) const USAGE: &str = "usage: [OPTIONS] FILES\noptions: [-m match filter] [-f fast] [-c continue on failure] \
                                [-l LVM volume group] [-p pretty print] [-a scan parents] [-v verbose] [-M print marker and key hash] [-h \
                                help]";

/// What is printed of an image.
struct Entry {
    name: String,
    path: PathBuf,
    facts: String,
    hidden: bool,
    parent: Option<PathBuf>,
}

/// An image that could not be scanned.
struct Fault {
    name: String,
    errno: i32,
    doing: &'static str,
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let mut names = args.operands().iter().map(PathBuf::from).collect::<Vec<_>>();
    // The volumes of a group have their names in one folder.
    let group = args.path('l').map(|group| Path::new("/dev").join(group));
    if let Some(group) = &group {
        names.iter_mut().for_each(|name| *name = group.join(&*name));
    }
    match (args.path('m'), &group) {
        (Some(pattern), None) => names.extend(expand(pattern)?),
        (Some(pattern), Some(group)) => names.extend(expand(&group.join(pattern))?),
        (None, Some(group)) if names.is_empty() => names.extend(expand(&group.join("*"))?),
        (None, _) => {}
    }
    let style = Style { full: args.has('v') };
    let mut entries = Vec::new();
    let mut at = 0_usize;
    while let Some(name) = names.get(at).cloned() {
        at = at.saturating_add(1);
        let scanned =
            if is_raw_volume(&name, group.is_some()) { scan_raw(&name) } else { scan(&name, args.has('M')) };
        match scanned {
            Ok(entry) => {
                let unseen =
                    |parent: &&PathBuf| names.iter().all(|n| n.canonicalize().ok().as_ref() != Some(*parent));
                let parent = entry.parent.as_ref().filter(|_| args.has('a')).filter(unseen).cloned();
                names.extend(parent);
                entries.push(entry);
            }
            Err(Fault { name, errno, doing }) => {
                if !args.has('p') {
                    print_all(&entries, style, out)?;
                    entries.clear();
                }
                writeln!(out, "vhd={name} scan-error=-{errno} error-message='{doing}'")?;
                if !args.has('c') {
                    return Err(Failure::silent(errno));
                }
            }
        }
    }
    if args.has('p') { print_trees(entries, style, out) } else { print_all(&entries, style, out) }
}

/// Storage managers name the volumes that hold a VHD `VHD-`; what is in the others is no image.
fn is_raw_volume(name: &Path, volumes: bool) -> bool {
    let named = name.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"VHD-"));
    volumes && !named
}

/// What is printed of a raw volume.
fn scan_raw(name: &Path) -> Result<Entry, Fault> {
    let text = name.display().to_string();
    let disk = Disk::open(name, false).map_err(|error| Fault {
        name: text.clone(),
        errno: errno_of(&error),
        doing: "opening file",
    })?;
    let facts = format!("capacity={0} size={0} hidden=1", disk.size);
    Ok(Entry { name: text, path: disk.path, facts, hidden: true, parent: None })
}

/// Reads one image.
fn scan(name: &Path, with_marker: bool) -> Result<Entry, Fault> {
    let text = name.display().to_string();
    let fault = |doing| move |errno| Fault { name: name.display().to_string(), errno, doing };
    let disk = Disk::open(name, false).map_err(|error| fault("opening file")(errno_of(&error)))?;
    // Only what could be served counts here: an image that only its end footer explains is an error.
    let options = OpenOptions { trust_end: false, ..LOOK };
    let vhd = disk.vhd(&options).map_err(|error| fault("opening file")(error.errno()))?;
    if vhd.kind() == DiskType::Fixed {
        return Err(fault("opening file")(libc::EINVAL));
    }
    let mut facts = format!(
        "capacity={} size={} hidden={}",
        vhd.sectors().saturating_mul(SECTOR_SIZE),
        disk.size,
        vhd.footer().hidden
    );
    if with_marker {
        let marker = vhd.batmap().map_or(0, |(batmap, _)| batmap.marker);
        let hash = vhd.key_hash().map(|key| print::hex(&key.hash)).unwrap_or_default();
        facts += &format!(" marker={marker} keyhash={hash}");
    }
    let hidden = vhd.footer().hidden != 0;
    let parent = match open_parent(&disk, &vhd, &LOOK) {
        Ok(parent) => parent.map(|parent| parent.disk.path),
        Err(Error::NoParentName) => return Err(fault("getting parent")(libc::EINVAL)),
        Err(error) => return Err(fault("getting parent")(error.errno())),
    };
    Ok(Entry { name: text, path: disk.path, facts, hidden, parent })
}

/// How names are printed.
#[derive(Clone, Copy)]
struct Style {
    /// Whole paths, not only their last parts.
    full: bool,
}

impl Style {
    fn name(self, path: &Path) -> String {
        let last = path.file_name().filter(|_| !self.full);
        last.unwrap_or(path.as_os_str()).display().to_string()
    }
}

fn print_all(entries: &[Entry], style: Style, out: &mut dyn Write) -> Result<(), Failure> {
    entries.iter().try_for_each(|entry| print_one(entry, style, 0, "", out))
}

fn print_one(
    entry: &Entry,
    style: Style,
    depth: usize,
    note: &str,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let indent = "   ".repeat(depth);
    let parent = entry.parent.as_ref().map_or("none".into(), |parent| style.name(parent));
    let name = style.name(Path::new(&entry.name));
    writeln!(out, "{indent}vhd={name} {} parent={parent}{note}", entry.facts)?;
    Ok(())
}

/// Prints every image below its parent, in the order of their names. Among children the hidden ones are last, among trees those
/// whose root is hidden are first.
fn print_trees(mut entries: Vec<Entry>, style: Style, out: &mut dyn Write) -> Result<(), Failure> {
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let mut children = BTreeMap::<&Path, Vec<&Entry>>::new();
    let mut pending = Vec::new();
    for entry in &entries {
        match &entry.parent {
            Some(parent) if entries.iter().any(|other| other.path == *parent) => {
                children.entry(parent).or_default().push(entry);
            }
            Some(_) => pending.push((entry, 0_usize, " (not found in scan)")),
            None => pending.push((entry, 0, "")),
        }
    }
    pending.sort_by_key(|(entry, ..)| !entry.hidden);
    // Depth first, without recursion, as a chain may be long.
    pending.reverse();
    while let Some((entry, depth, note)) = pending.pop() {
        print_one(entry, style, depth, note, out)?;
        let mut below = children.remove(entry.path.as_path()).unwrap_or_default();
        below.sort_by_key(|child| child.hidden);
        pending.extend(below.into_iter().rev().map(|child| (child, depth.saturating_add(1), "")));
    }
    Ok(())
}

/// Files whose name matches the last part of the pattern, sorted.
fn expand(pattern: &Path) -> Result<Vec<PathBuf>, Failure> {
    let Some(last) = pattern.file_name() else { return Ok(Vec::new()) };
    let folder = pattern.parent().unwrap_or(Path::new(""));
    let listed = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let mut names = Vec::new();
    for entry in fs::read_dir(listed)? {
        let name = entry?.file_name();
        let hidden = name.as_encoded_bytes().first() == Some(&b'.');
        if !hidden && matches(last.as_encoded_bytes(), name.as_encoded_bytes()) {
            names.push(folder.join(name));
        }
    }
    names.sort();
    Ok(names)
}

/// Whether a name matches a pattern of literal bytes, `?` for any one and `*` for any number of them.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut rest_of_pattern, mut rest_of_name) = (pattern, name);
    // Where to go on when the last star takes one byte more.
    let mut retry: Option<(&[u8], &[u8])> = None;
    loop {
        match (rest_of_pattern.split_first(), rest_of_name.split_first()) {
            (Some((b'*', after)), _) => {
                rest_of_pattern = after;
                retry = Some((after, rest_of_name));
                continue;
            }
            (Some((&p, pattern)), Some((&n, name))) if p == b'?' || p == n => {
                (rest_of_pattern, rest_of_name) = (pattern, name);
                continue;
            }
            (None, None) => return true,
            _ => {}
        }
        let Some((after, from)) = retry else { return false };
        let Some((_, from)) = from.split_first() else { return false };
        (rest_of_pattern, rest_of_name) = (after, from);
        retry = Some((after, from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_a_shell() {
        for (pattern, name, expected) in [
            ("*.vhd", "a.vhd", true),
            ("*.vhd", "a.vhdx", false),
            ("s?.vhd", "s1.vhd", true),
            ("s?.vhd", "s.vhd", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b*", "xxbxxaxx", false),
            ("", "", true),
            ("*", "", true),
            ("a", "", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }
}
