//! Both engines do the same.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use super::*;
use crate::buf::Pool;
use crate::executor::Executor;

const ENGINES: [EngineChoice; 2] = [EngineChoice::Uring, EngineChoice::Pool];

struct Thread {
    reactor: Rc<Reactor>,
    executor: Executor,
    pool: Rc<Pool>,
}

impl Thread {
    fn new(engine: EngineChoice) -> Thread {
        let scheduler = Rc::new(Scheduler::default());
        let reactor = Reactor::new(scheduler.clone(), engine).unwrap();
        let pool = Pool::new(scheduler.clone(), 1 << 20).unwrap();
        Thread { reactor, executor: Executor::new(scheduler), pool }
    }

    /// Runs a task to its end.
    fn run<F: Future<Output = ()> + 'static>(&self, task: impl FnOnce(Rc<Reactor>, Rc<Pool>) -> F) {
        let task = task(self.reactor.clone(), self.pool.clone());
        let done = Rc::new(Cell::new(false));
        self.executor.spawn({
            let done = done.clone();
            async move {
                task.await;
                done.set(true);
            }
        });
        while !done.get() {
            if !self.executor.run_ready() {
                self.reactor.turn(true).unwrap();
            }
        }
    }
}

fn file(len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file
}

#[test]
fn what_is_written_is_read_back_with_and_without_registration() {
    for (engine, register) in [
        (EngineChoice::Uring, false),
        (EngineChoice::Uring, true),
        (EngineChoice::Pool, false),
        (EngineChoice::Pool, true),
    ] {
        let thread = Thread::new(engine);
        if register {
            thread.pool.register_with(thread.reactor.clone());
        }
        thread.run(|reactor, pool| async move {
            let file = file(0);
            let mut out = pool.data(8192).unwrap();
            out.bytes_mut().iter_mut().zip((0..251).cycle()).for_each(|(to, byte)| *to = byte);
            let wrote = reactor.write(file.as_fd().into(), 512, out.piece(0..8192).unwrap()).await;
            assert_eq!(wrote, Ok(8192));
            assert_eq!(reactor.fdatasync(file.as_fd()).await, Ok(0));
            let back = pool.data(8192).unwrap();
            let (a, b) = (
                reactor.read(file.as_fd().into(), 512, back.piece(0..4096).unwrap()),
                reactor.read(file.as_fd().into(), 4608, back.piece(4096..8192).unwrap()),
            );
            assert_eq!((a.await, b.await), (Ok(4096), Ok(4096)));
            assert_eq!(back.bytes(), out.bytes());
        });
    }
}

#[test]
fn errors_come_back_as_errno() {
    for engine in ENGINES {
        Thread::new(engine).run(|reactor, pool| async move {
            let file = File::open("/proc/self/exe").unwrap();
            let buf = pool.data(512).unwrap();
            let wrote = reactor.write(file.as_fd().into(), 0, buf.piece(0..512).unwrap()).await;
            assert_eq!(wrote, Err(Errno::EBADF));
            assert_eq!(reactor.fallocate(file.as_fd(), 0, 0, 512).await, Err(Errno::EBADF));
            let refused = reactor.blocking(|| Err(io::Error::from_raw_os_error(libc::ENOTTY))).await;
            assert_eq!(refused, Err(Errno::ENOTTY));
        });
    }
}

#[test]
fn a_file_grows_by_fallocate_and_by_a_blocking_call() {
    for engine in ENGINES {
        Thread::new(engine).run(|reactor, _| async move {
            let file = file(0);
            assert_eq!(reactor.fallocate(file.as_fd(), 0, 0, 8192).await, Ok(0));
            assert_eq!(file.metadata().unwrap().len(), 8192);
            let other = file.try_clone().unwrap();
            assert_eq!(reactor.blocking(move || other.set_len(12288).map(|()| 7)).await, Ok(7));
            assert_eq!(file.metadata().unwrap().len(), 12288);
        });
    }
}

