//! The folders in which a tapdisk may open files, where the administrator names them.
//!
//! The kernel (Landlock) refuses the process everything else for good: it has root's user id, and without this root's files. A disk may be
//! given another image, a mirror, a log or a snapshot at any time, and what was given up does not come back; so the folders are not those of
//! one image's chain but those that the administrator keeps images in, and a tapdisk that takes over for another has those of its time.
//!
//! A rule is for the folder that has the name when the process starts, with all below it, also what is mounted there later.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError,
};
use tap_ctl::ControlDir;

/// Where the folders are listed: one absolute path a line, `#` for comments. Without it, or without a path in it, nothing is refused.
pub const LIST: &str = "/etc/xenio/disk-folders";

/// Read and written beside images.
const USED: [&str; 3] = ["/dev/null", "/dev/xen/gntdev", "/dev/xen/evtchn"];

/// Written where there is no system log.
const LOGS: &str = "/var/log/xen";

/// Read beside images: how devices and processes are, which folders are allowed, and what the C library looks names up with.
const READ: [&str; 14] = [
    "/dev/urandom",
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/xenio",
    "/lib",
    "/lib64",
    "/proc",
    "/sys",
    "/usr/lib",
];

/// Read as well by a tapdisk that has a porter: its user is not root. Names of servers are looked up for as long as it lives, and the files that
/// say how are put in the place of others meanwhile, of which the kernel's rules know nothing; so these are the folders where that is done.
const READ_AS_USER: [&str; 4] = ["/etc", "/run/NetworkManager", "/run/resolvconf", "/run/systemd/resolve"];

/// The folders of a list.
///
/// # Errors
/// The list is there and cannot be read.
pub fn listed(list: &Path) -> io::Result<Vec<PathBuf>> {
    let text = match std::fs::read_to_string(list) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read?,
    };
    Ok(text.lines().map(str::trim).filter(|line| line.starts_with('/')).map(PathBuf::from).collect())
}

/// Refuses the calling thread, and all that it starts, files elsewhere than in `folders` and where a tapdisk has to go.
///
/// # Errors
/// The kernel cannot do it.
pub(super) fn restrict(folders: &[PathBuf], dir: &ControlDir) -> Result<(), RulesetError> {
    let ours = [dir.root(), dir.all_statistics(), Path::new(LOGS)];
    let folders = folders.iter().map(PathBuf::as_path).chain(ours);
    enforce(folders, &USED, &READ, CompatLevel::HardRequirement)
}

/// The same for a tapdisk that has a porter, as far as the kernel can do it: it has nowhere to go but to `folders`.
///
/// # Errors
/// Of the system.
pub(super) fn restrict_to_own(folders: &[PathBuf]) -> Result<(), RulesetError> {
    let read = [&READ[..], &READ_AS_USER].concat();
    enforce(folders.iter().map(PathBuf::as_path), &["/dev/null"], &read, CompatLevel::BestEffort)
}

fn enforce<'a>(
    folders: impl Iterator<Item = &'a Path>,
    used: &[&str],
    read: &[&str],
    level: CompatLevel,
) -> Result<(), RulesetError> {
    // Linux 5.19 is what it takes; to shorten a file that is only open for reading is refused from 6.2 on.
    let mut rules = Ruleset::default()
        .set_compatibility(level)
        .handle_access(AccessFs::from_all(ABI::V2))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::Truncate)?
        .create()?;
    let everything = AccessFs::from_all(ABI::V3) & !BitFlags::from(AccessFs::Execute);
    for folder in folders {
        rules = allow(rules, folder, everything)?;
    }
    for file in used {
        rules = allow(rules, Path::new(file), AccessFs::ReadFile | AccessFs::WriteFile)?;
    }
    for path in read {
        rules = allow(rules, Path::new(path), AccessFs::ReadFile | AccessFs::ReadDir)?;
    }
    rules.restrict_self()?;
    Ok(())
}

