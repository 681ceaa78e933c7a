//! NBD clients on the disk's thread.

use std::ops::Deref;
use std::rc::Rc;

use super::seat::{Seat, Work};
use super::thread::State;
use crate::flight::What;
use crate::image::Disk;
use crate::nbd::{Client, Clients, Source};
use crate::xen::Xen;

/// The disk as NBD clients get at it.
struct ForClients {
    seat: Rc<Seat>,
    clients: Rc<Clients>,
}

/// A request's hold on the disk.
struct Held(Work);

impl Deref for Held {
    type Target = Disk;

    fn deref(&self) -> &Disk {
        &self.0.disk
    }
}

impl Source for ForClients {
    type Held = Held;

    async fn hold(&self, what: What) -> Option<Held> {
        self.seat.work_soon(what, || self.clients.is_stopped()).await.map(Held)
    }
}

impl<X: Xen> State<X> {
    /// Serves an NBD client from now on.
    pub(super) fn enter(&mut self, client: Client) {
        let source = Rc::new(ForClients { seat: self.seat.clone(), clients: self.clients.clone() });
        for task in self.clients.enter(client, source, &self.io) {
            self.executor.spawn(task);
        }
    }

    /// Sends all NBD clients away, for good.
    pub(super) fn send_clients_away(&self) {
        self.clients.stop();
        self.seat.stir();
    }
}
