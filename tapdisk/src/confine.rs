//! What a tapdisk gives up before it looks at anything that a guest, an image or a peer wrote.
//!
//! A guest's requests and an image's metadata are judged in this process. If one of them finds a fault in it, what it can
//! reach is what the process can do: so the process keeps what serving disks takes, and nothing else.
//!
//! | given up | how | what is left to a tapdisk with a porter | to its porter | to a tapdisk without one |
//! |---|---|---|---|---|
//! | root's user id | setresuid(2) | – | it | it, if it was root's |
//! | capabilities | dropped from every set, for good | – | `DAC_OVERRIDE`, `SYS_PTRACE` | `DAC_OVERRIDE`, `IPC_LOCK` |
//! | new privileges | `no_new_privs` | – | – | – |
//! | files by name | with Landlock ([`folders`]) | what every program reads | where a tapdisk has to go, and the folders of images; everything, if the administrator lists none | like the porter |
//! | system calls | a filter that lets through a list and answers `EPERM` to the rest | files, sockets of three families, threads, memory, io_uring, ioctls of open devices | the same | the same |
//!
//! [`crate::porter`] says who has a porter. So there is no other program to start, no mount, no namespace, module, trace, key or signal to another process. A system call
//! that is not on the list fails instead of killing the process: what we have overlooked shall cost one operation, not a guest's disk.
//!
//! io_uring's operations pass by the filter. They open, read and connect, which the filter allows as well.

pub mod folders;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::unistd::{User, setgroups, setresgid, setresuid};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use tap_ctl::ControlDir;

use crate::porter;

/// What stays of root's capabilities where there is no porter.
///
/// `DAC_OVERRIDE`: images belong to whomever the administrator likes. `IPC_LOCK`: io_uring counts registered memory as locked.
const KEPT: &[Capability] = &[Capability::CAP_DAC_OVERRIDE, Capability::CAP_IPC_LOCK];

/// What stays of them in the porter. `SYS_PTRACE`: without it the kernel does not tell who has a file open, if that process can do more.
const PORTERS: &[Capability] = &[Capability::CAP_DAC_OVERRIDE, Capability::CAP_SYS_PTRACE];

/// System calls that are allowed with any arguments.
///
/// `mknodat` makes FIFOs only, without its capability. `prctl` names threads; what it could give back is gone.
const ALLOWED: &[i64] = &[
    // Bytes.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_lseek,
    libc::SYS_copy_file_range,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_ioctl,
    // Files by name.
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_umask,
    libc::SYS_memfd_create,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_eventfd2,
    libc::SYS_signalfd4,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_pipe2,
    libc::SYS_futex,
    libc::SYS_membarrier,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // Sockets; which families, `filter` says.
    libc::SYS_socketpair,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Memory.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_msync,
    libc::SYS_brk,
    // Threads, signals to them, and the end.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_prctl,
    libc::SYS_sched_getaffinity,
    // What one may know.
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_prlimit64,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// The same under older names, which 64-bit ARM does not have.
#[cfg(target_arch = "x86_64")]
const OLDER: &[i64] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_symlink,
    libc::SYS_rename,
    libc::SYS_unlink,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_wait,
    libc::SYS_time,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[i64] = &[];

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The capabilities could not be dropped.
    #[error("cannot drop capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// The list of folders cannot be read.
    #[error("cannot read {list}, which says where files may be opened: {why}", list = folders::LIST)]
    List {
        /// What the system says.
        why: std::io::Error,
    },
    /// There is such a list, and the kernel cannot do as it says.
    #[error(
        "cannot keep to the folders of {list}; does the kernel have Landlock (Linux 5.19, lsm=landlock)? Without an entry in \
         that file nothing is refused. {why}", list = folders::LIST
    )]
    Folders {
        /// What the kernel says.
        #[from]
        why: landlock::RulesetError,
    },
    /// Root's rights could not be given up.
    #[error(
        "cannot become the user {user}: {why}; a tapdisk started by root needs CAP_SETUID and CAP_SETGID for that"
    )]
    User {
        /// The name.
        user: String,
        /// What the system says.
        why: Errno,
    },
    /// The kernel does not take the filter, or there is none for this processor.
    #[error("cannot install the filter of system calls; does the kernel have CONFIG_SECCOMP_FILTER? {0}")]
    Filter(#[from] seccompiler::Error),
}

/// Whether the folders for images are limited.
static LIMITED: AtomicBool = AtomicBool::new(false);

/// What there is to say of a file that may not be opened.
pub fn why_refused() -> &'static str {
    match (porter::is_engaged(), LIMITED.load(Ordering::Relaxed)) {
        (false, false) => "",
        (false, true) => {
            "; this tapdisk opens files only in the folders that /etc/xenio/disk-folders had when it started"
        }
        (true, false) => {
            "; what was not named by the administrator is not opened, nor by an image once it is open"
        }
        (true, true) => {
            "; what was not named by the administrator is not opened, nor by an image once it is open, nor anything outside of the \
             folders that /etc/xenio/disk-folders had when this tapdisk started"
        }
    }
}

/// Confines the calling thread, and all that it will start, where there is no porter. The process calls it while it has one thread.
///
/// # Errors
/// The process is not to go on.
pub fn this_thread(dir: &ControlDir) -> Result<(), Error> {
    keep_to_folders(dir)?;
    give_up(KEPT)
}

/// The same for a porter.
///
/// # Errors
/// The process is not to go on.
pub fn porter(dir: &ControlDir) -> Result<(), Error> {
    keep_to_folders(dir)?;
    give_up(PORTERS)
}

