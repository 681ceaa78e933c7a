//! The limits of a disk between its threads, and what they mean for a ring.
//!
//! A ring over its limit takes nothing: requests stay on the shared ring, which is the queue. Where nothing is limited,
//! a ring looks at one word and goes on.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tap_ctl::proto::Limits;

use super::limit::{Limiter, Turn};

/// A ring that has to wait is looked at again no sooner: at high rates many requests are allowed by then.
const LEAST_WAIT: Duration = Duration::from_millis(1);

/// The limits of a disk, for all its threads.
#[derive(Debug)]
pub struct Throttle {
    limited: AtomicBool,
    start: Instant,
    state: Mutex<(Limits, Option<Limiter>)>,
}

impl Throttle {
    /// These limits.
    pub fn new(limits: Limits) -> Arc<Throttle> {
        let limiter = Limiter::new(&limits, 0);
        Arc::new(Throttle {
            limited: AtomicBool::new(limiter.is_some()),
            start: Instant::now(),
            state: Mutex::new((limits, limiter)),
        })
    }

    /// Other limits. The rings of all threads are to be told.
    pub fn set(&self, limits: Limits) {
        let limiter = Limiter::new(&limits, self.now());
        self.limited.store(limiter.is_some(), Ordering::Relaxed);
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = (limits, limiter);
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn with<T>(&self, act: impl FnOnce(&mut Limiter) -> T) -> Option<T> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1.as_mut().map(act)
    }
}

/// What the limits mean for one ring.
#[derive(Debug)]
pub struct Gate {
    throttle: Arc<Throttle>,
    turn: RefCell<Turn>,
    /// The ring has requests and waits for this time.
    until: Cell<Option<u64>>,
    /// How often it had to wait.
    waits: Cell<u64>,
}

impl Gate {
    /// A ring that has taken nothing yet.
    pub fn new(throttle: Arc<Throttle>) -> Gate {
        Gate { throttle, turn: RefCell::default(), until: Cell::new(None), waits: Cell::new(0) }
    }

    /// Whether anything is limited.
    pub fn is_limited(&self) -> bool {
        self.throttle.limited.load(Ordering::Relaxed)
    }

    /// Whether a request that is there may be taken.
    pub fn admits(&self) -> bool {
        let now = self.throttle.now();
        let admitted = self.throttle.with(|limiter| self.turn.borrow_mut().admit(limiter, now));
        match admitted {
            None | Some(Ok(())) => self.until.set(None),
            Some(Err(at)) => {
                if self.until.replace(Some(at)).is_none() {
                    self.waits.set(self.waits.get() + 1);
                }
            }
        }
        self.until.get().is_none()
    }

    /// A request was taken that moves so many bytes, or at most so many.
    pub fn charge(&self, bytes: u64) {
        self.turn.borrow_mut().charge(bytes);
    }

    /// So many of them are not moved after all.
    pub fn refund(&self, bytes: u64) {
        if bytes > 0 && self.is_limited() {
            self.throttle.with(|limiter| limiter.refund(bytes));
        }
    }

    /// Whether there are requests that may not be taken yet.
    pub fn is_waiting(&self) -> bool {
        self.until.get().is_some()
    }

    /// How long the ring should wait; `None`: it does not wait for this.
    pub fn wait(&self) -> Option<Duration> {
        let left = self.until.get()?.saturating_sub(self.throttle.now());
        Some(Duration::from_nanos(left).max(LEAST_WAIT))
    }

    /// The ring has nothing to take: what it may do others may do.
    pub fn rest(&self) {
        if self.is_limited() {
            self.throttle.with(|limiter| self.turn.borrow_mut().end(limiter));
        }
    }

    /// The limits have changed.
    pub fn renew(&self) {
        self.turn.borrow_mut().forget();
        self.until.set(None);
    }

    /// How often the ring had requests and had to wait.
    pub fn waits(&self) -> u64 {
        self.waits.get()
    }
}
