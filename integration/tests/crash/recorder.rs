//! Records what a program does to one file, by its system calls (strace), so that it can be replayed up to any moment.
//!
//! The programs use plain system calls for that: a tapdisk is started with `--engine pool`, because what io_uring does is no
//! system call. The engines carry out the same steps in the same order: `tapdisk::image` waits for each before the next, and
//! neither engine knows what it writes. QEMU's storage daemon could
//! record writes that come through FUSE, but up to version 10.0 it mixes up the data of writes that are in flight together.
//!
//! A write counts from its end on, a flush from its beginning: what a flush makes durable has ended before it began.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use format::testing::{Memory, Op};
use integration::rig::PATIENCE;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CALLS: &str = "trace=pwrite64,pwritev,pwritev2,write,writev,fdatasync,fsync,ftruncate,fallocate";

/// Why nothing can be recorded here; `None`: it can.
pub fn missing() -> Option<String> {
    let tried = Command::new("strace").args(["-o", "/dev/null", "true"]).output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Some(format!("strace: {error}")),
    }
}

/// A file whose changes are recorded.
pub struct Recorder {
    file: PathBuf,
    trace: PathBuf,
    start: Memory,
    strace: Option<Child>,
}

impl Recorder {
    /// Writes the file, and records what the running program does to it.
    pub fn attach(file: &Path, start: Memory, program: i32) -> Recorder {
        let mut recorder = Recorder::new(file, start);
        let mut command = recorder.strace();
        let strace = command.args(["-p", &program.to_string()]).spawn().unwrap();
        recorder.strace = Some(strace);
        // It says so nowhere but in the kernel.
        let traced = || {
            let status = std::fs::read_to_string(format!("/proc/{program}/status")).unwrap();
            !status.contains("TracerPid:\t0\n")
        };
        wait(traced, "strace follows the program");
        recorder
    }

    /// Records what a program does to the file from its start to its end, which is to be a success.
    pub fn run(file: &Path, start: Memory, program: &Path, args: &[&str]) -> Recorder {
        let recorder = Recorder::new(file, start);
        let output = recorder.strace().arg(program).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        recorder
    }

    fn new(file: &Path, start: Memory) -> Recorder {
        let trace = file.with_extension("trace");
        Recorder { file: file.to_owned(), trace, start, strace: None }
    }

    fn strace(&self) -> Command {
        let mut command = Command::new("strace");
        command.args(["-f", "-q", "-y", "-xx", "-s", "8388608", "-e", CALLS, "-e", "signal=none", "-o"]);
        command.arg(&self.trace).stdin(Stdio::null());
        command
    }

    /// This moment, as [`Recorder::stop`] tells of it. Nothing may be in flight.
    pub fn moment(&self) -> u64 {
        // A traced call goes on only when it has been written down.
        self.trace.metadata().unwrap().len()
    }

    /// The whole trace so far, for [`changes_of`] other files.
    pub fn trace(&self) -> String {
        std::fs::read_to_string(&self.trace).unwrap()
    }

    /// Ends the recording once the program has ended: what the file was at first, and what was done to it, each with the
    /// moment from which on it is there.
    pub fn stop(mut self) -> (Memory, Vec<(u64, Op)>) {
        if let Some(mut strace) = self.strace.take() {
            wait(|| strace.try_wait().unwrap().is_some(), "strace has seen the program end");
        }
        let log = changes_of(&self.trace(), &self.file);
        // The log is all there is to know: it leads to what the file is now.
        let mut state = self.start.clone();
        log.iter().for_each(|(_, op)| state.apply(op));
        assert!(std::fs::read(&self.file).unwrap() == state.bytes, "the trace tells all that was done");
        (self.start.clone(), log)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(mut strace) = self.strace.take() {
            // A failed test: the traced program goes on without it.
            let _ = kill(Pid::from_raw(strace.id().try_into().unwrap()), Signal::SIGTERM);
            let _ = strace.wait();
        }
    }
}

