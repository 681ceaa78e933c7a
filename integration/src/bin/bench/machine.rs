//! The machine under the bench: which CPU does what, the file, and the tools that count.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;

/// CPUs for the two sides.
#[derive(Clone, Debug)]
pub struct Cpus {
    /// All that this process may use, as `taskset` takes them.
    all: String,
    /// The backend's and the guest's, if there are two.
    sides: Option<(u32, u32)>,
}

impl Cpus {
    /// The first CPU that this process may use is the backend's, the last one the guest's.
    pub fn find() -> anyhow::Result<Cpus> {
        let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
        let all = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let all = all.context("the kernel does not tell which CPUs may be used")?.trim().to_owned();
        let number = |text: Option<&str>| text.and_then(|text| text.parse::<u32>().ok());
        let first = number(all.split([',', '-']).next());
        let last = number(all.rsplit([',', '-']).next());
        let sides = first.zip(last).filter(|(backend, guest)| backend != guest);
        Ok(Cpus { all, sides })
    }

    /// Keeps all threads of a tapdisk, and those they start, on the backend's CPU.
    pub fn pin_backend(&self, pid: i32) -> anyhow::Result<()> {
        self.sides.map_or(Ok(()), |(cpu, _)| pin(pid, cpu))
    }

    /// Keeps the calling thread and what it starts, but for [`Cpus::command`]s, on the guest's CPU.
    pub fn pin_guest(&self) -> anyhow::Result<()> {
        self.sides.map_or(Ok(()), |(_, cpu)| pin(nix::unistd::gettid().as_raw(), cpu))
    }

    /// A program that may run on every CPU.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("taskset");
        command.args(["-c", &self.all, program]);
        command
    }
}

fn pin(pid: i32, cpu: u32) -> anyhow::Result<()> {
    let status = Command::new("taskset")
        .args(["-a", "-c", "-p", &cpu.to_string(), &pid.to_string()])
        .stdout(Stdio::null())
        .status()
        .context("cannot run taskset")?;
    anyhow::ensure!(status.success(), "taskset does not move process {pid} to CPU {cpu}");
    Ok(())
}

/// Processor time that a process has used, with all its threads.
pub fn processor_time(pid: i32) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("the tapdisk is gone")?;
    // Behind the name, which may have blanks, comes field 3; 14 and 15 are the times in ticks (proc(5)).
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(14 - 3);
    let mut ticks = || fields.next().and_then(|field| field.parse::<u64>().ok());
    let (user, system) = ticks().zip(ticks()).context("/proc/PID/stat is not understood")?;
    let each = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_micros((user + system) * 1_000_000 / each.unsigned_abs()))
}

/// How many processes want a CPU, on average of the last minute; what else runs disturbs.
pub fn load() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

/// Makes a file of `bytes` random bytes, unless it is there: a sparse or compressible one would flatter.
pub fn make_file(path: &Path, bytes: u64) -> anyhow::Result<()> {
    if std::fs::metadata(path).is_ok_and(|found| found.len() == bytes) {
        return Ok(());
    }
    println!("writing {} ({} MiB of random data), once", path.display(), bytes >> 20);
    let write = || -> io::Result<()> {
        let mut random = File::open("/dev/urandom")?;
        let draft = path.with_extension("draft");
        let mut file = File::create(&draft)?;
        let mut block = vec![0; 1 << 20];
        for _ in 0..bytes >> 20 {
            random.read_exact(&mut block)?;
            file.write_all(&block)?;
        }
        file.sync_all()?;
        // Only a complete file gets the name.
        std::fs::rename(draft, path)
    };
    write().with_context(|| format!("cannot make {}", path.display()))
}

/// How often a process enters io_uring in a second, measured over `time` while it works; `None` without a tool that can tell.
///
/// `perf` counts without slowing anything down; `strace` slows every call, which makes batches larger than they are.
pub fn enters_per_second(cpus: &Cpus, pid: i32, time: Duration) -> Option<(f64, &'static str)> {
    let whole = u32::try_from(time.as_secs()).ok().filter(|seconds| *seconds > 0)?;
    let (seconds, pid) = (whole.to_string(), pid.to_string());
    let event = "syscalls:sys_enter_io_uring_enter";
    let perf = cpus
        .command("perf")
        .args(["stat", "-x", ",", "-e", event, "-p", &pid, "--", "sleep", &seconds])
        .output();
    let divide = |count: f64| count / f64::from(whole);
    if let Ok(output) = perf {
        let text = String::from_utf8_lossy(&output.stderr);
        let count = text.lines().find(|line| line.contains(event)).and_then(|line| line.split(',').next());
        if let Some(count) = count.and_then(|count| count.parse().ok()) {
            return Some((divide(count), "perf"));
        }
    }
    let strace = cpus
        .command("timeout")
        .args(["-s", "INT", &seconds, "strace", "-f", "-c", "-e", "trace=io_uring_enter", "-p", &pid])
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&strace.stderr);
    // % time, seconds, usecs/call, calls, [errors,] name
    let count = text.lines().find(|line| line.ends_with("io_uring_enter"))?.split_whitespace().nth(3)?;
    Some((divide(count.parse().ok()?), "strace"))
}

/// Instructions in user space of the functions whose names match `functions`, while `program` runs with `args`.
pub fn instructions(program: &Path, args: &[&str], functions: &str) -> anyhow::Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(format!("--toggle-collect={functions}"))
        .arg(program)
        .args(args)
        .output()
        .context("cannot run valgrind")?;
    let text = String::from_utf8_lossy(&output.stderr);
    let collected = text.lines().find_map(|line| line.split_once("Collected : "));
    let count = collected.and_then(|(_, count)| count.trim().parse().ok());
    count.with_context(|| format!("valgrind did not tell a count of instructions:\n{text}"))
}
