//! Where the words of xenio and tapdisk go.
//!
//! In the foreground to standard error, with a time stamp, or with the priority where that is the journal; as a daemon to the system log, and where there is none (an
//! early boot, a minimal dom0) to `/var/log/xen/<program>.log`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record, SetLoggerError};

/// How the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// For a person at a terminal, or under a supervisor that keeps standard error.
    Foreground,
    /// Detached.
    Daemon,
}

/// Installs the logger of this process. `debug` adds messages of level debug; the environment changes nothing.
///
/// # Errors
///
/// When the process has a logger already.
pub fn init(program: &'static str, mode: Mode, debug: bool) -> Result<(), SetLoggerError> {
    let level = if debug { LevelFilter::Debug } else { LevelFilter::Info };
    match mode {
        Mode::Foreground => {
            let journal = std::env::var("JOURNAL_STREAM").is_ok_and(|stream| is_stderr(&stream));
            env_logger::Builder::new()
                .filter_level(level)
                .format(move |out, record| {
                    let line = Line { program, record };
                    if journal {
                        // The journal knows the time, and the level from this.
                        return writeln!(out, "<{}>{}", line.severity(), line.text());
                    }
                    writeln!(out, "{} {} {}", timestamp(SystemTime::now()), record.level(), line.text())
                })
                .try_init()
        }
        Mode::Daemon => {
            let file = Path::new("/var/log/xen").join(format!("{program}.log"));
            let daemon = DaemonLog { program, level, sink: Mutex::new(Sink::new("/dev/log".into(), file)) };
            log::set_boxed_logger(Box::new(daemon))?;
            log::set_max_level(level);
            Ok(())
        }
    }
}

/// Whether standard error is the stream to the journal that systemd has made: `DEVICE:INODE` in `JOURNAL_STREAM`, see
/// systemd.exec(5). A program started by one under systemd may have the variable and another standard error.
fn is_stderr(stream: &str) -> bool {
    nix::sys::stat::fstat(std::io::stderr())
        .is_ok_and(|found| stream == format!("{}:{}", found.st_dev, found.st_ino))
}

/// One message, as a line.
struct Line<'a> {
    program: &'static str,
    record: &'a Record<'a>,
}

impl Line<'_> {
    /// `program[pid]: message`; control characters escaped, so that a message is one line whatever it quotes.
    fn text(&self) -> String {
        // Asked anew each time: a daemon has another process id than its starter.
        let mut text = format!("{}[{}]: ", self.program, std::process::id());
        for character in self.record.args().to_string().chars() {
            if character.is_control() {
                text.extend(character.escape_default());
            } else {
                text.push(character);
            }
        }
        text
    }

    /// Facility daemon (3) and the severity, as RFC 3164 section 4.1.1 packs them.
    fn priority(&self) -> u8 {
        3 * 8 + self.severity()
    }

    /// As in syslog(3) and sd-daemon(3).
    fn severity(&self) -> u8 {
        match self.record.level() {
            Level::Error => 3,
            Level::Warn => 4,
            Level::Info => 6,
            Level::Debug | Level::Trace => 7,
        }
    }
}

struct DaemonLog {
    program: &'static str,
    level: LevelFilter,
    sink: Mutex<Sink>,
}

impl Log for DaemonLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= self.level
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = Line { program: self.program, record };
            let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
            sink.put(line.priority(), &line.text());
        }
    }

    fn flush(&self) {}
}

/// The system log if it takes a message, else the file.
struct Sink {
    syslog: PathBuf,
    file: PathBuf,
    socket: Option<UnixDatagram>,
    open_file: Option<File>,
}

impl Sink {
    fn new(syslog: PathBuf, file: PathBuf) -> Sink {
        Sink { syslog, file, socket: None, open_file: None }
    }

    fn put(&mut self, priority: u8, text: &str) {
        if !self.send(format!("<{priority}>{text}").as_bytes()) {
            self.append(text);
        }
    }

    fn send(&mut self, datagram: &[u8]) -> bool {
        if self.socket.is_none() {
            // Never blocking: a stuck system log must not stop disks.
            self.socket =
                UnixDatagram::unbound().and_then(|socket| socket.set_nonblocking(true).map(|()| socket)).ok();
        }
        // Addressed each time, not connected: a restarted system log is found again.
        self.socket.as_ref().is_some_and(|socket| socket.send_to(datagram, &self.syslog).is_ok())
    }

    fn append(&mut self, text: &str) {
        if self.open_file.is_none() {
            self.open_file = OpenOptions::new().append(true).create(true).mode(0o640).open(&self.file).ok();
        }
        if let Some(file) = &mut self.open_file {
            // Nowhere is left to complain.
            let _ = writeln!(file, "{} {text}", timestamp(SystemTime::now()));
        }
    }
}

/// UTC in the form of RFC 3339 with milliseconds.
fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
}

/// Year, month and day of a number of days since 1970-01-01 in the Gregorian calendar.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    let mut year = 1970;
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_is_known_by_the_device_and_inode_of_standard_error() {
        let found = nix::sys::stat::fstat(std::io::stderr()).unwrap();
        assert!(is_stderr(&format!("{}:{}", found.st_dev, found.st_ino)));
        assert!(!is_stderr(&format!("{}:{}", found.st_dev, found.st_ino + 1)));
        assert!(!is_stderr(""));
    }

    #[test]
    fn time_stamps_agree_with_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_827_696, "2000-02-29T12:34:56.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (1_795_236_911, "2026-11-21T04:55:11.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
        assert_eq!(timestamp(UNIX_EPOCH + Duration::from_millis(1234)), "1970-01-01T00:00:01.234Z");
    }

    fn put(log: &DaemonLog, level: Level, text: &str) {
        log.log(&Record::builder().level(level).args(format_args!("{text}")).build());
    }

    #[test]
    fn messages_reach_the_system_log_and_fall_back_to_the_file_while_it_is_away() {
        let folder = tempfile::tempdir().unwrap();
        let (syslog, file) = (folder.path().join("log"), folder.path().join("xenio.log"));
        let sink = Mutex::new(Sink::new(syslog.clone(), file.clone()));
        let log = DaemonLog { program: "xenio", level: LevelFilter::Info, sink };
        put(&log, Level::Warn, "before\nthe log");
        let server = UnixDatagram::bind(&syslog).unwrap();
        put(&log, Level::Warn, "heard");
        put(&log, Level::Debug, "not wanted");
        drop(server);
        put(&log, Level::Error, "after");
        let pid = std::process::id();
        let lines: Vec<String> =
            std::fs::read_to_string(file).unwrap().lines().map(|line| line[25..].to_owned()).collect();
        assert_eq!(lines, [format!("xenio[{pid}]: before\\nthe log"), format!("xenio[{pid}]: after")]);
    }

    #[test]
    fn a_datagram_carries_facility_and_severity() {
        let folder = tempfile::tempdir().unwrap();
        let syslog = folder.path().join("log");
        let server = UnixDatagram::bind(&syslog).unwrap();
        let sink = Mutex::new(Sink::new(syslog, folder.path().join("file")));
        let log = DaemonLog { program: "tapdisk", level: LevelFilter::Debug, sink };
        let mut buffer = [0; 200];
        for (level, priority) in
            [(Level::Error, 27), (Level::Warn, 28), (Level::Info, 30), (Level::Debug, 31)]
        {
            put(&log, level, "words");
            let count = server.recv(&mut buffer).unwrap();
            let expected = format!("<{priority}>tapdisk[{}]: words", std::process::id());
            assert_eq!(std::str::from_utf8(&buffer[..count]).unwrap(), expected);
        }
    }
}
