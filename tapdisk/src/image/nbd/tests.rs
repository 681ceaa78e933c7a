//! The client against servers that are well, ill and malicious.
#![expect(clippy::cast_possible_truncation, reason = "positions on small test disks")]

mod fake;
mod real;
mod several;

use std::future::Future;

use super::*;
use crate::buf::Pool;
use crate::executor::{Executor, Scheduler};
use crate::reactor::{EngineChoice, Reactor};
use fake::{Act, Face, Fake};

const ENGINES: [EngineChoice; 2] = [EngineChoice::Uring, EngineChoice::Pool];

/// A thread with tasks.
struct Bed {
    io: Io,
    executor: Executor,
    running: Rc<Cell<usize>>,
}

impl Bed {
    fn new(engine: EngineChoice) -> Bed {
        let scheduler = Rc::new(Scheduler::default());
        let reactor = Reactor::new(scheduler.clone(), engine).unwrap();
        let pool = Pool::new(scheduler.clone(), 8 << 20).unwrap();
        let executor = Executor::new(scheduler.clone());
        Bed { io: Io::new(reactor, pool, scheduler), executor, running: Rc::default() }
    }

    fn open(&self, fake: &Fake) -> Rc<Nbd> {
        Rc::new(Nbd::open(&fake.spec(), false, quick(), &self.io).unwrap())
    }

    fn spawn<F: Future<Output = ()> + 'static>(&self, task: impl FnOnce(Io) -> F) {
        self.running.set(self.running.get() + 1);
        let (task, running) = (task(self.io.clone()), self.running.clone());
        self.executor.spawn(async move {
            task.await;
            running.set(running.get() - 1);
        });
    }

    /// Until all tasks have ended.
    fn run(&self) {
        while self.running.get() > 0 {
            if !self.executor.run_ready() {
                self.io.reactor.turn(true).unwrap();
            }
        }
    }
}

fn quick() -> Limits {
    Limits {
        connect: Duration::from_secs(5),
        reconnect: Duration::from_secs(5),
        retry: Duration::from_millis(1),
        more: Duration::ZERO,
    }
}

/// Bytes that tell where they belong.
fn pattern(sector: u64, sectors: usize, seed: u8) -> Vec<u8> {
    let byte = |at: usize| (sector as u8).wrapping_add((at / 512) as u8).wrapping_mul(37).wrapping_add(seed);
    (0..sectors * 512).map(byte).collect()
}

async fn write(nbd: &Nbd, io: &Io, sector: u64, bytes: &[u8]) -> Result<(), Errno> {
    let mut buf = io.pool.data_soon(bytes.len()).await.unwrap();
    buf.bytes_mut().copy_from_slice(bytes);
    nbd.write(io, Sector(sector), &buf, 0..bytes.len()).await
}

async fn read(nbd: &Nbd, io: &Io, sector: u64, sectors: usize) -> Result<Vec<u8>, Errno> {
    let mut buf = io.pool.data_soon(sectors * 512).await.unwrap();
    buf.bytes_mut().fill(0xee);
    nbd.read(io, Sector(sector), &buf, 0..sectors * 512).await?;
    Ok(buf.bytes().to_vec())
}

/// Many tasks write and read back, each on its own 64 sectors.
fn load(bed: &Bed, nbd: &Rc<Nbd>, tasks: u64, rounds: u8) {
    for task in 0..tasks {
        let nbd = nbd.clone();
        bed.spawn(async move |io| {
            for round in 0..rounds {
                let sectors = 1 + (task as usize * 7 + usize::from(round) * 13) % 64;
                let bytes = pattern(task * 64, sectors, round);
                write(&nbd, &io, task * 64, &bytes).await.unwrap();
                assert_eq!(read(&nbd, &io, task * 64, sectors).await.unwrap(), bytes);
            }
        });
    }
}

#[test]
fn many_requests_at_once_all_get_their_own_replies() {
    for engine in ENGINES {
        let fake = Fake::start(Face::new(4 << 20), |_, _, _| Act::Serve);
        let bed = Bed::new(engine);
        let nbd = bed.open(&fake);
        load(&bed, &nbd, 64, 8);
        bed.run();
        bed.spawn(async move |io| nbd.flush(&io).await.unwrap());
        bed.run();
        drop(bed);
        let disk = fake.disk.clone();
        drop(fake);
        let disk = disk.lock().unwrap();
        assert_eq!(disk.durable, disk.now);
        assert_eq!(disk.commands.last().unwrap().0, Command::Disconnect, "{engine}: the end is announced");
    }
}

