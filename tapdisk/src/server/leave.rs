//! Making room for another tapdisk: all disks are brought to rest, and the process ends while everything that is kept of
//! them stays (`tap_ctl::inflight`).

use mio::Token;
use nix::errno::Errno;
use tap_ctl::Reply;
use tap_ctl::proto::{Minor, Reopen};

use super::{Event, Server, refuse};
use crate::worker::{Answer, Command};
use crate::xen::Xen;

/// Who waits for the disks to be at rest, and how far they are.
#[derive(Debug)]
pub(super) struct Leaving {
    token: Token,
    /// Disks that were running, and go on after a failure.
    running: Vec<Minor>,
    waiting: usize,
    failed: Option<Reply>,
}

impl<X: Xen> Server<X> {
    /// Begins to bring all disks to rest. `None`: answered later.
    pub(super) fn leave(&mut self, token: Token) -> Option<Reply> {
        if self.leaving.is_some() || self.left || self.ending {
            return Some(refuse(Errno::EALREADY, "this tapdisk is ending already".into()));
        }
        if let Some(vbd) = self.vbds.iter().find(|vbd| vbd.news().is_none()) {
            return Some(refuse(Errno::EBUSY, format!("minor {} has no image open", vbd.minor)));
        }
        if self.vbds.is_empty() {
            return Some(refuse(Errno::ENODEV, "this tapdisk serves no disk".into()));
        }
        let running = self.vbds.iter().filter(|vbd| vbd.is_running()).map(|vbd| vbd.minor).collect();
        self.leaving = Some(Leaving { token, running, waiting: self.vbds.len(), failed: None });
        for open in self.vbds.iter().filter_map(|vbd| vbd.open.as_ref()) {
            let tell = self.teller();
            open.worker.send(Command::Leave(Answer::new(move |reply| tell(Event::Left(reply)))));
        }
        None
    }

    /// A disk is at rest, or failed to get there.
    pub(super) fn disk_left(&mut self, reply: Reply) {
        let Some(leaving) = &mut self.leaving else { return };
        leaving.waiting = leaving.waiting.saturating_sub(1);
        if reply != Reply::Done {
            leaving.failed = Some(reply);
        }
        if leaving.waiting > 0 {
            return;
        }
        let Some(Leaving { token, running, failed, .. }) = self.leaving.take() else { return };
        match &failed {
            None => {
                log::info!("making room for another tapdisk");
                self.left = true;
            }
            Some(_) => running.into_iter().for_each(|minor| self.go_on(minor)),
        }
        self.answer(token, &failed.unwrap_or(Reply::Done));
        self.flush_client(token);
    }

    fn go_on(&mut self, minor: Minor) {
        let Ok(open) = self.open_vbd(minor) else { return };
        // EINVAL: it was the one that failed, and never stopped.
        let answer = Answer::new(move |reply| match reply {
            Reply::Error { errno, message } if errno != libc::EINVAL => {
                log::error!("minor {minor}: cannot go on: {message}");
            }
            _ => {}
        });
        open.worker.send(Command::Unpause(Reopen::default(), answer));
    }
}
