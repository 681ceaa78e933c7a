//! The options of a command line.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::{Arg, Parser, ValueExt};

use super::values::{
    absolute, absolute_image, absolute_of, engine, image, mebibytes, minor, pid, seconds, sort, timeout,
    times,
};
use super::{Command, Opening, Target, TlsDoor};
use crate::list::Filter;
use crate::metrics::serve::Address;
use crate::proto::{ImageSpec, LimitChange, Limits, Minor, OpenParams, Reopen, Secondary};
use crate::top::{self, Sort};

/// Letters of the options that only `open` and `create` have.
const OPENING: &str = "RDrsEe2tC";

/// What is wrong with `-s` alone.
const NO_STANDBY: &str = "-s without -2: there is no image to stand by";

/// Commands that print something which is not JSON already, and `stats`, where it means all of it.
const PRINTS: [&str; 6] = ["list", "allocate", "create", "spawn", "limit", "stats"];
/// The time between two tables of `top`.
const DELAY: Duration = Duration::from_secs(2);

/// All options any command has, as given.
#[derive(Default)]
pub(super) struct Options {
    pid: Option<i32>,
    minor: Option<Minor>,
    image: Option<ImageSpec>,
    readonly: bool,
    buffered: bool,
    secondary: Option<Secondary>,
    standby: bool,
    log: Option<String>,
    local_cache: bool,
    shared_parent: Option<Minor>,
    encrypted: bool,
    timeout: Option<u32>,
    limit: LimitChange,
    kind: Option<String>,
    file: Option<String>,
    seconds: Option<u64>,
    size: Option<u64>,
    engine: Option<&'static str>,
    full: bool,
    all: bool,
    force: bool,
    json: bool,
    batch: bool,
    times: Option<u32>,
    sort: Sort,
    listen: Option<Address>,
    port: Option<SocketAddr>,
    certificates: Option<PathBuf>,
}

impl Options {
    /// `None`: help is wanted.
    pub(super) fn read(command: &str, args: &[OsString]) -> Result<Option<Options>, String> {
        let mut options = Options::default();
        let mut parser = Parser::from_args(args);
        let opens = matches!(command, "open" | "create");
        let targets = !matches!(command, "allocate" | "free" | "spawn" | "create" | "metrics");
        let spawns = matches!(command, "spawn" | "create");
        while let Some(arg) = parser.next().map_err(|error| error.to_string())? {
            match arg {
                Arg::Short('h') | Arg::Long("help") => return Ok(None),
                Arg::Short('p') if targets => options.pid = Some(pid(&text(&mut parser)?)?),
                Arg::Short('m') if targets || command == "free" => {
                    options.minor = Some(minor(&text(&mut parser)?)?);
                }
                Arg::Short('a') if opens || matches!(command, "unpause" | "snapshot") => {
                    options.image = Some(image(&text(&mut parser)?)?);
                }
                Arg::Short(letter) if opens && OPENING.contains(letter) => {
                    options.opening(letter, &mut parser)?;
                }
                Arg::Short('2') if command == "unpause" => {
                    options.secondary = Some(secondary(&text(&mut parser)?)?);
                }
                Arg::Short('s') if command == "unpause" => options.standby = true,
                Arg::Short('c') if command == "unpause" => options.log = Some(text(&mut parser)?),
                Arg::Long("json") if PRINTS.contains(&command) => options.json = true,
                Arg::Long("limit") if opens => {
                    options.limit =
                        text(&mut parser)?.parse().map_err(|e: crate::proto::LimitError| e.to_string())?;
                }
                Arg::Long(name) if command == "limit" => {
                    let name = name.to_owned();
                    let amount = text(&mut parser)?;
                    options.limit.set(&name, &amount).map_err(|e| e.to_string())?;
                }
                // Named the device node in the days of a kernel driver.
                Arg::Short('d') if command == "create" => drop(text(&mut parser)?),
                Arg::Short('t') if command == "list" => options.kind = Some(text(&mut parser)?),
                Arg::Short('f') if command == "list" => options.file = Some(text(&mut parser)?),
                // Closing never waits for a frontend: rings are always disconnected, forced or not.
                Arg::Short('f') if command == "close" => {}
                Arg::Short('f') if command == "destroy" => options.force = true,
                Arg::Short('t') if matches!(command, "close" | "destroy" | "pause" | "snapshot") => {
                    options.seconds = Some(seconds(&text(&mut parser)?)?);
                }
                Arg::Short('s') if command == "resize" => {
                    options.size = Some(mebibytes(&text(&mut parser)?)?);
                }
                Arg::Short(letter) if command == "top" && "bdns".contains(letter) => {
                    options.top(letter, &mut parser)?;
                }
                Arg::Short('l') if command == "metrics" => {
                    options.listen = Some(text(&mut parser)?.parse()?);
                }
                Arg::Short('l') if command == "nbd-tls" => {
                    let text = text(&mut parser)?;
                    let wrong = || format!("{text:?} is no address with a port, as 192.0.2.1:10809");
                    options.port = Some(text.parse().map_err(|_| wrong())?);
                }
                Arg::Short('c') if command == "nbd-tls" => {
                    options.certificates = Some(text(&mut parser)?.into());
                }
                Arg::Long("engine") if spawns => options.engine = Some(engine(&text(&mut parser)?)?),
                Arg::Long("all") if command == "upgrade" => options.all = true,
                Arg::Long("full") if command == "stats" => options.full = true,
                other => return Err(other.unexpected().to_string()),
            }
        }
        Ok(Some(options))
    }

