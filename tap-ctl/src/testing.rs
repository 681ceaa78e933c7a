//! A stand-in for a tapdisk: a thread that speaks the control protocol from a script; and statistics to tell. Only for this
//! crate's tests.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::dir::ControlDir;
use crate::frame;
use crate::proto::latency::{BUCKETS, bucket};
use crate::proto::{
    DiskStats, Histogram, ImageStats, Latencies, Limits, ReadWrite, Reply, Request, RingEntry, RingStats,
    Stats,
};

/// What the stand-in does with requests.
pub(crate) enum Script {
    /// Gives the same answer to all.
    Always(Reply),
    /// Asks a function.
    Answer(Box<dyn FnMut(&Request) -> Reply + Send>),
    /// Never answers.
    Silent,
    /// Closes the connection instead of answering.
    HangUp,
    /// Answers with no message.
    Garbage,
}

pub(crate) struct FakeTapdisk {
    pub(crate) dir: ControlDir,
    pub(crate) pid: i32,
    seen: Arc<Mutex<Vec<Request>>>,
    _folder: tempfile::TempDir,
}

impl FakeTapdisk {
    /// A tapdisk with process id 4711 in a runtime folder of its own.
    pub(crate) fn start(script: Script) -> FakeTapdisk {
        let folder = tempfile::tempdir().unwrap();
        let dir = ControlDir::at(folder.path());
        let pid = 4711;
        let listener = UnixListener::bind(dir.control_socket(pid)).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&seen);
        thread::spawn(move || serve(&listener, script, &record));
        FakeTapdisk { dir, pid, seen, _folder: folder }
    }

    /// The requests so far, oldest first.
    pub(crate) fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }
}

fn serve(listener: &UnixListener, mut script: Script, record: &Mutex<Vec<Request>>) {
    // Open connections of a silent tapdisk are kept: closing them would be an answer.
    let mut kept = Vec::new();
    for stream in listener.incoming().flatten() {
        if let Some(stream) = converse(stream, &mut script, record) {
            kept.push(stream);
        }
    }
}

fn converse(stream: UnixStream, script: &mut Script, record: &Mutex<Vec<Request>>) -> Option<UnixStream> {
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    let mut writer = stream;
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line).unwrap_or(0) == 0 {
            return None;
        }
        let request: Request = serde_json::from_str(&line).unwrap();
        record.lock().unwrap().push(request.clone());
        let reply = match script {
            Script::Always(reply) => reply.clone(),
            Script::Answer(answer) => answer(&request),
            Script::Silent => return Some(writer),
            Script::HangUp => return None,
            Script::Garbage => {
                writer.write_all(b"what?\n").unwrap();
                continue;
            }
        };
        if writer.write_all(&frame::encode(&reply).unwrap()).is_err() {
            return None;
        }
    }
}

/// The statistics of a frontend's rings.
pub(crate) fn some_ring() -> RingStats {
    let entry = RingEntry { domid: 7, vdev: 51712 };
    RingStats { entry, queues: 1, taken: 5, answered: 3, kicked: 4, kicks: 2, malformed: 1, failed: 0 }
}

/// The statistics of a disk with an image over another, of which three reads took 100, 200 and 3000 µs.
pub(crate) fn some_stats() -> Stats {
    let image = |text: &str, read, write| ImageStats {
        image: text.parse().unwrap(),
        hits: ReadWrite { read, write },
        fail: ReadWrite::default(),
    };
    let mut read = Histogram { counts: vec![0; BUCKETS], sum_us: 3300, max_us: 3000 };
    for time in [100, 200, 3000] {
        read.counts[bucket(time)] += 1;
    }
    Stats {
        image: "vhd:/a \"b".parse().unwrap(),
        paused: false,
        sectors: ReadWrite { read: 24, write: 8 },
        requests: ReadWrite { read: 3, write: 1 },
        latency: Latencies { read, ..Latencies::default() },
        outstanding: 2,
        held: 0,
        oldest_ms: Some(5),
        late: 0,
        oldest: None,
        store: None,
        throttled: 0,
        limit: Limits::default(),
        rings: Vec::new(),
        disk: DiskStats {
            images: vec![image("vhd:/a \"b", 8, 8), image("aio:/p", 16, 0)],
            mirror: None,
            standby: None,
            local_cache: None,
            cache: None,
        },
    }
}
