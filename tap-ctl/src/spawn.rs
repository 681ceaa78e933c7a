//! Starting a tapdisk.
//!
//! The tapdisk does not fork. It leaves the session of its parent, binds its control socket, prints the socket's path
//! as a line of its own and then lets go of standard output and error. Until that line both are a pipe to us, so what
//! it says when it gives up reaches the person who asked.
//!
//! Where systemd runs, the tapdisk gets a scope of its own, `tapdisk-<pid>.scope` in `xenio-tapdisk.slice`: it belongs to
//! its guest, so it must end neither with the login session of who typed `xl create`, nor with a service that is
//! restarted. A system manager that refuses costs a warning, not the disk.

use std::io::{self, PipeReader, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::dir::ControlDir;
use crate::error::Error;

/// How long a tapdisk may take until it is ready. Hotplug scripts are given 40 s by libxl.
const STARTUP: Duration = Duration::from_secs(20);

/// How much of the child's words is kept, in bytes; the rest is dropped.
const OUTPUT_MAX: usize = 8192;

/// Exists where systemd is the system's manager: sd_booted(3).
const SYSTEMD: &str = "/run/systemd/system";

/// Makes the scope of its own process and becomes the tapdisk, so that the process id stays that of our child.
/// `systemd-run` needs the scope's name in advance, hence the shell, whose process id is the same too. The empty line says
/// that the scope is there.
const SCOPE: &str = "exec systemd-run --scope --quiet --collect --no-ask-password --slice=xenio-tapdisk.slice \
                     --unit=\"tapdisk-$$\" --description=\"Disk of a Xen guest (tapdisk $$)\" -- \
                     sh -c 'echo && exec \"$0\" \"$@\"' \"$0\" \"$@\"";

/// Starts `program` and returns once it listens on its control socket. Its process id is that of the child. `options`
/// are its own.
///
/// The child inherits no descriptor of ours beyond the standard three: all others are close-on-exec.
///
/// # Errors
///
/// [`Error::Start`] when the program cannot be executed, [`Error::Startup`] with its own words when it gives up or is
/// not ready in 20 s; then it is no longer running.
pub fn spawn(dir: &ControlDir, program: &Path, options: &[&str]) -> Result<Child, Error> {
    if Path::new(SYSTEMD).is_dir() && nix::unistd::geteuid().is_root() {
        let mut command = Command::new("sh");
        command.args(["-c", SCOPE]).arg(program);
        match launch(command, dir, program, options) {
            Err(Unready { error, scoped: false }) => {
                log::warn!("a tapdisk in a scope of its own: {error}; starting it without");
            }
            ready => return ready.map_err(|unready| unready.error),
        }
    }
    launch(Command::new(program), dir, program, options).map_err(|unready| unready.error)
}

/// A tapdisk that did not become ready.
#[derive(Debug)]
struct Unready {
    error: Error,
    /// It had a scope, so it was not for want of one.
    scoped: bool,
}

/// Starts the command, which becomes `program`, and waits until it is ready.
fn launch(
    mut command: Command,
    dir: &ControlDir,
    program: &Path,
    options: &[&str],
) -> Result<Child, Unready> {
    command.args(options);
    let (mut reader, mut child) = start(command).map_err(|source| {
        let error = Error::Start { program: program.to_owned(), source };
        Unready { error, scoped: false }
    })?;
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    let ready_line = dir.control_socket(pid);
    let mut output = Output::default();
    let outcome = wait_ready(&mut reader, &mut output, &ready_line, Instant::now() + STARTUP);
    let status = match outcome {
        Ok(true) => return Ok(child),
        Ok(false) => None,
        Err(error) => Some(error.to_string()),
    };
    if status.is_some() {
        // It is of no use and must not become one later, when nobody knows of it. If it has ended meanwhile, so be it.
        let _ = child.kill();
    }
    let end = child.wait().map_or_else(|error| error.to_string(), |end| end.to_string());
    let scoped = output.has_line(Path::new(""));
    let (status, output) = (status.unwrap_or(end), output.words());
    Err(Unready { error: Error::Startup { program: program.to_owned(), status, output }, scoped })
}

/// The child, and the reading end of the pipe that is its standard output and error.
fn start(mut command: Command) -> io::Result<(PipeReader, Child)> {
    let (reader, writer) = io::pipe()?;
    // The command owns our copies of the writing end and drops them here, so that the child's end is our end of file.
    let child = command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer).spawn()?;
    Ok((reader, child))
}

/// Reads until the ready line (true) or the end of the output (false).
fn wait_ready(
    reader: &mut PipeReader,
    output: &mut Output,
    ready_line: &Path,
    deadline: Instant,
) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(reader.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(io::Error::other(format!("not ready within {} s", STARTUP.as_secs()))),
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let mut bytes = [0; 1024];
        let count = reader.read(&mut bytes)?;
        if count == 0 {
            return Ok(false);
        }
        output.feed(bytes.get(..count).unwrap_or_default());
        if output.has_line(ready_line) {
            return Ok(true);
        }
    }
}

/// What a starting tapdisk printed so far.
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
}

impl Output {
    fn feed(&mut self, bytes: &[u8]) {
        // The newest words are the ones that explain an end, and the ready line is always the last one.
        self.bytes.extend_from_slice(bytes);
        let surplus = self.bytes.len().saturating_sub(OUTPUT_MAX);
        self.bytes.drain(..surplus);
    }

