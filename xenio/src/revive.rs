//! Tapdisks that died: seeing to it that others go on with their disks, while the loop goes on.
//!
//! What tells a death is the end of the tapdisk's control connection, or that none can be made. That is when to act; whether it
//! is dead, and its last I/O has ended, the kernel says by two locks: on the minor's marker, and on the image. So no process is
//! ever watched by its number, which another one may have by now, and a xenio that was started later finds the same out by
//! the same means.
//!
//! Each revival has a thread, which stays for as long as the tapdisk that it started: somebody has to take note of its end, or
//! the system keeps its number.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use mio::{Registry, Token, Waker};
use nix::errno::Errno;
use tap_ctl::client::{self, QUICK};
use tap_ctl::revive::{is_possible, revive};
use tap_ctl::{ControlDir, Error, Reply, Request};

use crate::device::Vbd;
use crate::problem::Problem;

/// Stack of a revival's thread, in bytes: there may be many, and they do little.
const STACK: usize = 256 << 10;

/// A disk whose tapdisk has died, and what came of it.
#[derive(Debug)]
pub struct Outcome {
    /// The disk, with its dead tapdisk.
    pub vbd: Vbd,
    /// The process id of the next one, or of the same one if it lives, or why there is none.
    pub next: Result<i32, Problem>,
}

/// Whether a tapdisk serves its disk still: one that we did not listen to for long closes the connection, and nothing else.
fn lives(dir: &ControlDir, vbd: Vbd) -> bool {
    let told = client::call(dir, vbd.pid, &Request::List, Some(QUICK));
    matches!(told, Ok(Reply::List { vbds }) if vbds.iter().any(|entry| entry.minor == vbd.minor))
}

/// All revivals under way.
#[derive(Debug)]
pub struct Revivals {
    dir: ControlDir,
    program: PathBuf,
    waker: Arc<Waker>,
    sender: Sender<(Vbd, Result<i32, Error>)>,
    receiver: Receiver<(Vbd, Result<i32, Error>)>,
    under_way: HashSet<Vbd>,
}

impl Revivals {
    /// None yet. `token`: what the loop is woken with when there are outcomes. `program`: the tapdisk.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn new(registry: &Registry, token: Token, dir: ControlDir, program: PathBuf) -> io::Result<Revivals> {
        let (sender, receiver) = channel();
        let waker = Arc::new(Waker::new(registry, token)?);
        Ok(Revivals { dir, program, waker, sender, receiver, under_way: HashSet::new() })
    }

    /// Begins to have another tapdisk go on with a disk, if that is not under way already. False: the disk has left nothing to
    /// go on with.
    pub fn begin(&mut self, vbd: Vbd) -> bool {
        if self.under_way.contains(&vbd) {
            return true;
        }
        if !is_possible(&self.dir, vbd.minor) {
            return false;
        }
        let (dir, program) = (self.dir.clone(), self.program.clone());
        let (sender, waker) = (self.sender.clone(), self.waker.clone());
        let work = move || {
            let (outcome, child) = match lives(&dir, vbd) {
                true => (Ok(vbd.pid), None),
                false => match revive(&dir, &program, vbd.minor, vbd.pid) {
                    Ok(revived) => (Ok(revived.pid), revived.child),
                    Err(error) => (Err(error), None),
                },
            };
            // Both fail only while the process ends.
            if sender.send((vbd, outcome)).is_ok() {
                let _ = waker.wake();
            }
            drop((sender, waker));
            if let Some(mut child) = child
                && let Err(error) = child.wait()
            {
                log::warn!("tapdisk {}: no news of its end: {error}", child.id());
            }
        };
        match std::thread::Builder::new().name("revive".into()).stack_size(STACK).spawn(work) {
            Ok(_) => drop(self.under_way.insert(vbd)),
            Err(error) => log::error!("no thread to go on with minor {}: {error}", vbd.minor),
        }
        self.under_way.contains(&vbd)
    }

    /// What has come of them since the last call.
    pub fn outcomes(&mut self) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        while let Ok((vbd, outcome)) = self.receiver.try_recv() {
            self.under_way.remove(&vbd);
            let next = outcome.map_err(|error| {
                let text = format!("tapdisk {} has ended, and no other one can go on: {error}", vbd.pid);
                Problem::new(Errno::ENXIO, text)
            });
            outcomes.push(Outcome { vbd, next });
        }
        outcomes
    }
}
