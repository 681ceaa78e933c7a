//! The command line of `tap-ctl`, as text to [`Command`]. Nothing is done here.
//!
//! Options are those of XenServer's tap-ctl, as its hotplug scripts and storage managers call it. An option it has and
//! we have not is refused by name: to ignore one would give the caller another disk than the one asked for.

use std::ffi::OsString;
use std::time::Duration;

use lexopt::{Arg, Parser, ValueExt};

use crate::list::Filter;
use crate::proto::{ImageSpec, ImageType, Minor, OpenParams};

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Print the usage of all commands.
    Help,
    /// Print the usage of one command.
    HelpOn(&'static str),
    /// `allocate`
    Allocate,
    /// `free`
    Free(Minor),
    /// `spawn`, with the I/O engine the tapdisk is to use
    Spawn(Option<&'static str>),
    /// `attach`
    Attach(Target),
    /// `detach`
    Detach(Target),
    /// `open`
    Open(Target, OpenParams),
    /// `close`, waiting at most so long
    Close(Target, Option<Duration>),
    /// `create`, with the I/O engine the tapdisk is to use
    Create(OpenParams, Option<&'static str>),
    /// `destroy`, waiting at most so long for the image to close
    Destroy(Target, Option<Duration>),
    /// `resize`, to a size in bytes or to what the storage has become
    Resize(Target, Option<u64>),
    /// `list`
    List(Filter),
}

/// A VBD of a tapdisk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The tapdisk's process id.
    pub pid: i32,
    /// The minor.
    pub minor: Minor,
}

/// A command line that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct UsageError {
    /// The command, for its usage text.
    pub command: &'static str,
    /// What is wrong.
    pub message: String,
}

/// Commands with their options, in the order of the help text.
const COMMANDS: [(&str, &str); 11] = [
    ("list", "[-p PID] [-m MINOR] [-t TYPE] [-f FILE]"),
    ("allocate", ""),
    ("free", "-m MINOR"),
    (
        "create",
        "-a TYPE:PATH [-R read-only] [-D through the page cache] [--engine uring|pool|auto] [-d NAME ignored]",
    ),
    ("destroy", "-p PID -m MINOR [-t SECONDS]"),
    ("spawn", "[--engine uring|pool|auto]"),
    ("attach", "-p PID -m MINOR"),
    ("detach", "-p PID -m MINOR"),
    ("open", "-p PID -m MINOR -a TYPE:PATH [-R read-only] [-D through the page cache]"),
    ("close", "-p PID -m MINOR [-f] [-t SECONDS]"),
    ("resize", "-p PID -m MINOR [-s MIB, without it the size that the storage has now]"),
];

/// The words that tapdisk takes for an I/O engine.
const ENGINES: [&str; 3] = ["auto", "uring", "pool"];

/// Options of XenServer's `open` and `create` that are not offered here.
const NOT_OFFERED: [(char, &str); 7] = [
    ('r', "local read cache"),
    ('e', "existing parent"),
    ('2', "secondary image"),
    ('s', "standby"),
    ('t', "request timeout"),
    ('C', "dirty-block log"),
    ('E', "encryption key"),
];

/// The usage line of one command.
pub fn usage_of(command: &str) -> String {
    let options = COMMANDS.iter().find(|(name, _)| *name == command).map_or("", |(_, options)| options);
    format!("usage: tap-ctl {command} {options}").trim_end().to_owned()
}

/// The usage of the program.
pub fn usage() -> String {
    let mut text = String::from("usage: tap-ctl COMMAND [OPTIONS] [--debug]\n");
    for (name, options) in COMMANDS {
        text.push_str(format!("  {name:<9} {options}").trim_end());
        text.push('\n');
    }
    text
}