/// A regression: it counted as a write that can never be repeated, and no flush succeeded any more.
#[test]
fn a_server_that_shuts_down_while_writes_are_repeated_is_left_for_the_next() {
    for engine in ENGINES {
        let script = |connection, number, _: &nbd::wire::Request| match (connection, number) {
            (0, 1) => Act::HangUp,
            (1, 0) => Act::Fail(fake::SHUTDOWN),
            _ => Act::Serve,
        };
        let fake = Fake::start(Face { forgets: true, ..Face::new(1 << 20) }, script);
        let bed = Bed::new(engine);
        let nbd = bed.open(&fake);
        bed.spawn(async move |io| {
            write(&nbd, &io, 0, &pattern(0, 1, 5)).await.unwrap();
            nbd.flush(&io).await.unwrap();
        });
        bed.run();
        assert_eq!(fake.disk.lock().unwrap().durable[..512], pattern(0, 1, 5), "{engine}");
    }
}

#[test]
fn large_transfers_both_ways_at_once_do_not_lock_up() {
    for engine in ENGINES {
        let fake = Fake::start(Face::new(8 << 20), |_, _, _| Act::Serve);
        let bed = Bed::new(engine);
        let nbd = bed.open(&fake);
        for task in 0..4 {
            for reads in [false, true] {
                let nbd = nbd.clone();
                bed.spawn(async move |io| {
                    for _ in 0..4 {
                        // Larger than what a socket holds.
                        if reads {
                            read(&nbd, &io, task * 1024, 1024).await.unwrap();
                        } else {
                            write(&nbd, &io, task * 1024, &pattern(0, 1024, 1)).await.unwrap();
                        }
                    }
                });
            }
        }
        bed.run();
        drop(nbd);
    }
}

#[test]
fn a_lost_connection_is_made_anew_and_requests_in_flight_are_sent_again() {
    for engine in ENGINES {
        for act in [Act::HangUp, Act::ServeSilently, Act::Torn] {
            // Each connection serves a few more requests than the one before.
            let script = move |connection, number, _: &nbd::wire::Request| {
                if connection < 5 && number == 3 + 5 * connection { act } else { Act::Serve }
            };
            let fake = Fake::start(Face::new(1 << 20), script);
            let bed = Bed::new(engine);
            let nbd = bed.open(&fake);
            load(&bed, &nbd, 16, 6);
            bed.run();
            drop(nbd);
        }
    }
}

#[test]
fn writes_that_were_acknowledged_survive_a_server_that_forgets_them() {
    for engine in ENGINES {
        let script = |connection, number, request: &nbd::wire::Request| {
            let flush = request.command.get() == Command::Flush.number();
            if (connection == 0 && number == 12) || (connection == 1 && flush) {
                Act::HangUp
            } else {
                Act::Serve
            }
        };
        let fake = Fake::start(Face { forgets: true, ..Face::new(1 << 20) }, script);
        let bed = Bed::new(engine);
        let nbd = bed.open(&fake);
        bed.spawn({
            let nbd = nbd.clone();
            async move |io| {
                for sector in 0..10 {
                    write(&nbd, &io, sector, &pattern(sector, 2, 1)).await.unwrap();
                }
                nbd.flush(&io).await.unwrap();
                assert_eq!(nbd.kept.len(), 0);
                for sector in 10..20 {
                    write(&nbd, &io, sector, &pattern(sector, 2, 2)).await.unwrap();
                }
                nbd.flush(&io).await.unwrap();
            }
        });
        bed.run();
        let disk = fake.disk.lock().unwrap();
        for sector in 0..20_u64 {
            let seed = if sector < 10 { 1 } else { 2 };
            let at = sector as usize * 512;
            assert_eq!(disk.durable[at..at + 512], pattern(sector, 1, seed), "{engine}: sector {sector}");
        }
    }
}

