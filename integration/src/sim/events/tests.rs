//! The rules of the real device, between two domains, two devices and two processes.

use std::time::Duration;

use super::*;

const US: DomId = DomId(0);
const GUEST: DomId = DomId(5);

struct Bench {
    dir: tempfile::TempDir,
    front: SimEvents,
    back: SimEvents,
    front_port: Port,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let mut front = SimEvents::open(dir.path(), GUEST).unwrap();
    let back = SimEvents::open(dir.path(), US).unwrap();
    let front_port = front.allocate(US).unwrap();
    Bench { dir, front, back, front_port }
}

fn fired(events: &SimEvents) -> Vec<Port> {
    let mut out = [Port(0); 8];
    let count = events.pending(&mut out).unwrap();
    out[..count].to_vec()
}

/// Binds, and takes the event that binding raises.
fn connect(bench: &mut Bench) -> Port {
    let port = bench.back.bind(GUEST, bench.front_port).unwrap();
    assert_eq!(fired(&bench.back), [port]);
    bench.back.unmask(port).unwrap();
    port
}

#[test]
fn freshly_bound_port_fires_once() {
    let mut bench = bench();
    bench.front.notify(bench.front_port).unwrap();
    let port = bench.back.bind(GUEST, bench.front_port).unwrap();
    assert_eq!(fired(&bench.back), [port]);
    assert_eq!(fired(&bench.back), []);
    assert!(bench.front.is_connected(bench.front_port));
}

#[test]
fn events_go_both_ways() {
    let mut bench = bench();
    let port = connect(&mut bench);
    bench.front.notify(bench.front_port).unwrap();
    assert_eq!(fired(&bench.back), [port]);
    bench.back.notify(port).unwrap();
    assert_eq!(fired(&bench.front), [bench.front_port]);
}

#[test]
fn masked_port_is_silent_and_its_events_become_one() {
    let mut bench = bench();
    let port = connect(&mut bench);
    for _ in 0..100_000 {
        bench.front.notify(bench.front_port).unwrap();
    }
    assert_eq!(fired(&bench.back), [port]);
    assert_eq!(fired(&bench.back), []);
    bench.front.notify(bench.front_port).unwrap();
    assert!(!bench.back.wait(Duration::ZERO).unwrap());
    // The event that waited is delivered by the unmasking, and masks the port again.
    bench.back.unmask(port).unwrap();
    bench.front.notify(bench.front_port).unwrap();
    assert_eq!(fired(&bench.back), [port]);
    bench.back.unmask(port).unwrap();
    assert_eq!(fired(&bench.back), [port]);
    bench.back.unmask(port).unwrap();
    assert_eq!(fired(&bench.back), []);
}

#[test]
fn descriptor_is_readable_exactly_while_ports_are_queued() {
    let mut bench = bench();
    let port = connect(&mut bench);
    assert!(!bench.back.wait(Duration::ZERO).unwrap());
    bench.front.notify(bench.front_port).unwrap();
    assert!(bench.back.wait(Duration::ZERO).unwrap());
    assert_eq!(fired(&bench.back), [port]);
    assert!(!bench.back.wait(Duration::ZERO).unwrap());
}

#[test]
fn only_an_unbound_port_reserved_for_us_can_be_bound() {
    let mut bench = bench();
    let others = bench.front.allocate(DomId(7)).unwrap();
    let error = |result: io::Result<Port>| result.unwrap_err().raw_os_error();
    for port in [others, Port(0), Port(1000), Port(1 << 31), Port(u32::MAX)] {
        assert_eq!(error(bench.back.bind(GUEST, port)), Some(libc::EINVAL), "{port}");
    }
    assert_eq!(error(bench.back.bind(DomId(99), Port(1))), Some(libc::EINVAL));
    connect(&mut bench);
    let mut second = SimEvents::open(bench.dir.path(), US).unwrap();
    assert_eq!(error(second.bind(GUEST, bench.front_port)), Some(libc::EINVAL), "bound already");
}