/// Reads a command line without the program's name. `--debug` has been taken out by the caller.
///
/// No command and an unknown command are requests for help, as in XenServer's tap-ctl.
///
/// # Errors
///
/// [`UsageError`] names the command and what is wrong.
pub fn parse(args: &[OsString]) -> Result<Command, UsageError> {
    let Some((first, rest)) = args.split_first() else {
        return Ok(Command::Help);
    };
    let Some((command, _)) = COMMANDS.iter().find(|(name, _)| first == name) else {
        return Ok(Command::Help);
    };
    let options = match Options::read(command, rest) {
        Ok(Some(options)) => options,
        Ok(None) => return Ok(Command::HelpOn(command)),
        Err(message) => return Err(UsageError { command, message }),
    };
    options.into_command(command).map_err(|message| UsageError { command, message })
}

/// All options any command has, as given.
#[derive(Default)]
struct Options {
    pid: Option<i32>,
    minor: Option<Minor>,
    image: Option<ImageSpec>,
    readonly: bool,
    buffered: bool,
    kind: Option<String>,
    file: Option<String>,
    seconds: Option<u64>,
    size: Option<u64>,
    engine: Option<&'static str>,
}

impl Options {
    /// `None`: help is wanted.
    fn read(command: &str, args: &[OsString]) -> Result<Option<Options>, String> {
        let mut options = Options::default();
        let mut parser = Parser::from_args(args);
        let opens = matches!(command, "open" | "create");
        let targets =
            matches!(command, "list" | "attach" | "detach" | "open" | "close" | "destroy" | "resize");
        let spawns = matches!(command, "spawn" | "create");
        while let Some(arg) = parser.next().map_err(|error| error.to_string())? {
            match arg {
                Arg::Short('h') | Arg::Long("help") => return Ok(None),
                Arg::Short('p') if targets => options.pid = Some(pid(&text(&mut parser)?)?),
                Arg::Short('m') if targets || command == "free" => {
                    options.minor = Some(text(&mut parser)?.parse::<Minor>().map_err(|e| e.to_string())?);
                }
                Arg::Short('a') if opens => {
                    options.image = Some(text(&mut parser)?.parse::<ImageSpec>().map_err(|e| e.to_string())?);
                }
                Arg::Short('R') if opens => options.readonly = true,
                Arg::Short('D') if opens => options.buffered = true,
                // Named the device node in the days of a kernel driver.
                Arg::Short('d') if command == "create" => drop(text(&mut parser)?),
                Arg::Short('t') if command == "list" => options.kind = Some(text(&mut parser)?),
                Arg::Short('f') if command == "list" => options.file = Some(text(&mut parser)?),
                // Closing never waits for a frontend: rings are always disconnected, forced or not.
                Arg::Short('f') if command == "close" => {}
                Arg::Short('t') if matches!(command, "close" | "destroy") => {
                    options.seconds = Some(seconds(&text(&mut parser)?)?);
                }
                Arg::Short('s') if command == "resize" => {
                    options.size = Some(mebibytes(&text(&mut parser)?)?)
                }
                Arg::Long("engine") if spawns => options.engine = Some(engine(&text(&mut parser)?)?),
                Arg::Short(option) if opens => return Err(not_offered(option)),
                other => return Err(other.unexpected().to_string()),
            }
        }
        Ok(Some(options))
    }

    fn into_command(self, command: &str) -> Result<Command, String> {
        let limit = self.seconds.map(Duration::from_secs);
        Ok(match command {
            "allocate" => Command::Allocate,
            "spawn" => Command::Spawn(self.engine),
            "free" => Command::Free(self.minor.ok_or("-m MINOR is missing")?),
            "attach" => Command::Attach(self.target()?),
            "detach" => Command::Detach(self.target()?),
            "open" => Command::Open(self.target()?, self.into_params()?),
            "close" => Command::Close(self.target()?, limit),
            "create" => {
                let engine = self.engine;
                Command::Create(self.into_params()?, engine)
            }
            "resize" => Command::Resize(self.target()?, self.size),
            "destroy" => Command::Destroy(self.target()?, limit),
            _ => Command::List(Filter {
                pid: self.pid,
                minor: self.minor,
                // What a null image has for a path is none.
                path: match self.kind.as_deref() {
                    Some("null") => self.file,
                    _ => self.file.map(absolute),
                },
                kind: self.kind,
            }),
        })
    }

