//! Waiting between tasks of one thread.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use nix::errno::Errno;

use crate::executor::{Scheduler, TaskId};

/// A set of waiting tasks, like a condition variable: check the condition, wait, check again.
#[derive(Debug)]
pub struct WaitSet {
    scheduler: Rc<Scheduler>,
    waiting: RefCell<Vec<TaskId>>,
}

impl WaitSet {
    /// An empty set.
    pub fn new(scheduler: Rc<Scheduler>) -> WaitSet {
        WaitSet { scheduler, waiting: RefCell::default() }
    }

    /// Ends when [`WaitSet::wake_all`] was called, or for no reason.
    pub fn wait(&self) -> impl Future<Output = ()> + '_ {
        Wait { set: self, registered: false }
    }

    /// Lets every waiting task go on.
    pub fn wake_all(&self) {
        for id in self.waiting.borrow_mut().drain(..) {
            self.scheduler.wake(id);
        }
    }
}

struct Wait<'a> {
    set: &'a WaitSet,
    registered: bool,
}

impl Future for Wait<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if self.registered {
            return Poll::Ready(());
        }
        if let Some(id) = self.set.scheduler.current() {
            self.set.waiting.borrow_mut().push(id);
        }
        self.registered = true;
        Poll::Pending
    }
}

/// Lets the other tasks that are ready go first, once.
pub async fn yield_now(scheduler: &Scheduler) {
    let mut yielded = false;
    std::future::poll_fn(|_| match std::mem::replace(&mut yielded, true) {
        true => Poll::Ready(()),
        false => {
            if let Some(id) = scheduler.current() {
                scheduler.wake(id);
            }
            Poll::Pending
        }
    })
    .await;
}

/// Many callers, one execution: the work of a round serves everybody who asked before the round began.
///
/// Used where the work costs much and covers all that was done before it: `fdatasync`, publishing of metadata. Whoever
/// finds no round running leads the next one; the others wait.
#[derive(Debug)]
pub struct Group {
    waiters: WaitSet,
    running: Cell<bool>,
    begun: Cell<u64>,
    ended: Cell<u64>,
    failed: Cell<Option<(u64, Errno)>>,
}

impl Group {
    /// A group whose first round has not begun.
    pub fn new(scheduler: Rc<Scheduler>) -> Group {
        Group {
            waiters: WaitSet::new(scheduler),
            running: Cell::new(false),
            begun: Cell::new(0),
            ended: Cell::new(0),
            failed: Cell::new(None),
        }
    }

    /// Returns when a round of `work` that began after this call has ended, with its result.
    ///
    /// A caller that sleeps through a failed round and a later good one is told of the failure.
    pub async fn run(&self, work: impl AsyncFn() -> Result<(), Errno>) -> Result<(), Errno> {
        let target = self.begun.get() + 1;
        loop {
            if self.ended.get() >= target {
                return match self.failed.get() {
                    Some((round, errno)) if round >= target => Err(errno),
                    _ => Ok(()),
                };
            }
            if self.running.get() {
                self.waiters.wait().await;
                continue;
            }
            self.running.set(true);
            let round = self.begun.get() + 1;
            self.begun.set(round);
            let result = work().await;
            if let Err(errno) = result {
                self.failed.set(Some((round, errno)));
            }
            self.ended.set(round);
            self.running.set(false);
            self.waiters.wake_all();
            return result;
        }
    }
}

/// Lets two futures go on together, until both have ended.
pub async fn both<A, B>(one: impl Future<Output = A>, other: impl Future<Output = B>) -> (A, B) {
    let (mut one, mut other) = (std::pin::pin!(one), std::pin::pin!(other));
    let (mut first, mut second) = (None, None);
    std::future::poll_fn(|context| {
        if first.is_none()
            && let Poll::Ready(output) = one.as_mut().poll(context)
        {
            first = Some(output);
        }
        if second.is_none()
            && let Poll::Ready(output) = other.as_mut().poll(context)
        {
            second = Some(output);
        }
        match (first.take(), second.take()) {
            (Some(one), Some(other)) => Poll::Ready((one, other)),
            (one, other) => {
                (first, second) = (one, other);
                Poll::Pending
            }
        }
    })
    .await
}

