//! Stores that do not answer: the guest waits, everybody else goes on, and the administrator is told and can act.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use blkif::{DomId, Sector};
use integration::programs;
use integration::rig::{Device, PATIENCE, Rig};
use integration::sim::frontend::{Frontend, Io, Shape};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde_json::Value;

use super::nbd::serve;
use super::pause::{ok, order};
use super::stats::stats;
use super::support::*;

/// The I/O threads of a tapdisk, stopped: from its disk's point of view, a store that does not answer. They go on when this
/// is dropped.
struct Hung(Vec<Pid>);

impl Hung {
    /// Stops the threads that an earlier load has started.
    fn threads_of(pid: i32) -> Hung {
        let mut hung = Hung(Vec::new());
        for thread in io_threads(pid) {
            ptrace::seize(thread, ptrace::Options::empty()).unwrap();
            ptrace::interrupt(thread).unwrap();
            waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
            hung.0.push(thread);
        }
        hung
    }
}

fn io_threads(pid: i32) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(Result::unwrap);
    let does_io = |task: &std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("comm")).unwrap().trim() == "disk-io"
    };
    let id = |task: std::fs::DirEntry| Pid::from_raw(task.file_name().to_str().unwrap().parse().unwrap());
    tasks.filter(does_io).map(id).collect()
}

impl Drop for Hung {
    fn drop(&mut self) {
        for thread in &self.0 {
            // ESRCH: a test that fails has killed the tapdisk before.
            let _ = ptrace::detach(*thread, None);
        }
    }
}

/// Many requests at once, until every I/O thread of each ring is there: one is started only when all that are there have something to do.
fn warm_up(frontend: &mut Frontend, pid: i32, rings: usize) {
    while io_threads(pid).len() < 4 * rings {
        for n in 0..24 {
            frontend.submit(Io::Write(Sector(n * 8), &pattern(n as u8, 4096)));
        }
        frontend.kick().unwrap();
        answers(frontend, 24);
    }
}