    fn target(&self) -> Result<Target, &'static str> {
        let pid = self.pid.ok_or("-p PID is missing")?;
        let minor = self.minor.ok_or("-m MINOR is missing")?;
        Ok(Target { pid, minor })
    }

    fn into_params(self) -> Result<OpenParams, &'static str> {
        let mut image = self.image.ok_or("-a TYPE:PATH is missing")?;
        if image.kind != ImageType::Null {
            image.path = absolute(image.path);
        }
        Ok(OpenParams { image, readonly: self.readonly, buffered: self.buffered })
    }
}

fn text(parser: &mut Parser) -> Result<String, String> {
    parser.value().and_then(ValueExt::string).map_err(|error| error.to_string())
}

fn pid(text: &str) -> Result<i32, String> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|&pid| digits && pid > 0);
    number.ok_or_else(|| format!("{text:?} is no process id"))
}

fn seconds(text: &str) -> Result<u64, String> {
    let number = text.parse().ok().filter(|&seconds: &u32| seconds > 0);
    number.map(u64::from).ok_or_else(|| format!("{text:?} is no number of seconds above 0"))
}

/// Bytes of a size in MiB, the unit of vhd-util.
fn mebibytes(text: &str) -> Result<u64, String> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|&number: &u64| digits && number > 0);
    let bytes = number.and_then(|number| number.checked_mul(1 << 20));
    bytes.ok_or_else(|| format!("{text:?} is no size in MiB"))
}

fn engine(text: &str) -> Result<&'static str, String> {
    let known = ENGINES.into_iter().find(|name| *name == text);
    known.ok_or_else(|| format!("{text:?} is no I/O engine: write uring, pool or auto"))
}

fn not_offered(option: char) -> String {
    match NOT_OFFERED.iter().find(|(letter, _)| *letter == option) {
        Some((_, what)) => format!("option -{option} ({what}) is not supported by this tapdisk"),
        None => format!("invalid option '-{option}'"),
    }
}

