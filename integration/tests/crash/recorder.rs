//! A folder that records what programs do to the files in it, so that it can be replayed up to any moment.
//!
//! It is a file system of the test's own, in memory (FUSE): what a program does comes to it from the kernel, whichever way the
//! program asked the kernel, by system calls or by io_uring. Files share one log, so that the order between them is known too.
//!
//! QEMU's storage daemon could record writes (`blklogwrites` below a FUSE export), and is not used: up to version 10.0 it mixes up the data of
//! writes that are in flight together (`fio --verify` with a depth of 16 sees it in seconds), it does not note a change of
//! length, and it serves single files, of which each has its own log and none can be created, linked or removed.
//!
//! A write counts from its end on, a flush from its beginning: what a flush makes durable has ended before it began.

mod server;

use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use format::testing::{Memory, Op};
use fuser::{BackgroundSession, Config, MountOption, Session};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use self::server::{Server, State, lock};

/// A folder whose files record what is done to them. The thread that made it sees it, and the processes that this thread starts.
#[derive(Debug)]
pub struct Folder {
    state: Arc<Mutex<State>>,
    /// Kept for as long as the folder is there.
    _session: BackgroundSession,
    place: TempDir,
}

impl Folder {
    /// An empty folder.
    ///
    /// # Errors
    ///
    /// There is no FUSE here, or who runs the test may not use it.
    pub fn mount() -> io::Result<Folder> {
        // Mounts of a thread's own end with its processes, also when the test is killed: none is ever left behind.
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        let (place, state) = (TempDir::new()?, Arc::default());
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("recorded".into())];
        let session = Session::new(Server::new(Arc::clone(&state)), place.path(), &config)?.spawn()?;
        Ok(Folder { state, _session: session, place })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The path of a file.
    pub fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// Puts a file there. It counts as durable.
    pub fn put(&self, name: &str, file: &Memory) -> PathBuf {
        self.state().add(OsStr::new(name), Memory::of(file.bytes.clone(), true));
        self.path(name)
    }

    /// What a file holds now.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        let state = self.state();
        state.files[state.names[OsStr::new(name)]].bytes.clone()
    }

    /// This moment, as [`Folder::log`] tells of it.
    pub fn moment(&self) -> usize {
        self.state().log.len()
    }

    /// What was done to the file that has this name, or had it last; each with the moment from which on it is there.
    pub fn log(&self, name: &str) -> Vec<(usize, Op)> {
        let state = self.state();
        let file = state.given.iter().rev().find(|(given, ..)| given == name).map(|(_, file, _)| *file);
        let ours = (1..).zip(&state.log).filter(|(_, (of, _))| Some(*of) == file);
        ours.map(|(moment, (_, op))| (moment, op.clone())).collect()
    }

    /// The moment at which a name was given last.
    pub fn given(&self, name: &str) -> usize {
        let state = self.state();
        let given = state.given.iter().rev().find(|(given, ..)| given == name);
        given.map(|(.., moment)| *moment).expect("there is such a name")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // From the tree at once, also if something is open still: it serves that as long as it lasts.
        let _ = umount2(self.place.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn what_is_done_to_files_is_told_in_its_order() {
    use nix::fcntl::{FallocateFlags, fallocate};
    use std::os::unix::fs::FileExt;

    let Some(folder) = crate::folder() else { return };
    let other = std::fs::File::options().write(true).open(folder.put("b", &Memory::file())).unwrap();
    let file = std::fs::File::create_new(folder.path("draft")).unwrap();
    file.write_all_at(&[1; 1024], 512).unwrap();
    file.sync_data().unwrap();
    other.write_all_at(&[2; 512], 0).unwrap();
    file.set_len(2048).unwrap();
    let hole = FallocateFlags::FALLOC_FL_KEEP_SIZE | FallocateFlags::FALLOC_FL_PUNCH_HOLE;
    fallocate(&file, hole, 1024, 4096).unwrap();
    fallocate(&file, hole, 8192, 4096).unwrap();
    std::fs::hard_link(folder.path("draft"), folder.path("a")).unwrap();
    std::fs::remove_file(folder.path("draft")).unwrap();
    fallocate(&file, FallocateFlags::FALLOC_FL_ZERO_RANGE, 0, 4096).unwrap();
    let expected = [
        (1, Op::Write(512, vec![1; 1024])),
        (2, Op::Flush),
        (4, Op::SetLen(2048)),
        (5, Op::Zero(1024..2048)),
        (6, Op::Zero(0..4096)),
    ];
    assert_eq!(folder.log("a"), expected);
    assert_eq!(folder.log("draft"), expected);
    assert_eq!((folder.given("a"), folder.moment()), (5, 6));
    assert_eq!(folder.log("b"), [(3, Op::Write(0, vec![2; 512]))]);
    assert_eq!(std::fs::read(folder.path("a")).unwrap(), [0; 4096]);
    assert!(!folder.path("draft").exists());
}
