//! The native bench: what the data plane costs on this machine, without a hypervisor.
//!
//! A simulated guest keeps a ring full; the real programs serve it, from a file or from nothing. On the file, fio does the same
//! with io_uring and O_DIRECT, in turns with us, several times; medians are compared. Comparisons across runs mean little.
//!
//! With `--formats` it compares image formats with each other, and with qemu-nbd, instead.
//!
//! The table goes to standard output, the figures to `target/bench.json`.

mod formats;
mod guest;
mod machine;
mod nbd;
mod peer;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use integration::rig::{Device, Programs, Rig};
use integration::sim::calls::{Call, Calls};
use integration::sim::host::BACKEND;
use lexopt::prelude::*;
use serde_json::{Map, Value, json};

use guest::{GUEST, Guest, Load, Outcome, Wait};
use machine::Cpus;

const HELP: &str = "\
usage: bench [--file FILE] [--mib N] [--json FILE] [--rounds N] [--seconds N] [--only TEXT]
             [--polling US] [--engine NAME] [--formats]

  --file FILE   the image, made of random data if it is not there (target/bench.img)
  --mib N       its size (1024)
  --json FILE   where the figures go (target/bench.json)
  --rounds N    rounds of which the medians count (5)
  --seconds N   length of each measurement (4)
  --only TEXT   only measurements whose name has TEXT in it
  --polling US  the polling-duration that a toolstack would set (none: tapdisk's own)
  --engine NAME the tapdisk's engine: auto, uring or pool (auto)
  --formats     compare the formats; images lie beside FILE and are as large as it
";

const XVDA: u32 = 51712;
/// Requests of each run of the pure parts under valgrind; a multiple of the batch.
const PARTS: u64 = 32_000;

#[derive(Debug)]
struct Options {
    file: PathBuf,
    mib: u64,
    json: PathBuf,
    rounds: usize,
    time: Duration,
    only: String,
    polling: Option<u32>,
    engine: Option<String>,
    formats: bool,
}

fn parse() -> Result<Option<Options>, lexopt::Error> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let mut options = Options {
        file: target.join("bench.img"),
        mib: 1024,
        json: target.join("bench.json"),
        rounds: 5,
        time: Duration::from_secs(4),
        only: String::new(),
        polling: None,
        engine: None,
        formats: false,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("file") => options.file = parser.value()?.into(),
            Long("mib") => options.mib = parser.value()?.parse()?,
            Long("json") => options.json = parser.value()?.into(),
            Long("rounds") => options.rounds = parser.value()?.parse::<usize>()?.max(1),
            Long("seconds") => options.time = Duration::from_secs(parser.value()?.parse::<u64>()?.max(1)),
            Long("only") => options.only = parser.value()?.string()?,
            Long("polling") => options.polling = Some(parser.value()?.parse()?),
            Long("engine") => options.engine = Some(parser.value()?.string()?),
            Long("formats") => options.formats = true,
            Short('h') | Long("help") => return Ok(None),
            other => return Err(other.unexpected()),
        }
    }
    Ok(Some(options))
}