#[test]
fn a_write_that_cannot_be_repeated_fails_the_next_flush() {
    let script = |connection, number, _: &nbd::wire::Request| match (connection, number) {
        (0, 1) => Act::HangUp,
        (1, 0) => Act::Fail(28),
        _ => Act::Serve,
    };
    let fake = Fake::start(Face { forgets: true, ..Face::new(1 << 20) }, script);
    let bed = Bed::new(EngineChoice::Auto);
    let nbd = bed.open(&fake);
    bed.spawn(async move |io| {
        write(&nbd, &io, 0, &[1; 512]).await.unwrap();
        write(&nbd, &io, 1, &[2; 512]).await.unwrap();
        assert_eq!(nbd.flush(&io).await, Err(Errno::EIO));
    });
    bed.run();
}

#[test]
fn what_is_kept_is_bounded_by_flushes_of_our_own() {
    let fake = Fake::start(Face::new(1 << 20), |_, _, _| Act::Serve);
    let bed = Bed::new(EngineChoice::Auto);
    let nbd = bed.open(&fake);
    bed.spawn(async move |io| {
        for _ in 0..(kept::MOST >> 20) + 4 {
            write(&nbd, &io, 0, &vec![1; 1 << 20]).await.unwrap();
        }
        assert!(nbd.kept.len() <= 4);
    });
    bed.run();
    let disk = fake.disk.lock().unwrap();
    assert!(disk.commands.iter().any(|(command, ..)| *command == Command::Flush));
}

#[test]
fn m84_a_wrong_cookie_fails_the_requests_in_flight_and_the_next_connection_serves() {
    for engine in ENGINES {
        let script = |connection, number, _: &nbd::wire::Request| {
            if connection == 0 && number == 0 { Act::WrongCookie } else { Act::Serve }
        };
        let fake = Fake::start(Face::new(1 << 20), script);
        let bed = Bed::new(engine);
        let nbd = bed.open(&fake);
        bed.spawn(async move |io| {
            assert_eq!(read(&nbd, &io, 0, 8).await, Err(Errno::EIO));
            assert_eq!(read(&nbd, &io, 0, 8).await.unwrap(), [0; 4096]);
        });
        bed.run();
    }
}

#[test]
fn m85_an_export_that_shrinks_is_another_disk() {
    let script =
        |connection, _, _: &nbd::wire::Request| if connection == 0 { Act::HangUp } else { Act::Serve };
    let fake = Fake::start(Face { sizes: vec![1 << 20, 1 << 19], ..Face::new(1 << 20) }, script);
    let bed = Bed::new(EngineChoice::Auto);
    let limits = Limits { reconnect: Duration::from_millis(200), ..quick() };
    let nbd = Nbd::open(&fake.spec(), false, limits, &bed.io).unwrap();
    bed.spawn(async move |io| {
        assert_eq!(read(&nbd, &io, 0, 8).await, Err(Errno::EIO));
        assert_eq!(write(&nbd, &io, 2040, &[1; 512]).await, Err(Errno::EIO));
    });
    bed.run();
}

#[test]
fn requests_fail_when_the_server_stays_away_and_go_on_when_it_is_back() {
    for engine in ENGINES {
        let mut fake = Fake::start(Face::new(1 << 20), |_, _, _| Act::HangUp);
        let bed = Bed::new(engine);
        let limits = Limits { reconnect: Duration::from_millis(200), ..quick() };
        let nbd = Rc::new(Nbd::open(&fake.spec(), false, limits, &bed.io).unwrap());
        fake.remove();
        for sector in 0..4 {
            let nbd = nbd.clone();
            bed.spawn(async move |io| assert_eq!(read(&nbd, &io, sector, 1).await, Err(Errno::EIO)));
        }
        bed.run();
        // Another server at the same place.
        let other = Fake::start(Face::new(1 << 20), |_, _, _| Act::Serve);
        std::os::unix::fs::symlink(&other.path, &fake.path).unwrap();
        bed.spawn(async move |io| {
            // Each request asks how the attempt in the background is; the test has no end if it never succeeds.
            while read(&nbd, &io, 0, 1).await.is_err() {
                crate::sync::yield_now(&io.scheduler).await;
            }
        });
        bed.run();
    }
}

