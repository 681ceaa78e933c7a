//! A single-threaded executor for the tasks of one worker thread.
//!
//! A task is one long-lived future: a request slot, a close in progress. Nothing is allocated or locked when a task is
//! woken or polled, and no `Waker` is used: every leaf future here (an I/O operation, a grant copy, a wait) belongs to
//! the same thread, asks the [`Scheduler`] which task is being polled and has that task woken by number.
//!
//! A task may be woken for nothing, so a leaf future checks its own state whenever it is polled.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Number of a task of this thread. Reused after the task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskId(usize);

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Which task runs, and which shall run next.
#[derive(Debug, Default)]
pub struct Scheduler {
    ready: RefCell<VecDeque<TaskId>>,
    queued: RefCell<Vec<bool>>,
    current: Cell<Option<TaskId>>,
}

impl Scheduler {
    /// The task being polled. `None` outside of tasks.
    pub fn current(&self) -> Option<TaskId> {
        self.current.get()
    }

    /// Makes a task run in this or the next turn. Waking twice before it runs is the same as once.
    pub fn wake(&self, id: TaskId) {
        if let Some(queued) = self.queued.borrow_mut().get_mut(id.0)
            && !std::mem::replace(queued, true)
        {
            self.ready.borrow_mut().push_back(id);
        }
    }

    fn next(&self) -> Option<TaskId> {
        let id = self.ready.borrow_mut().pop_front()?;
        if let Some(queued) = self.queued.borrow_mut().get_mut(id.0) {
            *queued = false;
        }
        Some(id)
    }

    fn idle(&self) -> bool {
        self.ready.borrow().is_empty()
    }
}

/// Owns the tasks.
pub struct Executor {
    scheduler: Rc<Scheduler>,
    /// `None` while the task is being polled, and for free numbers.
    tasks: RefCell<Vec<Option<Task>>>,
    free: RefCell<Vec<TaskId>>,
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executor").field("scheduler", &self.scheduler).finish_non_exhaustive()
    }
}

impl Executor {
    /// An executor without tasks.
    pub fn new(scheduler: Rc<Scheduler>) -> Executor {
        Executor { scheduler, tasks: RefCell::default(), free: RefCell::default() }
    }

    /// Adds a task and makes it ready.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let task: Task = Box::pin(task);
        let reused = self.free.borrow_mut().pop();
        let id = match reused {
            Some(id) => id,
            None => {
                let mut tasks = self.tasks.borrow_mut();
                let id = TaskId(tasks.len());
                tasks.push(None);
                self.scheduler.queued.borrow_mut().push(false);
                // Room for every task at once, so that waking never allocates.
                let mut ready = self.scheduler.ready.borrow_mut();
                let missing = tasks.len().saturating_sub(ready.len());
                ready.reserve(missing);
                id
            }
        };
        if let Some(slot) = self.tasks.borrow_mut().get_mut(id.0) {
            *slot = Some(task);
        }
        self.scheduler.wake(id);
    }

    /// Polls tasks until none is ready. Returns whether any ran.
    pub fn run_ready(&self) -> bool {
        let ran = !self.scheduler.idle();
        while let Some(id) = self.scheduler.next() {
            let taken = self.tasks.borrow_mut().get_mut(id.0).and_then(Option::take);
            let Some(mut task) = taken else { continue };
            self.scheduler.current.set(Some(id));
            let poll = task.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            self.scheduler.current.set(None);
            match poll {
                Poll::Pending => {
                    if let Some(slot) = self.tasks.borrow_mut().get_mut(id.0) {
                        *slot = Some(task);
                    }
                }
                Poll::Ready(()) => self.free.borrow_mut().push(id),
            }
        }
        ran
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::WaitSet;

    #[test]
    fn a_woken_task_goes_on_where_it_waited() {
        let scheduler = Rc::new(Scheduler::default());
        let executor = Executor::new(scheduler.clone());
        let gate = Rc::new(WaitSet::new(scheduler));
        let log = Rc::new(RefCell::new(Vec::new()));
        for name in ["a", "b"] {
            let (gate, log) = (gate.clone(), log.clone());
            executor.spawn(async move {
                log.borrow_mut().push(format!("{name} waits"));
                gate.wait().await;
                log.borrow_mut().push(format!("{name} went on"));
            });
        }
        assert!(executor.run_ready());
        assert!(!executor.run_ready());
        gate.wake_all();
        assert!(executor.run_ready());
        assert_eq!(*log.borrow(), ["a waits", "b waits", "a went on", "b went on"]);
    }

    #[test]
    fn numbers_of_ended_tasks_are_used_again() {
        let executor = Executor::new(Rc::new(Scheduler::default()));
        for _ in 0..100 {
            executor.spawn(async {});
            executor.run_ready();
        }
        assert_eq!(executor.tasks.borrow().len(), 1);
    }
}