fn main() -> ExitCode {
    let options = match parse() {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprint!("bench: {error}\n{HELP}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const RAW: Load =
    Load { write: false, random: true, block: 4096, depth: 32, persistent: true, wait: Wait::Poll };

/// What is compared with fio.
const JOBS: [(&str, Load); 3] = [
    ("rr4k_qd32", RAW),
    ("rw4k_qd32", Load { write: true, ..RAW }),
    ("sr128k_qd8", Load { random: false, block: 128 << 10, depth: 8, ..RAW }),
];

/// What the ring alone costs: nothing is behind it.
const NULL: [(&str, Load); 3] = [
    ("null_rr4k_qd32_persistent", RAW),
    ("null_rr4k_qd32_copy", Load { persistent: false, ..RAW }),
    ("null_rr4k_qd32_events", Load { wait: Wait::Events, ..RAW }),
];

/// Where calls are counted: a guest that sleeps as Linux's does, and one that never does.
const COUNTED: [(&str, Load); 3] = [
    ("rr4k_qd32_events", Load { wait: Wait::Events, ..RAW }),
    ("rr4k_qd32_events_copy", Load { wait: Wait::Events, persistent: false, ..RAW }),
    ("rr4k_qd32_poll", RAW),
];

fn run(options: &Options) -> anyhow::Result<()> {
    machine::make_file(&options.file, options.mib << 20)?;
    let file = options.file.canonicalize().context("the image's path")?;
    let cpus = Cpus::find()?;
    cpus.pin_guest()?;
    if let Some(load) = machine::load().filter(|load| *load > 0.5) {
        println!("this machine is busy (load {load}): what else runs takes its part of the figures");
    }
    let bench = Bench { options, cpus, capacity: options.mib << 20 };
    if options.formats {
        return formats::run(&bench, &file);
    }
    let wanted = |name: &str| name.contains(&options.only);
    let raw = format!("aio:{}", file.display());
    let mut jobs = Map::new();
    println!("{:32} {:>12} {:>12} {:>7} {:>10} {:>10}", "", "ours", "fio", "ratio", "ours", "fio");
    println!("{:32} {:>12} {:>12} {:>7} {:>21}", "", "requests/s", "requests/s", "", "CPU us/request");
    for (name, load) in JOBS.iter().filter(|(name, _)| wanted(name)) {
        let (mut ours, mut peers) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            ours.push(bench.ours(&raw, load)?);
            peers.push(bench.peer(&file, load)?);
        }
        let (ours, peer) = (median(&ours), median(&peers));
        let ratio = ours.rate / peer.rate;
        println!(
            "{name:32} {:12.0} {:12.0} {ratio:7.3} {:10.2} {:10.2}",
            ours.rate, peer.rate, ours.cpu, peer.cpu
        );
        let figures = json!({"ours": ours.rate, "peer": peer.rate, "ratio": ratio,
                             "ours_cpu_us": ours.cpu, "peer_cpu_us": peer.cpu});
        jobs.insert((*name).into(), figures);
    }
    let mut null = Map::new();
    for (name, load) in NULL.iter().filter(|(name, _)| wanted(name)) {
        let rounds: Result<Vec<_>, _> = (0..options.rounds).map(|_| bench.ours("null:1G", load)).collect();
        let Measured { rate, cpu } = median(&rounds?);
        println!("{name:32} {rate:12.0} {:12} {:7} {cpu:10.2}", "", "");
        null.insert((*name).into(), json!({"ours": rate, "ours_cpu_us": cpu}));
    }
    let calls = count_calls(&bench, &raw, &wanted)?;
    let mut parts = Map::new();
    if wanted("parts") {
        let program = sibling("bench-parts")?;
        println!("\n{:32} {:>12}", "instructions/request", "user space");
        for batch in [1u64, 32] {
            let args = [&*PARTS.to_string(), &*batch.to_string()];
            let count = machine::instructions(&program, &args, "*serve_batch*")?;
            let each = f64::from(u32::try_from(count)?) / f64::from(u32::try_from(PARTS)?);
            println!("{:32} {each:12.1}", format!("ring, batches of {batch}"));
            parts.insert(format!("ring_batch{batch}"), json!(each));
        }
    }
    let figures = json!({"jobs": jobs, "null": null, "calls": calls, "instructions": parts});
    std::fs::write(&options.json, format!("{figures:#}\n"))
        .with_context(|| format!("cannot write {}", options.json.display()))
}

/// System calls and notifications of the backend for each request.
fn count_calls(
    bench: &Bench<'_>,
    raw: &str,
    wanted: &dyn Fn(&str) -> bool,
) -> anyhow::Result<Map<String, Value>> {
    let mut figures = Map::new();
    let mut title = true;
    for (name, load) in COUNTED.iter().filter(|(name, _)| wanted(&format!("calls {name}"))) {
        let counted = bench.counted(raw, load)?;
        if std::mem::take(&mut title) {
            println!(
                "\n{:32} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
                "calls/request", "enter", "copy", "notify", "pending", "unmask", "all"
            );
        }
        let Counted { enter, tool, calls } = counted;
        let [copy, notify, pending, unmask] = calls;
        let all = enter.map(|enter| enter + calls.iter().sum::<f64>());
        let text = |figure: Option<f64>| figure.map_or("?".into(), |figure| format!("{figure:.4}"));
        println!(
            "{name:32} {:>8} {copy:8.4} {notify:8.4} {pending:8.4} {unmask:8.4} {:>8}  (io_uring_enter by {tool})",
            text(enter),
            text(all)
        );
        let figure = json!({"enter": enter, "tool": tool, "copy": copy, "notify": notify, "pending": pending,
                            "unmask": unmask, "all": all});
        figures.insert((*name).into(), figure);
    }
    Ok(figures)
}

/// What one side did.
#[derive(Clone, Copy, Debug)]
struct Measured {
    /// Requests a second.
    rate: f64,
    /// Processor time of the backend, or of fio, for each request, in microseconds.
    cpu: f64,
}

struct Bench<'a> {
    options: &'a Options,
    cpus: Cpus,
    capacity: u64,
}

/// Calls for each request.
struct Counted {
    enter: Option<f64>,
    tool: &'static str,
    /// Copy, notify, pending, unmask.
    calls: [f64; 4],
}

impl Bench<'_> {
    /// A host with one guest that is connected, its memory where no disk is behind it.
    fn scene(&self, image: &str, load: &Load) -> anyhow::Result<(Rig, Device, Guest)> {
        let programs = Programs { xenio: sibling("xenio-sim")?, tap_ctl: sibling("tap-ctl-sim")? };
        let mut rig = Rig::start_in(programs, Path::new("/dev/shm"));
        rig.spawn_options = self.options.engine.iter().map(|engine| format!("--engine={engine}")).collect();
        rig.create_domain(GUEST.0);
        let polling = self.options.polling.map(|polling| polling.to_string());
        let keys: Vec<_> = polling.iter().map(|polling| ("polling-duration", polling.as_str())).collect();
        let device = rig.plug_with(GUEST.0, XVDA, image, "w", &keys).map_err(anyhow::Error::msg)?;
        self.cpus.pin_backend(device.pid)?;
        let guest = Guest::create(&rig.host.xen(), *load, self.capacity)?;
        rig.connect_with(&device, &guest.keys());
        Ok((rig, device, guest))
    }

    fn ours(&self, image: &str, load: &Load) -> anyhow::Result<Measured> {
        let (rig, device, mut guest) = self.scene(image, load)?;
        guest.run(Duration::from_millis(300))?;
        let before = machine::processor_time(device.pid)?;
        let outcome = guest.run(self.options.time)?;
        let used = machine::processor_time(device.pid)?.saturating_sub(before);
        rig.destroy(&device);
        let rate = outcome.rate();
        Ok(Measured { rate, cpu: used.as_secs_f64() * 1e6 / (rate * outcome.time.as_secs_f64()) })
    }

    fn peer(&self, file: &Path, load: &Load) -> anyhow::Result<Measured> {
        peer::fio(&self.cpus, file, load, self.options.time)
    }

    fn counted(&self, image: &str, load: &Load) -> anyhow::Result<Counted> {
        let (rig, device, mut guest) = self.scene(image, load)?;
        guest.run(Duration::from_millis(300))?;
        let calls = Calls::open(&rig.host.xen(), BACKEND)?;
        let counts =
            || [Call::Copy, Call::Notify, Call::Pending, Call::Unmask].map(|call| calls.so_far(call));
        let before = counts();
        let Outcome { requests, .. } = guest.run(self.options.time)?;
        let requests = f64::from(u32::try_from(requests)?);
        let each = |(after, before): (u32, u32)| f64::from(after.wrapping_sub(before)) / requests;
        let mut figures = [0.0; 4];
        for (figure, pair) in figures.iter_mut().zip(counts().into_iter().zip(before)) {
            *figure = each(pair);
        }
        let cpus = self.cpus.clone();
        let counting =
            std::thread::spawn(move || machine::enters_per_second(&cpus, device.pid, Duration::from_secs(2)));
        let rate = guest.run(Duration::from_secs(4))?.rate();
        let enter = counting.join().ok().flatten();
        rig.destroy(&device);
        Ok(Counted {
            enter: enter.map(|(per_second, _)| per_second / rate),
            tool: enter.map_or("nothing", |(_, tool)| tool),
            calls: figures,
        })
    }
}

/// Another program of this crate's build.
fn sibling(name: &str) -> anyhow::Result<PathBuf> {
    Ok(std::env::current_exe().context("where am I?")?.with_file_name(name))
}

/// The medians of both figures.
fn median(rounds: &[Measured]) -> Measured {
    let of = |figure: fn(&Measured) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(figure).collect();
        values.sort_unstable_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    Measured { rate: of(|one| one.rate), cpu: of(|one| one.cpu) }
}
