//! The ports of one simulated domain: a shared file, one entry of 32 bytes for each port.
//!
//! | word | holds |
//! |---|---|
//! | 0 | [`State`] |
//! | 1, 2 | the other end: domain and port; for an unbound port the domain that may bind |
//! | 3 | flags: pending, masked |
//! | 4, 5 | the device that owns the port |
//!
//! Words 0, 1, 2, 4 and 5 change under the folder's lock only. Word 3 is changed by notifications and unmasking, each one
//! atomic operation. A port that is not masked is never pending: raising it then delivers it and masks it at once.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use evtchn::{DomId, Port};

use crate::sim::memory::SharedFile;

/// Ports of a domain; number 0 is never given out, as in Xen.
const PORTS: u32 = 1024;
const ENTRY_SIZE: usize = 32;

const PENDING: u32 = 1;
const MASKED: u32 = 2;

/// What a port is in use for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// For nothing.
    Free,
    /// Waits to be bound by the other domain.
    Unbound,
    /// Connected with the other end.
    Bound,
}

/// An open event channel device: the process and a number of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// Process id.
    pub pid: u32,
    /// Counts the devices that the process opened.
    pub number: u32,
}

/// The ports of a domain.
#[derive(Debug)]
pub struct PortTable {
    file: SharedFile,
}

impl PortTable {
    fn path(dir: &Path, dom: DomId) -> PathBuf {
        dir.join(format!("dom{dom}.ports"))
    }

    /// Opens the ports of a domain that has some.
    pub fn open(dir: &Path, dom: DomId) -> io::Result<PortTable> {
        Ok(PortTable { file: SharedFile::open(&PortTable::path(dir, dom))? })
    }

    /// Opens the ports of a domain. Under the folder's lock.
    pub fn open_or_create(dir: &Path, dom: DomId) -> io::Result<PortTable> {
        match PortTable::open(dir, dom) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let file = SharedFile::create(&PortTable::path(dir, dom), PORTS as usize * ENTRY_SIZE)?;
                Ok(PortTable { file })
            }
            other => other,
        }
    }

    fn word(&self, port: Port, word: usize) -> &AtomicU32 {
        self.file.word(port.0 as usize * ENTRY_SIZE + word * size_of::<u32>())
    }

    /// The state of a port; `None` if there is no such port.
    pub fn state(&self, port: Port) -> Option<State> {
        if port.0 >= PORTS {
            return None;
        }
        match self.word(port, 0).load(Ordering::SeqCst) {
            1 => Some(State::Unbound),
            2 => Some(State::Bound),
            _ => Some(State::Free),
        }
    }

    fn set_state(&self, port: Port, state: State) {
        self.word(port, 0).store(state as u32, Ordering::SeqCst);
    }

    /// A port that is free.
    pub fn free_port(&self) -> Option<Port> {
        (1..PORTS).map(Port).find(|port| self.state(*port) == Some(State::Free))
    }

    /// The other end of a port.
    pub fn remote(&self, port: Port) -> (DomId, Port) {
        let dom = self.word(port, 1).load(Ordering::SeqCst);
        (DomId(u16::try_from(dom).unwrap_or(u16::MAX)), Port(self.word(port, 2).load(Ordering::SeqCst)))
    }

    /// The device that owns a port.
    pub fn owner(&self, port: Port) -> Device {
        Device {
            pid: self.word(port, 4).load(Ordering::SeqCst),
            number: self.word(port, 5).load(Ordering::SeqCst),
        }
    }

    /// Gives a free port to a device. Under the folder's lock.
    pub fn take(&self, port: Port, owner: Device, state: State, dom: DomId, remote: Port) {
        self.word(port, 1).store(u32::from(dom.0), Ordering::SeqCst);
        self.word(port, 2).store(remote.0, Ordering::SeqCst);
        self.word(port, 3).store(0, Ordering::SeqCst);
        self.word(port, 4).store(owner.pid, Ordering::SeqCst);
        self.word(port, 5).store(owner.number, Ordering::SeqCst);
        self.set_state(port, state);
    }

    /// Connects an unbound port with the port that was bound to it. Under the folder's lock.
    pub fn connect(&self, port: Port, dom: DomId, remote: Port) {
        self.word(port, 1).store(u32::from(dom.0), Ordering::SeqCst);
        self.word(port, 2).store(remote.0, Ordering::SeqCst);
        self.set_state(port, State::Bound);
    }

    /// Makes a connected port wait for `dom` again. Under the folder's lock.
    pub fn disconnect(&self, port: Port, dom: DomId) {
        self.word(port, 1).store(u32::from(dom.0), Ordering::SeqCst);
        self.word(port, 2).store(0, Ordering::SeqCst);
        self.set_state(port, State::Unbound);
    }

    /// Makes a port free. Under the folder's lock.
    pub fn release(&self, port: Port) {
        self.set_state(port, State::Free);
    }

    /// An event for a port. True: it is to be delivered, and is masked from now on.
    pub fn raise(&self, port: Port) -> bool {
        let next = |flags: u32| if flags & MASKED == 0 { MASKED } else { MASKED | PENDING };
        match self.word(port, 3).fetch_update(Ordering::SeqCst, Ordering::SeqCst, |flags| Some(next(flags))) {
            Ok(before) | Err(before) => before & MASKED == 0,
        }
    }

    /// Whether a port has fired, or is just firing, and was not unmasked since.
    pub fn is_masked(&self, port: Port) -> bool {
        self.word(port, 3).load(Ordering::SeqCst) & MASKED != 0
    }

    /// Lets a port fire. True: an event waited for that; it is to be delivered, and the port stays masked.
    pub fn unmask(&self, port: Port) -> bool {
        let next = |flags: u32| if flags & PENDING == 0 { 0 } else { MASKED };
        match self.word(port, 3).fetch_update(Ordering::SeqCst, Ordering::SeqCst, |flags| Some(next(flags))) {
            Ok(before) | Err(before) => before & PENDING != 0,
        }
    }
}
