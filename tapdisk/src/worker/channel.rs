//! The event channel of a ring, through a device of its own that can reach no other domain.
//!
//! The device is opened for one ring and **restricted** to the ring's domain before anything is bound through it
//! (`IOCTL_EVTCHN_RESTRICT_DOMID`, Linux `drivers/xen/evtchn.c`): the kernel binds nothing else through it from then on. Rings share
//! nothing that an event goes through, so that what one guest does to its event channel cannot be felt by another ring.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Once;

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
    /// Binds the port `remote` of domain `dom` through `events`, which was just opened, and watches it.
    ///
    /// # Errors
    /// The kernel refuses the restriction for another reason than not knowing it, or the port cannot be bound.
    pub(super) fn new(
        mut events: E,
        reactor: &Rc<Reactor>,
        (dom, remote): (DomId, Port),
        begin: Begin,
    ) -> io::Result<Channel<E>> {
        confine(&events, dom)?;
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

/// Restricts a device to a domain, where the kernel can.
fn confine(events: &impl EventChannel, dom: DomId) -> io::Result<()> {
    // A disk of our own for dom0 itself, and the kernel restricts nothing to domain 0.
    if dom == DomId(0) {
        return Ok(());
    }
    match events.restrict(dom) {
        // The device answers ENOSYS to what it does not know.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::ENOTTY)) => {
            static TOLD: Once = Once::new();
            TOLD.call_once(|| {
                log::warn!(
                    "this kernel cannot restrict event channels to one domain; they are not restricted"
                );
            });
            Ok(())
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, BorrowedFd};

    use super::*;
    use crate::executor::Scheduler;
    use crate::reactor::EngineChoice;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Done {
        Restricted(DomId),
        Bound(DomId, Port),
    }

    /// A device that notes what is done with it.
    struct Device {
        queue: nix::sys::eventfd::EventFd,
        done: Rc<RefCell<Vec<Done>>>,
        restriction: Option<i32>,
    }

    impl AsFd for Device {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.queue.as_fd()
        }
    }

    impl EventChannel for Device {
        fn restrict(&self, dom: DomId) -> io::Result<()> {
            self.done.borrow_mut().push(Done::Restricted(dom));
            self.restriction.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
        }

        fn bind(&mut self, dom: DomId, remote: Port) -> io::Result<Port> {
            self.done.borrow_mut().push(Done::Bound(dom, remote));
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

    /// A channel to port 9 of domain `dom`, and what was done to get it.
    fn connect(dom: DomId, restriction: Option<i32>) -> (io::Result<Channel<Device>>, Vec<Done>) {
        let done = Rc::new(RefCell::default());
        let queue = nix::sys::eventfd::EventFd::new().unwrap();
        let device = Device { queue, done: done.clone(), restriction };
        let channel = Channel::new(device, &reactor(), (dom, Port(9)), Begin::Anew);
        let done = done.take();
        (channel, done)
    }

    #[test]
    fn a_device_is_restricted_to_the_rings_domain_before_anything_is_bound() {
        let guest = DomId(5);
        let (channel, done) = connect(guest, None);
        channel.unwrap();
        assert_eq!(done, [Done::Restricted(guest), Done::Bound(guest, Port(9))]);
    }

    #[test]
    fn a_disk_of_dom0_itself_is_not_restricted_because_that_cannot_be() {
        let (channel, done) = connect(DomId(0), None);
        channel.unwrap();
        assert_eq!(done, [Done::Bound(DomId(0), Port(9))]);
    }

    #[test]
    fn an_old_kernel_binds_all_the_same_and_any_other_refusal_is_an_error() {
        for errno in [libc::ENOSYS, libc::ENOTTY] {
            assert_eq!(connect(DomId(5), Some(errno)).1.len(), 2);
        }
        let (refused, done) = connect(DomId(5), Some(libc::EACCES));
        assert_eq!(refused.err().and_then(|error| error.raw_os_error()), Some(libc::EACCES));
        assert_eq!(done, [Done::Restricted(DomId(5))]);
    }

    #[test]
    fn a_notification_is_told_once_and_to_the_ring_that_it_is_for() {
        let reactor = reactor();
        let [ours, other] = [5, 6].map(|dom| {
            let queue = nix::sys::eventfd::EventFd::new().unwrap();
            let device = Device { queue, done: Rc::default(), restriction: None };
            Channel::new(device, &reactor, (DomId(dom), Port(9)), Begin::Anew).unwrap()
        });
        ours.events.borrow().queue.write(1).unwrap();
        assert!(reactor.turn(true).unwrap().events);
        assert!(ours.take_fired().unwrap());
        assert!(!ours.take_fired().unwrap() && !other.take_fired().unwrap());
    }
}
