//! A tapdisk without disks: keeps books about rings, remembers what it was asked, fails and hangs on demand.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use tap_ctl::proto::{DiskInfo, Minor, Reply, Request, RingEntry, RingParams, VbdEntry};
use tap_ctl::{ControlDir, frame};

const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Clone, Copy)]
pub struct Vbd {
    pub info: DiskInfo,
    /// Its flush has failed.
    pub failed: bool,
    /// It is not as it was asked for.
    pub degraded: bool,
}

#[derive(Default)]
struct State {
    vbds: BTreeMap<u16, Vbd>,
    rings: Vec<(u16, RingParams)>,
    log: Vec<Request>,
    refuse_connect: Option<Reply>,
    hanging: bool,
    dead: bool,
    connections: Vec<UnixStream>,
    followers: Vec<UnixStream>,
    /// How often somebody began to follow.
    follows: usize,
    /// Of a release that knows nothing of following.
    old: bool,
    strike: Option<Strike>,
}

/// What happens instead of an answer.
struct Strike {
    /// After so many more requests.
    left: usize,
    /// The request is carried out all the same.
    carried_out: bool,
    act: Box<dyn FnOnce() + Send>,
}

impl State {
    fn change(&mut self, minor: u16) {
        let news = changed(minor, &self.vbds[&minor]);
        self.followers.retain_mut(|stream| stream.write_all(&news).is_ok());
    }
}

fn changed(minor: u16, vbd: &Vbd) -> Vec<u8> {
    let failed = vbd.failed.then(|| FAILURE.to_owned());
    let degraded = vbd.degraded.then(|| DEGRADATION.to_owned());
    frame::encode(&Reply::Changed { minor: Minor(minor), info: vbd.info, failed, degraded }).unwrap()
}

/// What a disk without its second image is told with.
pub const DEGRADATION: &str = "goes on without its second image: aio:/srv/y.img: writing failed: EIO";

/// What a failed disk is told with.
pub const FAILURE: &str = "vhd:/srv/x.vhd: writing it back failed: EIO";

pub struct FakeTapdisk {
    pub pid: i32,
    shared: Arc<(Mutex<State>, Condvar)>,
}

pub fn disk() -> DiskInfo {
    DiskInfo { sectors: 2048, sector_size: 512, physical_sector_size: 4096, readonly: false, discard: None }
}

