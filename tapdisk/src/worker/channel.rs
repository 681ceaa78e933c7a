//! The event channel of a ring, through a device of its own that can reach no other domain.
//!
//! The device is opened for one ring and restricted to the ring's domain ([`crate::xen::restrict`]). Rings share
//! nothing that an event goes through, so that what one guest does to its event channel cannot be felt by another ring.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use blkif::{DomId, Port};
use evtchn::EventChannel;

use super::{Begin, takeover};
use crate::reactor::{Reactor, Watch};

/// A bound event channel.
pub(super) struct Channel<E> {
    // Before the device, which is closed after it (see [`Watch`]).
    watch: Watch,
    events: RefCell<E>,
    port: Port,
}

impl<E: EventChannel> Channel<E> {
    /// Binds the port `remote` of domain `dom` through `events`, which was just opened for it, and watches it.
    ///
    /// # Errors
    /// The port cannot be bound.
    pub(super) fn new(
        mut events: E,
        reactor: &Rc<Reactor>,
        (dom, remote): (DomId, Port),
        begin: Begin,
    ) -> io::Result<Channel<E>> {
        let mut bind = || events.bind(dom, remote);
        let port = match begin {
            Begin::Anew => bind(),
            Begin::Again => takeover::patiently(bind),
        }?;
        Ok(Channel { watch: reactor.watch(events.as_fd())?, events: RefCell::new(events), port })
    }

    /// Whether the guest has notified since this was last asked; then the channel is masked.
    pub(super) fn take_fired(&self) -> io::Result<bool> {
        if !self.watch.take_readable() {
            return Ok(false);
        }
        // Room for more than the one port: fewer than asked for says that none is left.
        let mut ports = [Port(0); 2];
        Ok(self.events.borrow().pending(&mut ports)? > 0)
    }

    /// Lets it fire again.
    pub(super) fn unmask(&self) -> io::Result<()> {
        self.events.borrow().unmask(self.port)
    }

    /// Notifies the guest.
    pub(super) fn notify(&self) -> io::Result<()> {
        self.events.borrow().notify(self.port)
    }

    /// Frees the guest's end, to be bound again at once, by whomever. Nothing is to be done with the channel afterwards.
    pub(super) fn unbind(&self) -> io::Result<()> {
        self.events.borrow_mut().unbind(self.port)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, BorrowedFd};

    use super::*;
    use crate::executor::Scheduler;
    use crate::reactor::EngineChoice;

    /// A device that fires when the test says so.
    struct Device {
        queue: nix::sys::eventfd::EventFd,
    }

    impl AsFd for Device {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.queue.as_fd()
        }
    }

    impl EventChannel for Device {
        fn restrict(&self, _: DomId) -> io::Result<()> {
            Ok(())
        }

        fn bind(&mut self, _: DomId, _: Port) -> io::Result<Port> {
            Ok(Port(1))
        }

        fn unbind(&mut self, _: Port) -> io::Result<()> {
            Ok(())
        }

        fn pending(&self, out: &mut [Port]) -> io::Result<usize> {
            self.queue.read()?;
            out[0] = Port(1);
            Ok(1)
        }

        fn unmask(&self, _: Port) -> io::Result<()> {
            Ok(())
        }

        fn notify(&self, _: Port) -> io::Result<()> {
            Ok(())
        }
    }

    fn reactor() -> Rc<Reactor> {
        Reactor::new(Rc::new(Scheduler::default()), EngineChoice::Pool).unwrap()
    }

    #[test]
    fn a_notification_is_told_once_and_to_the_ring_that_it_is_for() {
        let reactor = reactor();
        let [ours, other] = [5, 6].map(|dom| {
            let queue = nix::sys::eventfd::EventFd::new().unwrap();
            Channel::new(Device { queue }, &reactor, (DomId(dom), Port(9)), Begin::Anew).unwrap()
        });
        ours.events.borrow().queue.write(1).unwrap();
        assert!(reactor.turn(true).unwrap().events);
        assert!(ours.take_fired().unwrap());
        assert!(!ours.take_fired().unwrap() && !other.take_fired().unwrap());
    }
}