/// What a trace tells of a file: what was done to it, each with the moment from which on it is there.
pub fn changes_of(text: &str, file: &Path) -> Vec<(u64, Op)> {
    let name: String = file.to_str().unwrap().bytes().map(|byte| format!("\\x{byte:02x}")).collect();
    let ours = format!("<{name}>");
    let mut ops = Vec::new();
    // Calls that have begun and not ended, by thread.
    let mut open: Vec<(&str, &str)> = Vec::new();
    let mut end = 0;
    for line in text.split_inclusive('\n') {
        end += line.len() as u64;
        let Some((thread, call)) = line.split_once(' ') else { continue };
        let call = call.trim();
        let (head, tail) = if let Some(head) = call.strip_suffix(" <unfinished ...>") {
            open.push((thread, head));
            if head.contains("sync(") && head.contains(&ours) {
                ops.push((end, Op::Flush));
            }
            continue;
        } else if call.starts_with("<...") {
            let place = open.iter().position(|(of, _)| *of == thread).expect("a call ends that began");
            (open.swap_remove(place).1, call)
        } else {
            (call, call)
        };
        if !head.contains(&ours) {
            continue;
        }
        let result = tail.rsplit_once(" = ").map(|(_, result)| result.parse::<i64>());
        let Some(Ok(result @ 0..)) = result else { continue };
        let whole = head.len() == call.len();
        if let Some(op) = operation(head, usize::try_from(result).unwrap(), whole) {
            ops.push((end, op));
        }
    }
    ops
}

/// What a successful call has done. A flush that did not end at once was noted when it began.
fn operation(call: &str, result: usize, whole: bool) -> Option<Op> {
    let (name, rest) = call.split_once('(')?;
    let (_, args) = rest.split_once(">")?;
    let args = args.split_once(')').map_or(args, |(args, _)| args);
    let numbers = |text: &str| {
        let text = text.trim_end_matches(" = 0").trim_end_matches(')').to_owned();
        text.split(", ").filter_map(|number| number.parse::<u64>().ok()).collect::<Vec<_>>()
    };
    match name {
        "fdatasync" | "fsync" => whole.then_some(Op::Flush),
        "ftruncate" => Some(Op::SetLen(numbers(args)[0])),
        "fallocate" => {
            let place = numbers(args);
            assert!(args.contains("PUNCH_HOLE") || args.contains("ZERO_RANGE"), "{call}");
            let [.., start, len] = place[..] else { panic!("{call}") };
            Some(Op::Zero(start..start + len))
        }
        "pwrite64" => {
            let (data, place) = args.rsplit_once('"')?;
            Some(Op::Write(numbers(place)[1], unhex(data.split_once('"')?.1, result)))
        }
        "pwritev" | "pwritev2" => {
            let (data, place) = args.rsplit_once("], ")?;
            let pieces = data.split("iov_base=\"").skip(1);
            let bytes = pieces.flat_map(|piece| unhex(piece.split_once('"').unwrap().0, usize::MAX));
            Some(Op::Write(numbers(place)[1], bytes.take(result).collect()))
        }
        other => panic!("{other} changes an image at an unknown place"),
    }
}

/// The first bytes of a string of `\x41`s.
fn unhex(text: &str, most: usize) -> Vec<u8> {
    let byte = |digits: &str| u8::from_str_radix(digits.get(..2).unwrap(), 16).unwrap();
    text.split("\\x").skip(1).take(most).map(byte).collect()
}

/// Waits for somebody else's program, which tells nobody how far it is.
fn wait(mut condition: impl FnMut() -> bool, what: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waiting until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_trace_is_read() {
    let text = "1 pwrite64(3<\\x2f\\x61>, \"\\x78\\x79\", 2, 3) = 2\n\
                2 pwritev2(3<\\x2f\\x61>, [{iov_base=\"\\x01\\x02\", iov_len=2}], 1, 512, 0 <unfinished ...>\n\
                1 fdatasync(3<\\x2f\\x61> <unfinished ...>\n\
                2 <... pwritev2 resumed>) = 1\n\
                1 <... fdatasync resumed>) = 0\n\
                1 ftruncate(4<\\x2f\\x62>, 7) = 0\n\
                1 ftruncate(3<\\x2f\\x61>, 9) = 0\n\
                1 fallocate(3<\\x2f\\x61>, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 4096, 8192) = 0\n\
                1 pwrite64(3<\\x2f\\x61>, \"\\x78\\x79\", 2, 3) = -1 ENOSPC (No space left on device)\n";
    let ops = changes_of(text, Path::new("/a")).into_iter().map(|(_, op)| op).collect::<Vec<_>>();
    let expected = [
        Op::Write(3, b"xy".to_vec()),
        Op::Flush,
        Op::Write(512, vec![1]),
        Op::SetLen(9),
        Op::Zero(4096..12288),
    ];
    assert_eq!(ops, expected);
}