    /// Takes one of [`OPENING`].
    fn opening(&mut self, letter: char, parser: &mut Parser) -> Result<(), String> {
        match letter {
            'R' => self.readonly = true,
            'D' => self.buffered = true,
            'r' => self.local_cache = true,
            's' => self.standby = true,
            'E' => self.encrypted = true,
            'e' => self.shared_parent = Some(minor(&text(parser)?)?),
            '2' => self.secondary = Some(secondary(&text(parser)?)?),
            't' => self.timeout = Some(timeout(&text(parser)?)?),
            _ => self.log = Some(text(parser)?),
        }
        Ok(())
    }

    /// Takes one of the options that only `top` has.
    fn top(&mut self, letter: char, parser: &mut Parser) -> Result<(), String> {
        match letter {
            'b' => self.batch = true,
            'd' => self.seconds = Some(seconds(&text(parser)?)?),
            'n' => self.times = Some(times(&text(parser)?)?),
            _ => self.sort = sort(&text(parser)?)?,
        }
        Ok(())
    }

    pub(super) fn into_command(self, command: &str) -> Result<Command, String> {
        // The statistics are JSON anyway.
        let json = self.json && command != "stats";
        let command = self.plain(command)?;
        Ok(if json { Command::Json(Box::new(command)) } else { command })
    }

    fn plain(self, command: &str) -> Result<Command, String> {
        let limit = self.seconds.map(Duration::from_secs);
        Ok(match command {
            "allocate" => Command::Allocate,
            "spawn" => Command::Spawn(self.engine),
            "free" => Command::Free(self.minor.ok_or("-m MINOR is missing")?),
            "attach" => Command::Attach(self.target()?),
            "detach" => Command::Detach(self.target()?),
            "open" => Command::Open(self.target()?, self.into_opening()?),
            "close" => Command::Close(self.target()?, limit),
            "create" => {
                let engine = self.engine;
                Command::Create(self.into_opening()?, engine)
            }
            "resize" => Command::Resize(self.target()?, self.size),
            "destroy" => Command::Destroy(self.target()?, limit, self.force),
            "pause" => Command::Pause(self.target()?, limit),
            "unpause" => Command::Unpause(self.target()?, self.into_reopen()?),
            "snapshot" => {
                let target = self.target()?;
                Command::Snapshot(target, absolute_image(self.image.ok_or("-a TYPE:PATH is missing")?), limit)
            }
            "limit" => Command::Limit(self.target()?, self.limit),
            "upgrade" => match (self.pid, self.all) {
                (Some(pid), false) => Command::Upgrade(Some(pid)),
                (None, true) if self.minor.is_none() => Command::Upgrade(None),
                _ => return Err("either -p PID or --all".into()),
            },
            "stats" => Command::Stats(self.target()?, self.full || self.json),
            "metrics" => Command::Metrics(self.listen),
            "nbd-tls" => Command::NbdTls(TlsDoor {
                target: self.target()?,
                address: self.port.ok_or("-l ADDRESS:PORT is missing")?,
                certificates: self.certificates.ok_or("-c FOLDER is missing")?,
            }),
            "top" => Command::Top(top::Options {
                filter: Filter { pid: self.pid, minor: self.minor, ..Filter::default() },
                batch: self.batch,
                times: self.times,
                delay: limit.unwrap_or(DELAY),
                sort: self.sort,
            }),
            _ => Command::List(Filter {
                pid: self.pid,
                minor: self.minor,
                path: self.file.map(|path| absolute_of(self.kind.as_deref(), path)),
                kind: self.kind,
            }),
        })
    }

    fn target(&self) -> Result<Target, &'static str> {
        let pid = self.pid.ok_or("-p PID is missing")?;
        let minor = self.minor.ok_or("-m MINOR is missing")?;
        Ok(Target { pid, minor })
    }

    fn into_opening(self) -> Result<Opening, &'static str> {
        let params = OpenParams {
            readonly: self.readonly,
            buffered: self.buffered,
            standby: self.standby,
            log: self.log.map(absolute),
            local_cache: self.local_cache,
            shared_parent: self.shared_parent,
            parent: None,
            timeout: self.timeout,
            limit: Limits::default().changed(self.limit),
            secondary: match self.secondary {
                Some(Secondary::Image(image)) => Some(absolute_image(image)),
                Some(Secondary::Nothing) | None => None,
            },
            ..OpenParams::new(absolute_image(self.image.ok_or("-a TYPE:PATH is missing")?))
        };
        if params.standby && params.secondary.is_none() {
            return Err(NO_STANDBY);
        }
        Ok(Opening { params: Box::new(params), encrypted: self.encrypted })
    }

    fn into_reopen(self) -> Result<Reopen, &'static str> {
        let secondary = self.secondary.map(|secondary| match secondary {
            Secondary::Nothing => Secondary::Nothing,
            Secondary::Image(image) => Secondary::Image(absolute_image(image)),
        });
        if self.standby && !matches!(secondary, Some(Secondary::Image(_))) {
            return Err(NO_STANDBY);
        }
        let (image, log) = (self.image.map(absolute_image), self.log.map(absolute));
        Ok(Reopen { image, secondary, standby: self.standby, log })
    }
}

fn text(parser: &mut Parser) -> Result<String, String> {
    parser.value().and_then(ValueExt::string).map_err(|error| error.to_string())
}

fn secondary(text: &str) -> Result<Secondary, String> {
    match text {
        "null" => Ok(Secondary::Nothing),
        _ => image(text).map(Secondary::Image),
    }
}