#[test]
fn many_operations_at_once_all_end_with_their_own_result() {
    for engine in ENGINES {
        Thread::new(engine).run(|reactor, pool| async move {
            let file = file(1 << 20);
            let buf = pool.data(1 << 20).unwrap();
            // More than any queue holds; each has another length.
            let lengths: Vec<usize> = (1..=1000).collect();
            let mut ops = Vec::new();
            for &len in &lengths {
                ops.push(reactor.read(file.as_fd().into(), 0, buf.piece(1000..1000 + len).unwrap()));
            }
            for (op, len) in ops.into_iter().zip(lengths) {
                assert_eq!(op.await.map(|moved| moved as usize), Ok(len));
            }
        });
    }
}

#[test]
fn operations_go_on_while_a_blocking_call_waits() {
    for engine in ENGINES {
        Thread::new(engine).run(|reactor, pool| async move {
            let (release, held) = mpsc::channel::<()>();
            let waiting = reactor.blocking(move || {
                held.recv().map_err(io::Error::other)?;
                Ok(1)
            });
            let file = file(4096);
            let buf = pool.data(4096).unwrap();
            for _ in 0..3 {
                let read = reactor.read(file.as_fd().into(), 0, buf.piece(0..4096).unwrap()).await;
                assert_eq!(read, Ok(4096));
            }
            release.send(()).unwrap();
            assert_eq!(waiting.await, Ok(1));
            // The helper serves more than once.
            assert_eq!(reactor.blocking(|| Ok(2)).await, Ok(2));
        });
    }
}

#[test]
fn a_dropped_operation_is_waited_for() {
    for engine in ENGINES {
        let thread = Thread::new(engine);
        let file = file(4096);
        let buf = thread.pool.data(4096).unwrap();
        drop(thread.reactor.read(file.as_fd().into(), 0, buf.piece(0..4096).unwrap()));
        assert!(matches!(thread.reactor.ops.borrow().slots[..], [Slot::Free]));
    }
}

#[test]
fn what_became_readable_while_an_operation_was_dropped_is_told() {
    for engine in ENGINES {
        let Thread { reactor, pool, .. } = Thread::new(engine);
        let wake = nix::sys::eventfd::EventFd::new().unwrap();
        reactor.watch_commands(wake.as_fd()).unwrap();
        reactor.turn(false).unwrap();
        wake.write(1).unwrap();
        let file = file(4096);
        let buf = pool.data(4096).unwrap();
        drop(reactor.read(file.as_fd().into(), 0, buf.piece(0..4096).unwrap()));
        assert!(reactor.turn(true).unwrap().commands);
    }
}

#[test]
fn input_wakes_a_sleeping_reactor_each_time() {
    for engine in ENGINES {
        let Thread { reactor, .. } = Thread::new(engine);
        let (commands, events) =
            (nix::sys::eventfd::EventFd::new().unwrap(), nix::sys::eventfd::EventFd::new().unwrap());
        reactor.watch_commands(commands.as_fd()).unwrap();
        let watch = reactor.watch(events.as_fd()).unwrap();
        for _ in 0..3 {
            commands.write(1).unwrap();
            assert_eq!(reactor.turn(true).unwrap(), Readable { commands: true, ..Readable::default() });
            commands.read().unwrap();
            events.write(1).unwrap();
            assert_eq!(reactor.turn(true).unwrap(), Readable { events: true, ..Readable::default() });
            assert!(watch.take_readable() && !watch.take_readable());
            events.read().unwrap();
        }
    }
}

#[test]
fn a_descriptor_is_let_go_of_when_its_watch_ends() {
    for engine in ENGINES {
        let Thread { reactor, .. } = Thread::new(engine);
        let other = nix::sys::eventfd::EventFd::new().unwrap();
        let other_watch = reactor.watch(other.as_fd()).unwrap();
        // Held is none: not one that is still to be handed to the kernel, nor with input that is still to be reported, or was.
        for (handed_over, input, reported) in
            [(false, false, false), (true, false, false), (true, true, false), (true, true, true)]
        {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let watch = reactor.watch(ours.as_fd()).unwrap();
            if handed_over {
                reactor.turn(false).unwrap();
            }
            if input {
                (&theirs).write_all(b"x").unwrap();
            }
            if reported {
                assert!(reactor.turn(true).unwrap().events && watch.take_readable());
            }
            drop(watch);
            drop(ours);
            // Its end is seen once nobody has it open.
            let closed = loop {
                reactor.turn(false).unwrap();
                match (&theirs).write_all(b"x") {
                    Ok(()) => {}
                    Err(error) => break error.kind(),
                }
            };
            assert_eq!(closed, std::io::ErrorKind::BrokenPipe, "{engine}");
        }
        // The place of what was let go of is given out again, and others are heard.
        let again = nix::sys::eventfd::EventFd::new().unwrap();
        let again_watch = reactor.watch(again.as_fd()).unwrap();
        other.write(1).unwrap();
        while !other_watch.take_readable() {
            reactor.turn(true).unwrap();
        }
        assert!(!again_watch.take_readable());
        again.write(1).unwrap();
        while !again_watch.take_readable() {
            reactor.turn(true).unwrap();
        }
    }
}