#[test]
fn a_server_that_takes_requests_and_never_answers_is_given_up_in_time() {
    let fake = Fake::start(Face::new(1 << 20), |_, _, _| Act::HangUp);
    let bed = Bed::new(EngineChoice::Auto);
    let limits = Limits { reconnect: Duration::from_millis(300), ..quick() };
    let nbd = Nbd::open(&fake.spec(), false, limits, &bed.io).unwrap();
    bed.spawn(async move |io| assert_eq!(read(&nbd, &io, 0, 1).await, Err(Errno::EIO)));
    bed.run();
}

#[test]
fn errors_of_the_server_are_the_requests_own() {
    let script = |_, number, _: &nbd::wire::Request| match number {
        0 => Act::Fail(28),
        1 => Act::Fail(5),
        2 => Act::Fail(77),
        _ => Act::Serve,
    };
    let fake = Fake::start(Face::new(1 << 20), script);
    let bed = Bed::new(EngineChoice::Auto);
    let nbd = bed.open(&fake);
    bed.spawn(async move |io| {
        assert_eq!(write(&nbd, &io, 0, &[1; 512]).await, Err(Errno::ENOSPC));
        assert_eq!(read(&nbd, &io, 0, 1).await, Err(Errno::EIO));
        assert_eq!(read(&nbd, &io, 0, 1).await, Err(Errno::EINVAL));
        assert_eq!(read(&nbd, &io, 0, 1).await.unwrap(), [0; 512]);
        assert_eq!(read(&nbd, &io, 2048, 1).await, Err(Errno::EINVAL), "behind the end");
    });
    bed.run();
}

#[test]
fn sectors_of_larger_blocks_do_not_undo_each_other() {
    for engine in ENGINES {
        let fake = Fake::start(Face { minimum: 4096, ..Face::new(1 << 20) }, |_, _, request| {
            let aligned = (request.offset.get() | u64::from(request.len.get())).is_multiple_of(4096);
            if aligned { Act::Serve } else { Act::Fail(22) }
        });
        let bed = Bed::new(engine);
        let nbd = bed.open(&fake);
        assert_eq!(nbd.block_size(), 4096);
        for sector in 3..45 {
            let nbd = nbd.clone();
            bed.spawn(async move |io| {
                write(&nbd, &io, sector, &pattern(sector, 1, 9)).await.unwrap();
            });
        }
        bed.run();
        bed.spawn(async move |io| {
            assert_eq!(read(&nbd, &io, 3, 42).await.unwrap(), pattern(3, 42, 9));
            write(&nbd, &io, 5, &pattern(5, 30, 8)).await.unwrap();
            let expected = [pattern(3, 2, 9), pattern(5, 30, 8), pattern(35, 10, 9)].concat();
            assert_eq!(read(&nbd, &io, 3, 42).await.unwrap(), expected);
        });
        bed.run();
    }
}

#[test]
fn a_read_only_export_is_opened_read_only_or_not_at_all() {
    let mut face = Face::new(1 << 20);
    face.flags = face.flags | TransmissionFlags::READ_ONLY;
    let fake = Fake::start(face, |_, _, _| Act::Serve);
    let bed = Bed::new(EngineChoice::Auto);
    let error = Nbd::open(&fake.spec(), false, quick(), &bed.io).unwrap_err();
    assert_eq!(error.errno(), Errno::EROFS);
    assert!(Nbd::open(&fake.spec(), true, quick(), &bed.io).is_ok());
}

#[test]
fn a_task_dropped_with_a_request_in_flight_leaves_nothing_behind() {
    for engine in ENGINES {
        let (release, held) = std::sync::mpsc::channel::<()>();
        let fake = Fake::start(Face::new(1 << 20), move |_, _, _| {
            let _ = held.recv();
            Act::Serve
        });
        let bed = Bed::new(engine);
        let nbd = bed.open(&fake);
        bed.spawn(async move |io| {
            let _ = read(&nbd, &io, 0, 8).await;
        });
        bed.executor.run_ready();
        bed.io.reactor.turn(false).unwrap();
        bed.executor.run_ready();
        // Waits for the end of what is in flight, which only the shutdown of the socket brings.
        drop(bed);
        drop(release);
    }
}
