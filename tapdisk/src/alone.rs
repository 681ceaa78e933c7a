//! A thread's engine, buffers and tasks for one piece of work: for tools and tests, which serve no ring.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::rc::Rc;

use crate::buf::Pool;
use crate::executor::{Executor, Scheduler};
use crate::io::Io;
use crate::reactor::{EngineChoice, Reactor};

/// Runs a task to its end, with buffers of `data_bytes` in all.
///
/// # Errors
/// The engine or the buffers could not be had, or the engine has failed.
pub fn run<T, F>(engine: EngineChoice, data_bytes: usize, task: impl FnOnce(Io) -> F) -> io::Result<T>
where
    T: 'static,
    F: Future<Output = T> + 'static,
{
    let scheduler = Rc::new(Scheduler::default());
    let reactor = Reactor::new(scheduler.clone(), engine)?;
    let pool = Pool::new(scheduler.clone(), data_bytes)?;
    pool.register_with(reactor.clone());
    let task = task(Io::new(reactor.clone(), pool, scheduler.clone()));
    let executor = Executor::new(scheduler);
    let result = Rc::new(RefCell::new(None));
    executor.spawn({
        let result = result.clone();
        async move {
            let ended = task.await;
            result.replace(Some(ended));
        }
    });
    loop {
        let ran = executor.run_ready();
        if let Some(ended) = result.take() {
            return Ok(ended);
        }
        if !ran {
            reactor.turn(true)?;
        }
    }
}