/// The tapdisk works in another folder than its caller; an absolute path stays as it was given, because scripts
/// look it up again as the same text.
fn absolute(path: String) -> String {
    if path.starts_with('/') {
        return path;
    }
    let joined =
        std::path::absolute(&path).ok().and_then(|joined| joined.into_os_string().into_string().ok());
    joined.unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Result<Command, UsageError> {
        parse(&text.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    const TARGET: Target = Target { pid: 12, minor: Minor(3) };

    #[test]
    fn the_lines_of_the_hotplug_script_are_understood() {
        let filter = Filter { kind: Some("vhd".into()), path: Some("/a".into()), ..Filter::default() };
        assert_eq!(line("list -t vhd -f /a"), Ok(Command::List(filter)));
        assert_eq!(line("allocate"), Ok(Command::Allocate));
        assert_eq!(line("spawn"), Ok(Command::Spawn(None)));
        assert_eq!(line("attach -p 12 -m 3"), Ok(Command::Attach(TARGET)));
        let image: ImageSpec = "vhd:/a".parse().unwrap();
        let params = OpenParams { image, readonly: false, buffered: false };
        assert_eq!(line("open -p 12 -m 3 -a vhd:/a"), Ok(Command::Open(TARGET, params)));
        assert_eq!(line("detach -p 12 -m 3"), Ok(Command::Detach(TARGET)));
        assert_eq!(line("free -m 3"), Ok(Command::Free(Minor(3))));
        assert_eq!(line("destroy -p 12 -m 3"), Ok(Command::Destroy(TARGET, None)));
    }

    #[test]
    fn options_may_be_joined_and_in_any_order() {
        let image: ImageSpec = "aio:/x".parse().unwrap();
        let params = OpenParams { image, readonly: true, buffered: true };
        assert_eq!(line("open -RD -aaio:/x -m3 -p12"), Ok(Command::Open(TARGET, params.clone())));
        assert_eq!(line("create -D -d name -R -a aio:/x"), Ok(Command::Create(params, None)));
        assert_eq!(
            line("close -f -t 9 -p 12 -m 3"),
            Ok(Command::Close(TARGET, Some(Duration::from_secs(9))))
        );
    }

    #[test]
    fn no_command_and_an_unknown_one_ask_for_help() {
        for text in ["", "frobnicate", "pause -p 1 -m 1", "--help"] {
            assert_eq!(line(text), Ok(Command::Help), "{text:?}");
        }
        assert_eq!(line("open -h"), Ok(Command::HelpOn("open")));
    }

    #[test]
    fn wrong_options_and_values_are_refused() {
        for text in [
            "open",
            "open -p 12",
            "open -p 12 -m 3",
            "open -p x -m 3 -a vhd:/a",
            "open -p 12 -m 3 -a /a",
            "open -p 12 -m 3 -a qcow9:/a",
            "attach -p 0 -m 3",
            "attach -p -1 -m 3",
            "attach -p +1 -m 3",
            "free -m 16384",
            "free",
            "free -p 1 -m 1",
            "spawn extra",
            "allocate -z",
            "close -p 1 -m 1 -t 0",
            "list -p",
            "list -a vhd:/a",
            "destroy -m 1",
        ] {
            assert!(line(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_option_that_is_not_offered_is_refused_by_name() {
        let error = line("create -a vhd:/a -r").unwrap_err();
        assert_eq!(error.message, "option -r (local read cache) is not supported by this tapdisk");
    }

    #[test]
    fn relative_images_become_absolute_and_absolute_ones_stay() {
        let Ok(Command::Create(params, None)) = line("create -a vhd:disk.vhd") else { panic!() };
        assert_eq!(params.image.path, std::path::absolute("disk.vhd").unwrap().to_str().unwrap());
        let Ok(Command::Create(params, None)) = line("create -a vhd:/a//b/../c") else { panic!() };
        assert_eq!(params.image.path, "/a//b/../c");
    }

    #[test]
    fn the_size_of_a_null_image_is_no_path() {
        let Ok(Command::Create(params, Some("pool"))) = line("create -a null:64G --engine pool") else {
            panic!()
        };
        assert_eq!(params.image.path, "64G");
        let Ok(Command::List(filter)) = line("list -t null -f 64G") else { panic!() };
        assert_eq!(filter.path.as_deref(), Some("64G"));
    }

    #[test]
    fn an_engine_is_chosen_where_a_tapdisk_is_started() {
        for name in ["auto", "uring", "pool"] {
            assert_eq!(line(&format!("spawn --engine {name}")), Ok(Command::Spawn(Some(name))));
            assert_eq!(line(&format!("spawn --engine={name}")), Ok(Command::Spawn(Some(name))));
        }
        let error = line("spawn --engine aio").unwrap_err();
        assert!(error.message.contains("uring, pool or auto"), "{error}");
        assert!(line("open -p 12 -m 3 -a vhd:/a --engine pool").is_err());
    }

    #[test]
    fn a_new_size_is_in_mebibytes() {
        assert_eq!(line("resize -p 12 -m 3"), Ok(Command::Resize(TARGET, None)));
        assert_eq!(line("resize -p 12 -m 3 -s 4096"), Ok(Command::Resize(TARGET, Some(4 << 30))));
        for text in ["", "-p 12", "-m 3", "-p 12 -m 3 -s 0", "-p 12 -m 3 -s 1G", "-p 12 -m 3 -s -1"] {
            assert!(line(&format!("resize {text}")).is_err(), "{text:?}");
        }
        assert!(line("resize -p 12 -m 3 -s 99999999999999999").is_err());
    }
}
