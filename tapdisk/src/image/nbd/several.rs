//! The connections of a disk, all to one server.
//!
//! A server that announces `NBD_FLAG_CAN_MULTI_CONN` promises that its connections see each other's writes, and that a flush
//! on any of them covers all that was answered on all of them (NBD project, `proto.md`, "Flag fields"). Such a server is
//! asked for another connection while all there are have much to do, up to [`MOST`] of them, by a thread, so that nothing
//! waits for a server that lets it wait.
//!
//! **All to one server.** What was answered and not flushed is kept for the case that the server dies ([`super::kept`]), and is
//! sent again when a connection is made anew. A flush on a connection to the next server would not cover what the one before has
//! answered; so there must not be connections to both. Two rules see to that:
//!
//! - As long as one connection lives, what is lost is not made anew but only widened. Requests in flight on one that is lost are sent
//!   again on those that live, where nothing needs to be repeated before them: the server that has answered is still there.
//! - A further connection is used only after one that was in use has answered something asked later than the further one was
//!   made ([`Nbd::prove`]). So the server that has taken it is the one that has the others.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nbd::flags::TransmissionFlags;
use nbd::wire::Command;

use super::connection::{Body, Connection};
use super::dial::{Attempts, Dialled};
use super::{Nbd, ask};
use crate::io::Io;

/// Connections of a disk at most.
pub const MOST: usize = 4;

/// Requests in flight on a connection from which on the next one is used: fewer leave and come in fewer pieces on one.
pub const DEEP: usize = 8;

/// The connections in use.
#[derive(Debug)]
pub struct Several {
    members: RefCell<Vec<Rc<Connection>>>,
    more: RefCell<More>,
}

/// What becomes of a further connection.
#[derive(Debug)]
enum More {
    /// From then on it may be asked for.
    From(Instant),
    /// A thread asks for it.
    Asked(Attempts),
}

/// What the thread has come to that asked for a further connection.
type News = Result<Dialled, String>;

impl Several {
    /// One.
    pub fn new(first: Rc<Connection>) -> Several {
        let several = Several {
            members: RefCell::new(Vec::with_capacity(MOST)),
            more: More::From(Instant::now()).into(),
        };
        several.begin(first);
        several
    }

    /// Begins with one, after all others were lost.
    pub fn begin(&self, first: Rc<Connection>) {
        debug_assert!(self.members.borrow().is_empty(), "the others may have another server");
        self.members.borrow_mut().push(first);
        *self.more.borrow_mut() = More::From(Instant::now());
    }

    /// The one for the next request, if any is left.
    pub fn pick(&self) -> Option<Rc<Connection>> {
        let members = self.members.borrow();
        let next = choose(members.iter().map(|connection| connection.in_flight()))?;
        members.get(next).cloned()
    }

    /// Takes one out; how many are left, or `None` if it was not there any more. Another is not asked for within `pause`.
    pub fn remove(&self, connection: &Rc<Connection>, pause: Duration) -> Option<usize> {
        let mut members = self.members.borrow_mut();
        let at = members.iter().position(|member| Rc::ptr_eq(member, connection))?;
        members.remove(at);
        // What is asked for meanwhile may come from another server than those that are lost.
        *self.more.borrow_mut() = More::From(Instant::now() + pause);
        Some(members.len())
    }

    /// Whether a further one is to be asked for now, when the one for the next request has so many in flight.
    fn is_due(&self, in_flight: usize) -> bool {
        in_flight >= DEEP
            && self.members.borrow().len() < MOST
            && matches!(&*self.more.borrow(), More::From(time) if *time <= Instant::now())
    }

    /// What was asked for, once it has come; after that nothing is asked for within `pause`.
    fn news(&self, pause: Duration) -> Option<News> {
        let mut more = self.more.borrow_mut();
        let More::Asked(attempts) = &*more else { return None };
        let news = attempts.outcome()?;
        *more = More::From(Instant::now() + pause);
        Some(news)
    }