    fn has_line(&self, path: &Path) -> bool {
        let wanted = path.as_os_str().as_encoded_bytes();
        self.bytes.split_inclusive(|&byte| byte == b'\n').any(|line| line.strip_suffix(b"\n") == Some(wanted))
    }

    fn words(&self) -> String {
        let text = String::from_utf8_lossy(&self.bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        if lines.is_empty() { "it printed nothing; see its log".to_owned() } else { lines.join("; ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    struct Stage {
        folder: tempfile::TempDir,
        dir: ControlDir,
    }

    impl Stage {
        fn new() -> Stage {
            let folder = tempfile::tempdir().unwrap();
            let dir = ControlDir::at(folder.path());
            Stage { folder, dir }
        }

        /// A program made of shell; `$DIR` is the runtime folder. `exec` keeps the process id.
        fn program(&self, body: &str) -> PathBuf {
            let path = self.folder.path().join("tapdisk");
            fs::write(&path, format!("#!/bin/sh\nDIR={}\n{body}\n", self.folder.path().display())).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        }

        fn spawn(&self, body: &str) -> Result<Child, Error> {
            // Another test thread that forks while the script is open for writing makes its execution fail for a
            // moment (ETXTBSY); that is no property of what is tested here.
            let program = self.program(body);
            loop {
                match spawn(&self.dir, &program, &["--engine", "pool"]) {
                    Err(Error::Start { source, .. })
                        if source.kind() == io::ErrorKind::ExecutableFileBusy => {}
                    other => return other,
                }
            }
        }
    }

    #[test]
    fn the_ready_line_ends_the_wait_while_the_child_lives_on() {
        let stage = Stage::new();
        let mut child = stage
            .spawn("echo warming up\nprintf \"$DIR/ctl$$\\n\"\nexec sleep 1000 >/dev/null 2>&1")
            .unwrap();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn options_are_passed_on() {
        let stage = Stage::new();
        let mut child = stage.spawn("echo \"$*\" >\"$DIR/args\"\nprintf \"$DIR/ctl$$\\n\"").unwrap();
        child.wait().unwrap();
        assert_eq!(fs::read_to_string(stage.folder.path().join("args")).unwrap(), "--engine pool\n");
    }

    #[test]
    fn giving_up_is_an_error_with_the_words_of_the_child() {
        let error = Stage::new().spawn("echo no io_uring here >&2\necho really\nexit 3").unwrap_err();
        assert!(error.to_string().contains("no io_uring here; really"), "{error}");
        assert!(error.to_string().contains('3'), "{error}");
        assert_ne!(error.errno(), 0);
    }

    #[test]
    fn an_end_in_silence_and_the_line_of_another_process_are_not_ready() {
        for body in ["exit 0", "echo \"$DIR/ctl1\"; exit 0", "printf \"$DIR/ctl$$\"; exit 0"] {
            assert!(matches!(Stage::new().spawn(body), Err(Error::Startup { .. })), "{body}");
        }
    }

    #[test]
    fn who_gave_up_in_a_scope_is_told_from_who_got_none() {
        let stage = Stage::new();
        for (body, scoped) in [("echo; echo no such image", true), ("echo no such bus", false)] {
            let mut command = Command::new("sh");
            command.args(["-c", body]);
            let unready = launch(command, &stage.dir, Path::new("tapdisk"), &[]).unwrap_err();
            assert_eq!(unready.scoped, scoped);
            assert!(unready.error.to_string().contains(": no such"), "{}", unready.error);
        }
    }

    #[test]
    fn a_missing_program_is_named() {
        let stage = Stage::new();
        let error = spawn(&stage.dir, Path::new("/nonexistent/tapdisk"), &[]).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/tapdisk"), "{error}");
        assert_eq!(error.errno(), 2);
    }

    #[test]
    fn the_child_inherits_only_the_standard_descriptors() {
        let stage = Stage::new();
        let listing = stage.folder.path().join("fds");
        let body = format!(
            "for fd in /proc/$$/fd/*; do echo \"${{fd##*/}} $(readlink $fd)\"; done >{0}\nprintf \"$DIR/ctl$$\\n\"",
            listing.display()
        );
        // Opened by the standard library, so close-on-exec, as every descriptor of ours.
        let _ours = fs::File::open(stage.folder.path()).unwrap();
        stage.spawn(&body).unwrap().wait().unwrap();
        let listing = fs::read_to_string(listing).unwrap();
        let leaked = stage.folder.path().display().to_string();
        assert!(!listing.lines().any(|line| line.ends_with(&leaked)), "{listing}");
        assert!(listing.contains("0 /dev/null"), "{listing}");
    }

    #[test]
    fn a_talkative_child_is_kept_bounded_and_still_seen_ready() {
        let mut output = Output::default();
        for _ in 0..1000 {
            output.feed(b"0123456789 0123456789\n");
        }
        output.feed(b"/run/x/ctl5\n");
        assert!(output.bytes.len() <= OUTPUT_MAX);
        assert!(output.has_line(Path::new("/run/x/ctl5")));
        assert!(!output.has_line(Path::new("/run/x/ctl")));
    }
}
