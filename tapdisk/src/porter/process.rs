//! The porter as a process: how a tapdisk starts it, and what it does until the tapdisk ends.
//!
//! The tapdisk executes its own program once more, with two sockets of [`parcel::pair`] for the standard input and output: errands come by the
//! first, clients go by the second. Before there are errands, the tapdisk sends the listener of the control socket, and the porter says that
//! it is ready, or why it is not.

use std::ffi::{CStr, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use rustix::net::RecvFlags;
use tap_ctl::ControlDir;
use tap_ctl::proto::Minor;

use super::channel::{Asked, Channel, Desk};
use super::judge::Judge;
use super::parcel;
use super::visitors::{self, Places};
use crate::confine;

/// Its name, which is not the tapdisk's: who looks for tapdisks by name is to find tapdisks.
const NAME: &CStr = c"tapdisk-porter";

/// The option that makes a tapdisk's program a porter: `--porter`.
pub const OPTION: &str = "porter";

/// Errands done at the same time; a further one fails with EAGAIN. A store that hangs holds as many as files on it are opened.
const MOST: usize = 128;

/// How long answers of a tapdisk that has ended may take to reach their clients.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Why there is no porter.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The system refused something.
    #[error("cannot start the process that opens files: {0}")]
    Start(#[from] io::Error),
    /// It has said why it cannot serve, or has ended.
    #[error("the process that opens files is not ready: {0}")]
    NotReady(String),
}

impl From<rustix::io::Errno> for StartError {
    fn from(errno: rustix::io::Errno) -> StartError {
        StartError::Start(errno.into())
    }
}

/// What a tapdisk has of its porter.
#[derive(Debug)]
pub struct Porter {
    /// Does its errands.
    pub channel: Channel,
    /// Where clients come from: a datagram for each, with a socket.
    pub visitors: OwnedFd,
    /// Its process id.
    pub pid: u32,
}

/// Starts the porter of this process, which lets clients in at `listener` from now on. `options` are this process's own.
///
/// # Errors
/// There is none; the listener is as before.
pub fn start(listener: &UnixListener, options: &[OsString], foreground: bool) -> Result<Porter, StartError> {
    let (errands, its_errands) = parcel::pair()?;
    let (visitors, its_visitors) = parcel::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(OsStr::from_bytes(NAME.to_bytes()))
        .arg(format!("--{OPTION}"))
        .args(options)
        .stdin(its_errands)
        .stdout(its_visitors);
    if !foreground {
        // It must not keep the pipe open on which who started us waits for our end.
        command.stderr(Stdio::null());
    }
    let child = command.spawn()?;
    // The command holds the porter's ends: its end is to be seen at ours.
    drop(command);
    parcel::send(errands.as_fd(), b"listener", &[listener.as_fd()])?;
    let ready = parcel::receive(errands.as_fd(), RecvFlags::empty())?;
    let ready = ready.ok_or_else(|| StartError::NotReady("it has ended; see its log".to_owned()))?;
    let ready: Result<(), String> = serde_json::from_slice(&ready.bytes).map_err(io::Error::from)?;
    ready.map_err(StartError::NotReady)?;
    Ok(Porter { channel: Channel::new(errands), visitors, pid: child.id() })
}

/// The porter's life: ends with the tapdisk. The process calls it while it has one thread, and ends when it returns.
///
/// # Errors
/// It cannot serve; the tapdisk knows.
pub fn run(dir: &ControlDir, take_over: Option<Minor>) -> io::Result<()> {
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        mask.add(signal);
    }
    // These are for the tapdisk, whose end is ours.
    mask.thread_block()?;
    // A file that may not become larger is an error of the write.
    SigSet::from(Signal::SIGXFSZ).thread_block()?;
    nix::sys::prctl::set_name(NAME)?;
    let errands = io::stdin().as_fd().try_clone_to_owned()?;
    let visitors = io::stdout().as_fd().try_clone_to_owned()?;
    let first = parcel::receive(errands.as_fd(), RecvFlags::empty())?;
    let listener = first.and_then(|parcel| parcel.descriptors.into_iter().next());
    let listener = Arc::new(UnixListener::from(listener.ok_or(Errno::EPROTO)?));
    let asker = nix::unistd::getppid().as_raw();
    let judge = Arc::new(Judge::new(dir.clone(), asker));
    if let Some(minor) = take_over {
        judge.take_over(minor);
    }
    let confined = confine::porter(dir).map_err(|error| error.to_string());
    parcel::send(errands.as_fd(), &serde_json::to_vec(&confined)?, &[])?;
    confined.map_err(io::Error::other)?;
    let places = Arc::new(Places::default());
    {
        let (listener, judge, places) = (listener.clone(), judge.clone(), places.clone());
        let door = std::thread::Builder::new().name("door".into());
        door.spawn(move || visitors::admit(&listener, visitors.as_fd(), &judge, &places))?;
    }
    attend(&Desk::new(errands, asker), &judge)?;
    // Who looks whether a tapdisk listens there is to see at once that none does.
    let _ = rustix::net::shutdown(&*listener, rustix::net::Shutdown::Both);
    places.wait_empty(LAST_WORDS);
    Ok(())
}

/// Has errands done, each on a thread of its own, until who asks has ended.
fn attend(desk: &Desk, judge: &Arc<Judge>) -> io::Result<()> {
    let busy = Arc::new(AtomicUsize::new(0));
    while let Some(asked) = desk.receive()? {
        let (give, take) = std::sync::mpsc::sync_channel::<Asked>(1);
        let (judge, mine) = (judge.clone(), Busy::new(&busy));
        let room = busy.load(Ordering::Acquire) <= MOST;
        let thread = std::thread::Builder::new().name("errand".into());
        let carry_out = move || {
            if let Ok(asked) = take.recv() {
                let outcome = judge.carry_out(&asked.errand, asked.with.as_ref().map(AsFd::as_fd));
                asked.answer(outcome);
            }
            drop(mine);
        };
        if room && thread.spawn(carry_out).is_ok() {
            // It waits for nothing else.
            let _ = give.send(asked);
        } else {
            log::warn!("{MOST} errands hang, or there is no thread for one more: it is refused");
            asked.answer(Err(Errno::EAGAIN.into()));
        }
    }
    Ok(())
}

/// One errand is being done.
struct Busy(Arc<AtomicUsize>);

impl Busy {
    fn new(all: &Arc<AtomicUsize>) -> Busy {
        all.fetch_add(1, Ordering::AcqRel);
        Busy(all.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::porter::Errand;

    #[test]
    fn errands_are_attended_to_until_the_tapdisk_ends() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = parcel::pair().unwrap();
        let us = std::process::id().cast_signed();
        let judge = Arc::new(Judge::new(ControlDir::at(dir.path()), us));
        let porter = std::thread::spawn(move || attend(&Desk::new(theirs, us), &judge));
        let channel = Channel::new(ours);
        let stranger = Errand::Open { path: dir.path().into(), how: crate::porter::How::READ };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let failure = channel.ask(&stranger, None).unwrap_err();
                        assert_ne!(failure.errno, libc::EPIPE);
                    }
                });
            }
        });
        drop(channel);
        porter.join().unwrap().unwrap();
    }
}