    /// One more, if that which has vouched for it is still in use; how many there are then.
    fn add(&self, connection: Rc<Connection>, witness: &Rc<Connection>) -> Option<usize> {
        let mut members = self.members.borrow_mut();
        if members.len() >= MOST || !members.iter().any(|member| Rc::ptr_eq(member, witness)) {
            return None;
        }
        members.push(connection);
        *self.more.borrow_mut() = More::From(Instant::now());
        Some(members.len())
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.members.borrow().len()
    }

    /// Whether what was asked for has come, and waits for the next request.
    #[cfg(test)]
    pub fn has_news(&self) -> bool {
        matches!(&*self.more.borrow(), More::Asked(attempts) if attempts.is_over())
    }
}

/// Which connection takes the next request, by the requests in flight on each: the first that has few, so that the requests of a
/// turn leave in one piece; where none has, the one with the fewest.
fn choose(in_flight: impl Iterator<Item = usize> + Clone) -> Option<usize> {
    let few = in_flight.clone().position(|count| count < DEEP);
    few.or_else(|| in_flight.enumerate().min_by_key(|&(_, count)| count).map(|(at, _)| at))
}

impl Nbd {
    /// Sees to further connections, before a request that `connection` is going to take. True if there has been news, for which
    /// it may have had to wait, so that another connection may be the right one now.
    pub(super) async fn widen(&self, io: &Io, connection: &Rc<Connection>) -> bool {
        if let Some(news) = self.connections.news(self.limits.more) {
            self.join(io, news, connection).await;
            return true;
        }
        let allowed = connection.export.flags.has(TransmissionFlags::MULTI_CONN);
        if allowed && self.connections.is_due(connection.in_flight()) {
            let next = match self.attempts(Instant::now(), 0) {
                Ok(attempts) => More::Asked(attempts),
                // Without a thread to spare it goes on as it is.
                Err(_) => More::From(Instant::now() + self.limits.more),
            };
            *self.connections.more.borrow_mut() = next;
        }
        false
    }

    /// A further connection has come, or not.
    async fn join(&self, io: &Io, news: News, witness: &Rc<Connection>) {
        let joined = match news {
            Ok(dialled) => self.prove(io, dialled, witness).await,
            Err(why) => Err(why),
        };
        let name = self.name.display();
        match joined {
            Ok(count) => log::debug!("{name}: uses {count} connections"),
            Err(why) => log::debug!("{name}: no further connection: {why}"),
        }
    }

    /// Puts a further connection to use if the server that has taken it is that of `witness`, and answers on it: one that has
    /// as many clients as it likes may agree and hang up.
    async fn prove(&self, io: &Io, dialled: Dialled, witness: &Rc<Connection>) -> Result<usize, String> {
        let further = Connection::new(dialled, io).ok_or("no memory for its buffers")?;
        let question =
            ask(Command::Read, 0, self.block_size() as usize).map_err(|errno| errno.to_string())?;
        for connection in [&**witness, &further] {
            // Any answer will do, an error as well; what the block holds is of no interest.
            let answer = connection.exchange(io, &question, &Body::None).await;
            answer.map_err(|broken| broken.to_string()).map(drop)?;
        }
        self.connections.add(Rc::new(further), witness).ok_or_else(|| "the others were lost meanwhile".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_with_few_in_flight_is_used_and_else_the_one_with_the_fewest() {
        let cases: [(&[usize], Option<usize>); 7] = [
            (&[], None),
            (&[0], Some(0)),
            (&[1000], Some(0)),
            (&[DEEP - 1, 0], Some(0)),
            (&[DEEP, 3, 0], Some(1)),
            (&[DEEP + 1, DEEP, DEEP + 1], Some(1)),
            (&[DEEP, DEEP, DEEP], Some(0)),
        ];
        for (counts, expected) in cases {
            assert_eq!(choose(counts.iter().copied()), expected, "{counts:?}");
        }
    }
}
