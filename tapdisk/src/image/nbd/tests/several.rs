//! Several connections to servers that are well and ill.

use super::super::several::{DEEP, MOST};
use super::fake::SHUTDOWN;
use super::*;

/// Connections beside the first that were used for more than the question whether the server is there.
fn others(fake: &Fake) -> usize {
    fake.disk
        .lock()
        .unwrap()
        .served
        .iter()
        .filter(|&(&connection, &count)| connection > 0 && count > 1)
        .count()
}

#[test]
fn much_to_do_is_spread_where_the_server_promises_that_its_connections_are_one() {
    for engine in ENGINES {
        let fake = Fake::start(Face::several(4 << 20), |_, _, _| Act::Serve);
        let bed = Bed::new(engine);
        let nbd = bed.open(&fake);
        while nbd.connections.len() < MOST {
            load(&bed, &nbd, 64, 2);
            bed.run();
        }
        load(&bed, &nbd, 64, 8);
        bed.run();
        bed.spawn(async move |io| nbd.flush(&io).await.unwrap());
        bed.run();
        assert_eq!(others(&fake), MOST - 1, "{engine}");
        let disk = fake.disk.lock().unwrap();
        assert!(disk.durable == disk.now, "{engine}");
    }
}

#[test]
fn little_to_do_and_servers_that_promise_nothing_get_one() {
    for (face, tasks) in [(Face::several(1 << 20), DEEP as u64 - 1), (Face::new(1 << 20), 32)] {
        let fake = Fake::start(face, |_, _, _| Act::Serve);
        let bed = Bed::new(EngineChoice::Auto);
        let nbd = bed.open(&fake);
        load(&bed, &nbd, tasks, 16);
        bed.run();
        assert!(nbd.connections.len() == 1 && !nbd.connections.has_news());
    }
}

#[test]
fn what_was_in_flight_on_a_lost_one_goes_over_the_others() {
    for engine in ENGINES {
        for act in [Act::HangUp, Act::ServeSilently, Act::Torn, Act::Fail(SHUTDOWN)] {
            // It is any connection's turn to end, time and again.
            let mut asked = 0;
            let script = move |_, _, _: &nbd::wire::Request| {
                asked += 1;
                if asked % 307 == 306 && asked < 6000 { act } else { Act::Serve }
            };
            let fake = Fake::start(Face::several(4 << 20), script);
            let bed = Bed::new(engine);
            let nbd = bed.open(&fake);
            load(&bed, &nbd, 64, 64);
            bed.run();
            assert!(others(&fake) > 5, "{engine} {act:?}");
            bed.spawn(async move |io| nbd.flush(&io).await.unwrap());
            bed.run();
            let disk = fake.disk.lock().unwrap();
            assert!(disk.durable == disk.now, "{engine} {act:?}");
        }
    }
}

#[test]
fn writes_that_were_acknowledged_on_any_survive_a_server_that_forgets_them() {
    for engine in ENGINES {
        let mut served = 0;
        let script = move |_, _, _: &nbd::wire::Request| {
            served += 1;
            if served % 997 == 996 && served < 5000 { Act::Crash } else { Act::Serve }
        };
        let fake = Fake::start(Face::several(4 << 20), script);
        let bed = Bed::new(engine);
        let nbd = bed.open(&fake);
        // What is read back was acknowledged, and not flushed.
        load(&bed, &nbd, 64, 64);
        bed.run();
        bed.spawn(async move |io| nbd.flush(&io).await.unwrap());
        bed.run();
        assert!(others(&fake) > 5, "{engine}");
        let disk = fake.disk.lock().unwrap();
        for task in 0..64_u64 {
            let at = task as usize * 64 * 512;
            assert_eq!(disk.durable[at..at + 512], pattern(task * 64, 1, 63), "{engine}: task {task}");
        }
    }
}

#[test]
fn a_server_that_refuses_a_second_one_is_served_over_the_first() {
    for engine in ENGINES {
        // It closes others at once, or when they are agreed on.
        for most in [1, usize::MAX] {
            let script = |connection, number, _: &nbd::wire::Request| {
                assert!(connection == 0 || number == 0, "nothing but the question whether it is there");
                if connection == 0 { Act::Serve } else { Act::HangUp }
            };
            let fake = Fake::start(Face { most, ..Face::several(4 << 20) }, script);
            let bed = Bed::new(engine);
            let nbd = bed.open(&fake);
            load(&bed, &nbd, 64, 16);
            bed.run();
            assert_eq!((nbd.connections.len(), others(&fake)), (1, 0));
        }
    }
}

/// A server's machine loses its power while a client asks for a second connection, and is back before it has it. The first
/// one says nothing any more, which might as well be a server that takes its time.
#[test]
fn a_further_one_to_the_next_server_is_not_used_beside_one_to_the_server_before() {
    for engine in ENGINES {
        let script = |connection, number, _: &nbd::wire::Request| match (connection, number) {
            // A write, then requests without an answer, then the question whether it is still there.
            (0, 0) => Act::Serve,
            (0, number) if number <= DEEP + 1 => Act::Ignore,
            (0, _) => Act::HangUp,
            _ => Act::Serve,
        };
        let fake = Fake::start(Face::several(1 << 20), script);
        let bed = Bed::new(engine);
        let nbd = bed.open(&fake);
        bed.spawn({
            let nbd = nbd.clone();
            async move |io| write(&nbd, &io, 0, &pattern(0, 1, 5)).await.unwrap()
        });
        bed.run();
        fake.disk.lock().unwrap().forget();
        for sector in 0..=DEEP as u64 {
            let nbd = nbd.clone();
            bed.spawn(async move |io| drop(read(&nbd, &io, sector, 1).await.unwrap()));
        }
        while !nbd.connections.has_news() {
            bed.executor.run_ready();
            bed.io.reactor.turn(false).unwrap();
        }
        bed.spawn({
            let nbd = nbd.clone();
            async move |io| {
                assert_eq!(read(&nbd, &io, 0, 1).await.unwrap(), pattern(0, 1, 5));
                nbd.flush(&io).await.unwrap();
            }
        });
        bed.run();
        let disk = fake.disk.lock().unwrap();
        assert!(!disk.served.contains_key(&1), "{engine}");
        assert_eq!(disk.durable[..512], pattern(0, 1, 5), "{engine}");
    }
}