/// The same for a tapdisk that has a porter: it becomes `user`. `folders` stay open to it, as far as they are to that user.
///
/// # Errors
/// The process is not to go on.
pub fn as_user(user: &User, folders: &[PathBuf]) -> Result<(), Error> {
    LIMITED.store(!listed()?.is_empty(), Ordering::Relaxed);
    if let Err(why) = folders::restrict_to_own(folders) {
        // Its user's rights are what it is kept to; this is for what anybody may read.
        log::info!("this kernel does not refuse files to a process: {why}");
    }
    // It takes a capability that goes with the user.
    clear_bounding()?;
    become_user(user).map_err(|why| Error::User { user: user.name.clone(), why })?;
    give_up(&[])
}

/// The folders for images, if they are limited.
fn listed() -> Result<Vec<PathBuf>, Error> {
    folders::listed(Path::new(folders::LIST)).map_err(|why| Error::List { why })
}

fn keep_to_folders(dir: &ControlDir) -> Result<(), Error> {
    let folders = listed()?;
    if !folders.is_empty() {
        folders::restrict(&folders, dir)?;
        LIMITED.store(true, Ordering::Relaxed);
    }
    Ok(())
}

fn become_user(user: &User) -> Result<(), Errno> {
    // The groups first: it takes root to change them.
    setgroups(&[])?;
    setresgid(user.gid, user.gid, user.gid)?;
    setresuid(user.uid, user.uid, user.uid)
}

/// Gives up capabilities and system calls.
fn give_up(kept: &[Capability]) -> Result<(), Error> {
    drop_capabilities(kept)?;
    for program in programs().map_err(seccompiler::Error::Backend)? {
        seccompiler::apply_filter(&program)?;
    }
    Ok(())
}

fn drop_capabilities(kept: &[Capability]) -> Result<(), caps::errors::CapsError> {
    let had = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = had.iter().copied().filter(|capability| kept.contains(capability)).collect();
    clear_bounding()?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

/// Without SETPCAP there is no program to be started that could use the bounding set; nor is there with it, after the filter.
fn clear_bounding() -> Result<(), caps::errors::CapsError> {
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Ambient)?;
        caps::clear(None, CapSet::Bounding)?;
    }
    Ok(())
}

/// Two filters, because one knows a single answer to what it does not allow. The last of them lets no more be installed.
fn programs() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let compile = |rules, otherwise, then| -> Result<BpfProgram, seccompiler::BackendError> {
        SeccompFilter::new(rules, otherwise, then, std::env::consts::ARCH.try_into()?)?.try_into()
    };
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    // A filter cannot see its arguments, which are behind a pointer; the C library goes on with the older call.
    let absent = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    Ok([
        compile(BTreeMap::from([(libc::SYS_clone3, Vec::new())]), SeccompAction::Allow, absent)?,
        compile(allowed()?, refuse, SeccompAction::Allow)?,
    ])
}

fn allowed() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let first = |operator, value| {
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Dword, operator, value)?;
        SeccompRule::new(vec![condition])
    };
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];
    let families = families.map(|family| first(SeccompCmpOp::Eq, family.unsigned_abs().into()));
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    let mut rules: BTreeMap<_, _> = ALLOWED.iter().chain(OLDER).map(|&call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_socket, families.into_iter().collect::<Result<_, _>>()?);
    rules.insert(libc::SYS_clone, vec![first(SeccompCmpOp::MaskedEq(thread), thread)?]);
    // The other filter answers it.
    rules.insert(libc::SYS_clone3, Vec::new());
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::{TcpListener, UdpSocket};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use super::*;

    /// What a thread of its own finds after it was confined.
    fn confined<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
        let thread = std::thread::spawn(|| {
            give_up(KEPT).unwrap();
            what()
        });
        thread.join().unwrap()
    }

    fn refused<T>(result: io::Result<T>) -> bool {
        result.err().and_then(|error| error.raw_os_error()) == Some(libc::EPERM)
    }

    #[test]
    fn no_program_starts_and_nothing_belongs_to_others_from_within() {
        let dir = tempfile::tempdir().unwrap();
        let (root, file) = (dir.path().to_owned(), dir.path().join("file"));
        std::fs::write(&file, "x").unwrap();
        confined(move || {
            assert!(refused(Command::new("/bin/true").status()));
            assert!(refused(std::os::unix::fs::chroot(&root)));
            assert!(refused(std::os::unix::fs::chown(&file, Some(0), Some(0))));
            assert!(refused(std::fs::set_permissions(&file, PermissionsExt::from_mode(0o4755))));
            assert!(refused(nix::sys::signal::kill(nix::unistd::getpid(), None).map_err(io::Error::from)));
        });
    }

    #[test]
    fn what_serving_takes_works_from_within() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        confined(move || {
            std::fs::write(&file, "x").unwrap();
            std::fs::rename(&file, file.with_extension("new")).unwrap();
            assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
            UnixStream::pair().unwrap();
            TcpListener::bind("127.0.0.1:0").unwrap();
            UdpSocket::bind("127.0.0.1:0").unwrap();
        });
    }

    #[test]
    fn the_kernel_says_that_nothing_can_come_back() {
        let status = confined(|| std::fs::read_to_string("/proc/thread-self/status").unwrap());
        let value =
            |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_owned();
        let bits = |key: &str| u64::from_str_radix(&value(key), 16).unwrap();
        let kept = KEPT.iter().fold(0, |mask, capability| mask | capability.bitmask());
        assert_eq!(bits("CapEff:") & !kept, 0);
        assert_eq!(bits("CapPrm:") & !kept, 0);
        assert_eq!(bits("CapInh:"), 0);
        assert_eq!((value("NoNewPrivs:").as_str(), value("Seccomp:").as_str()), ("1", "2"));
    }
}