impl FakeTapdisk {
    pub fn start(dir: &ControlDir, pid: i32) -> FakeTapdisk {
        dir.create().unwrap();
        let listener = UnixListener::bind(dir.control_socket(pid)).unwrap();
        let shared = Arc::new((Mutex::new(State::default()), Condvar::new()));
        let served = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut state = served.0.lock().unwrap();
                if state.dead {
                    // The listener goes with this thread; its socket file stays, as after a crash.
                    return;
                }
                state.connections.push(stream.try_clone().unwrap());
                drop(state);
                let served = Arc::clone(&served);
                thread::spawn(move || converse(&stream, &served));
            }
        });
        FakeTapdisk { pid, shared }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let value = change(&mut self.shared.0.lock().unwrap());
        self.shared.1.notify_all();
        value
    }

    /// Opens an image as `minor`.
    pub fn open(&self, minor: u16, info: DiskInfo) {
        self.with(|state| {
            state.vbds.insert(minor, Vbd { info, failed: false, degraded: false });
            state.change(minor);
        });
    }

    /// Closes the image open as `minor`, which nobody is told.
    pub fn close(&self, minor: u16) {
        self.with(|state| state.vbds.remove(&minor));
    }

    /// Makes the image open as `minor` larger.
    pub fn resize(&self, minor: u16, sectors: u64) {
        self.with(|state| {
            state.vbds.get_mut(&minor).unwrap().info.sectors = sectors;
            state.change(minor);
        });
    }

    /// A flush of the image open as `minor` fails.
    pub fn fail(&self, minor: u16) {
        self.with(|state| {
            state.vbds.get_mut(&minor).unwrap().failed = true;
            state.change(minor);
        });
    }

    /// The second image of the disk open as `minor` fails, or it is given another one.
    pub fn degrade(&self, minor: u16, degraded: bool) {
        self.with(|state| {
            state.vbds.get_mut(&minor).unwrap().degraded = degraded;
            state.change(minor);
        });
    }

    /// Tells news that are none of the present.
    pub fn tell(&self, minor: u16, info: DiskInfo) {
        let news = changed(minor, &Vbd { info, failed: false, degraded: false });
        self.with(|state| state.followers.retain_mut(|stream| stream.write_all(&news).is_ok()));
    }

    /// Ends the connections of those who follow, as when they do not read.
    pub fn drop_followers(&self) {
        self.with(|state| {
            for stream in state.followers.drain(..) {
                // It may have ended by itself.
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
    }

    /// Does `act` instead of answering the `nth` request from now on (1: the next one), which is carried out or is not.
    pub fn strike(&self, nth: usize, carried_out: bool, act: impl FnOnce() + Send + 'static) {
        let act = Box::new(act);
        self.with(|state| state.strike = Some(Strike { left: nth - 1, carried_out, act }));
    }

    /// Whether the strike that was asked for is still to come.
    pub fn is_unstruck(&self) -> bool {
        self.with(|state| state.strike.is_some())
    }

    /// Waits for these rings to be served, but no longer than `timeout`; tells whether they are.
    pub fn serves(&self, rings: &[RingParams], timeout: Duration) -> bool {
        let differ = |state: &mut State| !state.rings.iter().map(|(_, ring)| ring).eq(rings);
        let state = self.shared.0.lock().unwrap();
        let (_state, waited) = self.shared.1.wait_timeout_while(state, timeout, differ).unwrap();
        !waited.timed_out()
    }

    /// Refuses to be followed from now on, as an earlier release does.
    pub fn grow_old(&self) {
        self.with(|state| state.old = true);
    }

    /// How often somebody began to follow.
    pub fn follows(&self) -> usize {
        self.with(|state| state.follows)
    }

    /// Waits until somebody began to follow for the `count`th time.
    pub fn wait_follows(&self, count: usize) {
        let state = self.shared.0.lock().unwrap();
        let (state, timeout) =
            self.shared.1.wait_timeout_while(state, PATIENCE, |state| state.follows < count).unwrap();
        assert!(!timeout.timed_out(), "followed {} times", state.follows);
    }

    /// Ends as a crash does.
    pub fn crash(&self, dir: &ControlDir) {
        self.with(|state| {
            state.dead = true;
            for connection in state.connections.drain(..) {
                // It may have ended by itself.
                let _ = connection.shutdown(Shutdown::Both);
            }
        });
        // Wakes the listener's thread.
        let _ = UnixStream::connect(dir.control_socket(self.pid));
        self.with(|state| state.rings.clear());
    }

    /// Answers nothing until told otherwise.
    pub fn hang(&self, hanging: bool) {
        self.with(|state| state.hanging = hanging);
    }

    /// Answers every Connect with `reply`.
    pub fn refuse_connect(&self, reply: Option<Reply>) {
        self.with(|state| state.refuse_connect = reply);
    }

    /// Loses a ring without telling anybody.
    pub fn lose_rings(&self) {
        self.with(|state| state.rings.clear());
    }

    /// The rings being served.
    pub fn rings(&self) -> Vec<RingParams> {
        self.with(|state| state.rings.iter().map(|(_, ring)| ring.clone()).collect())
    }

    /// Waits until so many rings are served.
    pub fn wait_rings(&self, count: usize) {
        let state = self.shared.0.lock().unwrap();
        let (state, timeout) =
            self.shared.1.wait_timeout_while(state, PATIENCE, |state| state.rings.len() != count).unwrap();
        assert!(!timeout.timed_out(), "expected {count} rings: {:?}", state.rings);
    }

    pub fn log(&self) -> Vec<Request> {
        self.with(|state| state.log.clone())
    }

    /// How often a Connect was asked for.
    pub fn connects(&self) -> usize {
        self.log().iter().filter(|request| matches!(request, Request::Connect { .. })).count()
    }

    /// How often a Disconnect was asked for.
    pub fn disconnects(&self) -> usize {
        self.log().iter().filter(|request| matches!(request, Request::Disconnect { .. })).count()
    }

    /// Waits for a request.
    pub fn wait_log(&self, what: &str, wanted: impl Fn(&[Request]) -> bool) {
        let state = self.shared.0.lock().unwrap();
        let (state, timeout) =
            self.shared.1.wait_timeout_while(state, PATIENCE, |state| !wanted(&state.log)).unwrap();
        assert!(!timeout.timed_out(), "tapdisk was not asked to {what}: {:?}", state.log);
    }
}

fn converse(stream: &UnixStream, shared: &(Mutex<State>, Condvar)) {
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    while lines.read_line(&mut line).unwrap_or(0) > 0 {
        let request: Request = serde_json::from_str(&line).unwrap();
        line.clear();
        let mut state = shared.0.lock().unwrap();
        if request == Request::Follow {
            follow(&mut state, stream);
            shared.1.notify_all();
            continue;
        }
        state.log.push(request.clone());
        shared.1.notify_all();
        let mut state = shared.1.wait_while(state, |state| state.hanging && !state.dead).unwrap();
        if state.dead {
            return;
        }
        let struck = state.strike.take_if(|strike| strike.left == 0);
        if let Some(strike) = &mut state.strike {
            strike.left -= 1;
        }
        let was_struck = struck.is_some();
        let reply =
            struck.as_ref().is_none_or(|strike| strike.carried_out).then(|| answer(&mut state, request));
        drop(state);
        shared.1.notify_all();
        if let Some(strike) = struck {
            (strike.act)();
        }
        let Some(reply) = reply.filter(|_| !was_struck) else { continue };
        let mut writer = stream;
        if writer.write_all(&frame::encode(&reply).unwrap()).is_err() {
            return;
        }
    }
}

/// Not in the log: whether xenio follows is nothing a device's life depends on.
fn follow(state: &mut State, mut stream: &UnixStream) {
    state.follows += 1;
    let reply = match state.old {
        true => frame::encode(&refuse(71, "unknown request")).unwrap(),
        false => state.vbds.iter().flat_map(|(minor, vbd)| changed(*minor, vbd)).collect(),
    };
    if stream.write_all(&reply).is_ok() && !state.old {
        state.followers.push(stream.try_clone().unwrap());
    }
}

fn refuse(errno: i32, message: &str) -> Reply {
    Reply::Error { errno, message: message.to_owned() }
}

fn answer(state: &mut State, request: Request) -> Reply {
    match request {
        Request::List => {
            let rings = |minor: u16| {
                let of_minor = state.rings.iter().filter(move |(served, _)| *served == minor);
                of_minor.map(|(_, ring)| RingEntry { domid: ring.domid, vdev: ring.vdev }).collect()
            };
            let entry = |minor: &u16| VbdEntry {
                minor: Minor(*minor),
                state: 0,
                image: Some("vhd:/srv/x.vhd".parse().unwrap()),
                rings: rings(*minor),
            };
            Reply::List { vbds: state.vbds.keys().map(entry).collect() }
        }
        Request::DiskInfo { minor } => match state.vbds.get(&minor.0) {
            Some(vbd) => Reply::DiskInfo(vbd.info),
            None => refuse(19, "no such minor"),
        },
        Request::Connect { minor, ring } => {
            if let Some(reply) = &state.refuse_connect {
                return reply.clone();
            }
            let same =
                |(_, served): &(u16, RingParams)| (served.domid, served.vdev) == (ring.domid, ring.vdev);
            if state.rings.iter().any(same) {
                return refuse(114, "this device has a ring already");
            }
            state.rings.push((minor.0, ring));
            Reply::Done
        }
        Request::Disconnect { domid, vdev, .. } => {
            let before = state.rings.len();
            state.rings.retain(|(_, ring)| (ring.domid, ring.vdev) != (domid, vdev));
            if state.rings.len() < before { Reply::Done } else { refuse(19, "this device has no ring") }
        }
        other => panic!("xenio has no business asking {other:?}"),
    }
}