#[test]
fn a_socket_carries_more_than_it_holds_both_ways_at_once() {
    const LEN: usize = 600_000;
    for engine in ENGINES {
        let thread = Thread::new(engine);
        let (near, far) = UnixStream::pair().unwrap();
        // Sends all back.
        let echo = std::thread::spawn(move || {
            let mut bytes = [0; 5000];
            loop {
                match (&far).read(&mut bytes).unwrap() {
                    0 => return,
                    len => (&far).write_all(&bytes[..len]).unwrap(),
                }
            }
        });
        thread.run(|reactor, pool| async move {
            let mut out = pool.data(LEN).unwrap();
            out.bytes_mut().iter_mut().zip((0..251).cycle()).for_each(|(to, byte)| *to = byte);
            let back = pool.data(200_000).unwrap();
            let (mut sent, mut received) = (0, 0);
            let mut sending = Some(reactor.send(near.as_fd(), out.piece(0..LEN).unwrap()));
            while received < LEN {
                let want = back.len().min(LEN - received);
                let got = reactor.receive(near.as_fd(), back.piece(0..want).unwrap()).await.unwrap() as usize;
                assert_eq!(back.bytes()[..got], out.bytes()[received..received + got]);
                received += got;
                if received > sent {
                    sent += sending.take().unwrap().await.unwrap() as usize;
                    sending = (sent < LEN).then(|| reactor.send(near.as_fd(), out.piece(sent..LEN).unwrap()));
                }
            }
            if let Some(last) = sending {
                sent += last.await.unwrap() as usize;
            }
            assert_eq!(sent, LEN, "{engine}");
            near.shutdown(std::net::Shutdown::Both).unwrap();
            let ended = reactor.receive(near.as_fd(), back.piece(0..1).unwrap()).await;
            assert_eq!(ended, Ok(0), "{engine}");
        });
        echo.join().unwrap();
    }
}

#[test]
fn receiving_ends_by_shutdown_and_sending_to_nobody_fails() {
    for engine in ENGINES {
        Thread::new(engine).run(|reactor, pool| async move {
            let (near, far) = UnixStream::pair().unwrap();
            let buf = pool.data(4096).unwrap();
            let receiving = reactor.receive(near.as_fd(), buf.piece(0..8).unwrap());
            reactor.turn(false).unwrap();
            near.shutdown(std::net::Shutdown::Both).unwrap();
            assert_eq!(receiving.await, Ok(0), "{engine}");
            drop(far);
            let sent = reactor.send(near.as_fd(), buf.piece(0..8).unwrap()).await;
            assert_eq!(sent, Err(Errno::EPIPE), "{engine}");
        });
    }
}

#[test]
fn a_timer_fires_once() {
    for engine in ENGINES {
        let thread = Thread::new(engine);
        thread.reactor.timer(Timer::HoldOff, Duration::from_millis(1)).unwrap();
        let readable = thread.reactor.turn(true).unwrap();
        assert_eq!(
            readable,
            Readable { timers: [false, true, false, false, false, false], ..Readable::default() },
            "{engine}"
        );
        assert_eq!(thread.reactor.turn(false).unwrap(), Readable::default(), "{engine}");
    }
}

#[test]
fn the_place_of_memory_that_was_given_up_is_used_again() {
    let thread = Thread::new(EngineChoice::Uring);
    let buf = thread.pool.data(4096).unwrap();
    let base = buf.piece(0..4096).unwrap().ptr;
    // More often than there are places.
    for _ in 0..5000 {
        let Some(fixed) = thread.reactor.fix(base, 4096) else { panic!("memory is not registered") };
        thread.reactor.unfix(fixed);
        thread.reactor.turn(false).unwrap();
    }
}