#[test]
fn a_restricted_device_binds_ports_of_its_domain_only() {
    let mut bench = bench();
    let other = DomId(6);
    let mut others = SimEvents::open(bench.dir.path(), other).unwrap();
    let others_port = others.allocate(US).unwrap();
    let errno = |error: io::Error| error.raw_os_error();
    for dom in [DomId(0), DomId(FIRST_RESERVED)] {
        assert_eq!(bench.back.restrict(dom).map_err(errno), Err(Some(libc::EINVAL)), "{dom}");
    }
    bench.back.restrict(GUEST).unwrap();
    assert_eq!(bench.back.bind(other, others_port).map_err(errno), Err(Some(libc::EACCES)));
    assert_eq!(bench.back.allocate(GUEST).map_err(errno), Err(Some(libc::EACCES)));
    assert_eq!(bench.back.restrict(other).map_err(errno), Err(Some(libc::EACCES)), "for good");
    connect(&mut bench);
    assert!(!others.is_connected(others_port));
}

#[test]
fn unbound_port_of_ours_is_an_error_and_the_guests_can_be_bound_again() {
    let mut bench = bench();
    let port = connect(&mut bench);
    bench.back.unbind(port).unwrap();
    assert_eq!(bench.back.notify(port).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    assert_eq!(bench.back.unbind(port).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    assert!(bench.back.unmask(port).is_ok());
    assert!(!bench.front.is_connected(bench.front_port));
    bench.front.notify(bench.front_port).unwrap();
    connect(&mut bench);
}

#[test]
fn closing_the_device_frees_its_ports() {
    let mut bench = bench();
    connect(&mut bench);
    bench.back = SimEvents::open(bench.dir.path(), US).unwrap();
    connect(&mut bench);
    bench.front.notify(bench.front_port).unwrap();
    assert_eq!(fired(&bench.back).len(), 1);
}

/// Not a test of its own: the backend's process of the next one, which runs this binary again with the folder and the
/// guest's port in the environment.
#[test]
fn backend_process() {
    let (Ok(dir), Ok(port)) = (std::env::var("SIM_EVENTS_DIR"), std::env::var("SIM_EVENTS_PORT")) else {
        return;
    };
    let mut events = SimEvents::open(Path::new(&dir), US).unwrap();
    let port = events.bind(GUEST, Port(port.parse().unwrap())).unwrap();
    while events.wait(Duration::from_secs(10)).unwrap() {
        assert_eq!(fired(&events), [port]);
        events.notify(port).unwrap();
        events.unmask(port).unwrap();
    }
}

#[test]
fn port_of_a_process_that_was_killed_can_be_bound_again() {
    let Bench { dir, front, front_port, back } = bench();
    drop(back);
    let mut process = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sim::events::tests::backend_process"])
        .env("SIM_EVENTS_DIR", dir.path())
        .env("SIM_EVENTS_PORT", front_port.to_string())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // The first answer is to the event of binding itself.
    for _ in 0..1000 {
        assert!(front.wait(Duration::from_secs(10)).unwrap(), "the other process does not answer");
        assert_eq!(fired(&front), [front_port]);
        front.unmask(front_port).unwrap();
        front.notify(front_port).unwrap();
    }
    let mut next = SimEvents::open(dir.path(), US).unwrap();
    assert!(next.bind(GUEST, front_port).is_err(), "the other process lives");
    process.kill().unwrap();
    process.wait().unwrap();
    front.notify(front_port).unwrap();
    let port = next.bind(GUEST, front_port).unwrap();
    assert_eq!(fired(&next), [port]);
    let queues = std::fs::read_dir(dir.path()).unwrap().filter(|entry| {
        entry.as_ref().is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("events."))
    });
    assert_eq!(queues.count(), 2, "the dead process's queue is still there");
}

#[test]
fn threads_lose_no_wake_up() {
    let mut bench = bench();
    let port = connect(&mut bench);
    const ROUNDS: u32 = 20_000;
    std::thread::scope(|scope| {
        let Bench { front, back, front_port, .. } = bench;
        scope.spawn(move || {
            for _ in 0..ROUNDS {
                assert!(back.wait(Duration::from_secs(10)).unwrap(), "lost on the way to the backend");
                assert_eq!(fired(&back), [port]);
                back.unmask(port).unwrap();
                back.notify(port).unwrap();
            }
        });
        for _ in 0..ROUNDS {
            front.notify(front_port).unwrap();
            assert!(front.wait(Duration::from_secs(10)).unwrap(), "lost on the way to the frontend");
            assert_eq!(fired(&front), [front_port]);
            front.unmask(front_port).unwrap();
        }
    });
}