/// Lets several futures go on together; the first error when all have ended.
pub async fn all(
    futures: impl Iterator<Item = impl Future<Output = Result<(), Errno>>>,
) -> Result<(), Errno> {
    let mut running: Vec<_> = futures.map(Box::pin).collect();
    let mut result = Ok(());
    std::future::poll_fn(|context| {
        running.retain_mut(|future| match future.as_mut().poll(context) {
            Poll::Ready(ended) => {
                result = result.and(ended);
                false
            }
            Poll::Pending => true,
        });
        if running.is_empty() { Poll::Ready(result) } else { Poll::Pending }
    })
    .await
}

/// Transfers under way, so that one can wait for those that were under way at some moment and not for later ones.
#[derive(Debug)]
pub struct Flights {
    /// Of two kinds: those that began before the last [`Flights::settle`], and those since then.
    counts: [Cell<u32>; 2],
    now: Cell<bool>,
    landed: WaitSet,
}

/// A transfer, until it is dropped.
#[derive(Debug)]
pub struct Flight<'a> {
    flights: &'a Flights,
    kind: bool,
}

impl Flights {
    /// None yet.
    pub fn new(scheduler: Rc<Scheduler>) -> Flights {
        Flights { counts: Default::default(), now: Cell::new(false), landed: WaitSet::new(scheduler) }
    }

    /// A transfer begins.
    pub fn begin(&self) -> Flight<'_> {
        let kind = self.now.get();
        let count = &self.counts[usize::from(kind)];
        count.set(count.get() + 1);
        Flight { flights: self, kind }
    }

    /// Ends when all transfers have ended that have begun before this call.
    pub async fn settle(&self) {
        // Those that an earlier call waits for come first: there are two kinds only.
        let before = self.now.get();
        self.none(!before).await;
        if self.now.get() == before {
            self.now.set(!before);
        }
        self.none(before).await;
    }

    async fn none(&self, kind: bool) {
        while self.counts[usize::from(kind)].get() > 0 {
            self.landed.wait().await;
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let count = &self.flights.counts[usize::from(self.kind)];
        count.set(count.get() - 1);
        if count.get() == 0 {
            self.flights.landed.wake_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Executor;

    #[test]
    fn settling_waits_for_what_is_under_way_and_for_nothing_later() {
        let scheduler = Rc::new(Scheduler::default());
        let executor = Executor::new(scheduler.clone());
        let flights = Rc::new(Flights::new(scheduler));
        let settled = Rc::new(Cell::new(0));
        let settle = || {
            let (flights, settled) = (flights.clone(), settled.clone());
            executor.spawn(async move {
                flights.settle().await;
                settled.set(settled.get() + 1);
            });
            executor.run_ready();
        };
        settle();
        assert_eq!(settled.get(), 1, "nothing is under way");
        let first = flights.begin();
        settle();
        let second = flights.begin();
        assert_eq!(settled.get(), 1);
        drop(first);
        executor.run_ready();
        assert_eq!(settled.get(), 2, "the second began later");
        settle();
        let _third = flights.begin();
        drop(second);
        executor.run_ready();
        assert_eq!(settled.get(), 3);
    }

    #[test]
    fn one_round_serves_all_who_asked_before_it_began() {
        let scheduler = Rc::new(Scheduler::default());
        let executor = Executor::new(scheduler.clone());
        let group = Rc::new(Group::new(scheduler.clone()));
        let gate = Rc::new(WaitSet::new(scheduler));
        let rounds = Rc::new(Cell::new(0));
        let served = Rc::new(Cell::new(0));
        for _ in 0..5 {
            let (group, gate, rounds, served) = (group.clone(), gate.clone(), rounds.clone(), served.clone());
            executor.spawn(async move {
                let work = async || {
                    gate.wait().await;
                    rounds.set(rounds.get() + 1);
                    Ok(())
                };
                group.run(work).await.unwrap();
                served.set(served.get() + 1);
            });
        }
        executor.run_ready();
        gate.wake_all();
        executor.run_ready();
        assert_eq!((rounds.get(), served.get()), (1, 1), "the first round served only its leader");
        gate.wake_all();
        executor.run_ready();
        assert_eq!((rounds.get(), served.get()), (2, 5), "the second served everybody else");
    }
}