/// Asks for the statistics until they are like that.
fn stats_until(rig: &Rig, device: &Device, what: impl Fn(&Value) -> bool) -> Value {
    let start = Instant::now();
    loop {
        let told = stats(rig, device, &["--full"]);
        if what(&told) {
            return told;
        }
        assert!(start.elapsed() < PATIENCE + Duration::from_secs(10), "{told}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_file_that_hangs_is_told_of_and_holds_up_nobody_else() {
    let mut rig = Rig::start(programs!());
    rig.spawn_options = vec!["--engine".into(), "pool".into()];
    let (path, params) = raw(&rig, "hung.img", MIB);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    let (_, params) = raw(&rig, "good.img", MIB);
    let (_, mut honest) = guest(&rig, 2, &params, Shape::simple(DomId(2)));
    warm_up(&mut frontend, device.pid, 1);
    let hung = Hung::threads_of(device.pid);
    let start = Instant::now();
    frontend.submit(Io::Write(Sector(64), &pattern(9, 8192)));
    frontend.kick().unwrap();
    // Ages are exact to a tick of some milliseconds: what comes next is to be younger by more.
    stats_until(&rig, &device, |told| {
        told["outstanding"] == 1 && told["oldest_ms"].as_u64().is_some_and(|age| age >= 20)
    });
    for n in 0..6 {
        frontend.submit(Io::Read(Sector(n * 8), 4096));
    }
    frontend.submit(Io::Flush);
    frontend.kick().unwrap();

    // What needs the store fails in words, and leaves the disk as it is.
    let child = format!("aio:{}", rig.path("child").display());
    for (command, options) in [("pause", vec!["-t", "1"]), ("snapshot", vec!["-t", "1", "-a", &child])] {
        let (code, words) = order(&rig, &device, command, &options);
        assert_eq!(code, libc::ETIMEDOUT, "{command}: {words}");
        assert!(words.contains("did not end in time"), "{words}");
    }
    // Others are served meanwhile, and come and go.
    honest.write(Sector(0), &pattern(1, 4096)).unwrap();
    let (_, params) = vhd(&rig, "new.vhd", 8);
    let (third, mut newcomer) = guest(&rig, 3, &params, Shape::simple(DomId(3)));
    newcomer.write(Sector(0), &pattern(1, 4096)).unwrap();
    rig.unplug(&third);
    assert_eq!(rig.tap_ctl(&["list"]).out.lines().count(), 2);

    let told = stats_until(&rig, &device, |told| told["late"] == 8);
    assert!(start.elapsed() >= Duration::from_secs(10), "{told}");
    let oldest = &told["oldest"];
    assert_eq!(
        (&oldest["operation"], &oldest["sector"], &oldest["sectors"]),
        (&"write".into(), &64.into(), &16.into())
    );
    assert!(oldest["by"].as_str().unwrap().contains("domain 1"), "{told}");
    let store = &told["store"];
    assert_eq!(store["file"].as_str().map(Path::new), Some(&*path), "{told}");
    assert_eq!(
        (&store["operation"], &store["offset"], &store["bytes"]),
        (&"write".into(), &32768.into(), &8192.into())
    );
    assert!(
        told["oldest_ms"].as_u64().unwrap() >= 10_000 && store["age_ms"].as_u64().unwrap() >= 10_000,
        "{told}"
    );

    drop(hung);
    assert!(answers(&mut frontend, 8).iter().all(integration::sim::frontend::Completion::is_okay));
    stats_until(&rig, &device, |told| {
        told["late"] == 0 && told["oldest"].is_null() && told["store"].is_null()
    });
    // The disk goes on by itself, and a pause is possible again.
    assert!(frontend.read(Sector(64), 8192).unwrap() == pattern(9, 8192));
    ok(&rig, &device, "pause", &["-t", "5"]);
    ok(&rig, &device, "unpause", &[]);
    frontend.read(Sector(64), 8192).unwrap();
    assert!(!Path::new(&rig.path("child")).exists());
}

#[test]
fn a_pause_under_way_can_be_taken_back() {
    let mut rig = Rig::start(programs!());
    rig.spawn_options = vec!["--engine".into(), "pool".into()];
    let (_, params) = raw(&rig, "a.img", MIB);
    let rings = most_queues(&rig);
    let shape = Shape { queues: rings, ..Shape::simple(DomId(1)) };
    let (device, mut frontend) = guest(&rig, 1, &params, shape);
    warm_up(&mut frontend, device.pid, rings);
    let hung = Hung::threads_of(device.pid);
    frontend.submit(Io::Read(Sector(0), 4096));
    frontend.kick().unwrap();
    stats_until(&rig, &device, |told| told["outstanding"] == 1);
    std::thread::scope(|scope| {
        let pause = scope.spawn(|| order(&rig, &device, "pause", &[]));
        while !rig.tap_ctl(&["list"]).out.contains("state=0x14") {
            std::thread::yield_now();
        }
        ok(&rig, &device, "unpause", &[]);
        let (code, words) = pause.join().unwrap();
        assert_eq!(code, libc::ECANCELED, "{words}");
    });
    frontend.submit(Io::Read(Sector(8), 4096));
    frontend.kick().unwrap();
    drop(hung);
    answers(&mut frontend, 2);
}

/// A server that does not answer, under a guest that is destroyed: nothing of it is left once its tapdisk was killed.
#[test]
fn a_disk_on_a_hung_server_is_given_up_by_force() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", MIB);
    let (socket, _) = serve(&rig, &["-a", &params]);
    let server = Pid::from_raw(rig.host.control().parse_vbd_path(&socket).unwrap().0);
    let spec = format!("nbd:unix:{}", socket.display());
    let (device, mut frontend) = guest(&rig, 1, &spec, Shape::simple(DomId(1)));
    frontend.write(Sector(0), &pattern(1, 4096)).unwrap();
    kill(server, Signal::SIGSTOP).unwrap();
    let stopped = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap().contains(") T ")
    };
    while !std::fs::read_dir(format!("/proc/{server}/task")).unwrap().all(stopped) {
        std::thread::yield_now();
    }
    frontend.submit(Io::Read(Sector(8), 4096));
    frontend.kick().unwrap();
    let told = stats_until(&rig, &device, |told| told["outstanding"] == 1);
    assert_eq!(told["oldest"]["sector"], 8, "{told}");
    rig.store.rm(&device.frontend);
    rig.ask_to_close(&device);
    // Not by gentleness: the tapdisk owes the guest's memory to the server.
    let (code, words) = order(&rig, &device, "destroy", &["-t", "1"]);
    assert_eq!(code, libc::ETIMEDOUT, "{words}");
    assert!(frontend.wait(&mut VecDeque::new(), Duration::from_millis(100)).is_err());
    ok(&rig, &device, "destroy", &["-f", "-t", "1"]);
    rig.wait_value(&format!("{}/state", device.backend), "6");
    kill(server, Signal::SIGCONT).unwrap();
    let left = rig.tap_ctl(&["list"]).out;
    assert!(left.lines().count() == 1 && left.contains("a.img"), "{left}");
    assert!(!rig.host.control().control_socket(device.pid).exists());
}