/// What is not there now is not allowed later.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(place) => rules.add_rule(PathBeneath::new(place, access)),
        Err(why) => {
            log::debug!("{why}");
            Ok(rules)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_list_has_absolute_paths_and_comments() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("list");
        assert!(listed(&list).unwrap().is_empty());
        std::fs::write(&list, "# where images are\n/srv/xen\n  /mnt/nfs  \nrelative\n").unwrap();
        assert_eq!(listed(&list).unwrap(), [Path::new("/srv/xen"), Path::new("/mnt/nfs")]);
        assert!(listed(dir.path()).is_err(), "what cannot be read is not taken for nothing");
    }

    #[test]
    fn files_elsewhere_are_refused_to_root_itself() {
        let dir = tempfile::tempdir().unwrap();
        let [images, elsewhere, control] =
            ["images", "elsewhere", "control"].map(|name| dir.path().join(name));
        for folder in [&images, &elsewhere, &control] {
            std::fs::create_dir(folder).unwrap();
            std::fs::write(folder.join("file"), "x").unwrap();
        }
        let host = ControlDir::at(&control);
        let restricted = std::thread::spawn(move || {
            if let Err(why) = restrict(std::slice::from_ref(&images), &host) {
                eprintln!("skipped: this kernel has no Landlock: {why}");
                return;
            }
            for folder in [&images, &control] {
                let (file, new) = (folder.join("file"), folder.join("new"));
                File::create_new(&new).unwrap();
                std::fs::hard_link(&new, folder.join("link")).unwrap();
                std::fs::rename(&new, &file).unwrap();
                OpenOptions::new().read(true).write(true).truncate(true).open(&file).unwrap();
                UnixListener::bind(folder.join("socket")).unwrap();
                std::fs::remove_file(&file).unwrap();
            }
            let refused = |done: io::Result<()>| {
                let error = done.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
            };
            let file = elsewhere.join("file");
            refused(File::open(&file).map(drop));
            refused(OpenOptions::new().write(true).open(&file).map(drop));
            refused(File::create_new(elsewhere.join("new")).map(drop));
            refused(std::fs::remove_file(&file));
            refused(std::fs::read_dir(&elsewhere).map(drop));
            refused(File::open("/etc/shadow").map(drop));
            refused(OpenOptions::new().append(true).open("/etc/hosts").map(drop));
            File::open("/proc/self/status").unwrap();
        });
        restricted.join().unwrap();
    }

    #[test]
    fn with_a_porter_nothing_is_left_but_what_every_program_reads() {
        let dir = tempfile::tempdir().unwrap();
        let [devices, elsewhere] = ["devices", "elsewhere"].map(|name| dir.path().join(name));
        for folder in [&devices, &elsewhere] {
            std::fs::create_dir(folder).unwrap();
            std::fs::write(folder.join("file"), "x").unwrap();
        }
        let host = ControlDir::at(dir.path());
        if std::thread::spawn(move || restrict(&[], &host).is_err()).join().unwrap() {
            eprintln!("skipped: this kernel has no Landlock");
            return;
        }
        let restricted = std::thread::spawn(move || {
            restrict_to_own(std::slice::from_ref(&devices)).unwrap();
            OpenOptions::new().write(true).open(devices.join("file")).unwrap();
            OpenOptions::new().write(true).open("/dev/null").unwrap();
            for read in ["/proc/self/status", "/etc/hosts", "/etc/passwd"] {
                File::open(read).unwrap();
            }
            for (path, write) in
                [(elsewhere.join("file"), false), ("/etc/hosts".into(), true), (LOGS.into(), false)]
            {
                let opened = OpenOptions::new().read(true).append(write).open(&path);
                if let Err(error) = &opened
                    && error.kind() == io::ErrorKind::NotFound
                {
                    continue;
                }
                assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::PermissionDenied, "{}", path.display());
            }
            assert!(std::fs::remove_file(elsewhere.join("file")).is_err());
        });
        restricted.join().unwrap();
    }
}
