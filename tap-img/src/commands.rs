//! The subcommands.

mod check;
mod compare;
mod convert;
mod create;
mod info;
mod map;

use std::ffi::OsString;
use std::future::Future;
use std::path::Path;

use anyhow::Context;
use lexopt::{Arg, Parser, ValueExt};
use tap_ctl::proto::{ImageType, Key};
use tap_img::BUFFERS;
use tap_img::source::{Image, format_named};
use tapdisk::io::Io;
use tapdisk::reactor::EngineChoice;

/// Something is wrong with the command line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(String);

impl Usage {
    pub fn error(text: impl Into<String>) -> Usage {
        Usage(text.into())
    }
}

/// Carries a subcommand out; the exit code.
pub fn run(name: &str, args: Parser) -> anyhow::Result<u8> {
    match name {
        "convert" => convert::run(Args::parse(args, &["-f", "-O", "-n", "-q", "--cached", "--key"], 2)?),
        "compare" => compare::run(Args::parse(args, &["-f", "-F", "-s", "-q", "--cached", "--key"], 2)?),
        "info" => info::run(Args::parse(args, &["-f", "--json", "--key"], 1)?),
        "map" => map::run(Args::parse(args, &["-f", "--json", "--key"], 1)?),
        "check" => check::run(Args::parse(args, &["-f", "--json", "-q"], 1)?),
        "create" => create::run(Args::parse(args, &["-f"], 2)?),
        other => Err(Usage::error(format!("there is no subcommand {other:?} (--help tells)")).into()),
    }
}

/// A parsed command line.
#[derive(Debug, Default)]
pub struct Args {
    format: Option<ImageType>,
    other_format: Option<ImageType>,
    target_format: Option<ImageType>,
    key: Option<Key>,
    pub existing: bool,
    pub quiet: bool,
    pub cached: bool,
    pub strict: bool,
    pub json: bool,
    pub names: Vec<String>,
}

impl Args {
    /// Takes the options that a subcommand knows, and as many names as it wants.
    fn parse(mut parser: Parser, known: &[&str], names: usize) -> anyhow::Result<Args> {
        let mut args = Args::default();
        while let Some(arg) = parser.next()? {
            let option = match &arg {
                Arg::Short(letter) => format!("-{letter}"),
                Arg::Long(name) => format!("--{name}"),
                Arg::Value(name) => {
                    let name = name.clone().into_string();
                    args.names.push(name.map_err(|name| not_text(&name))?);
                    continue;
                }
            };
            if !known.contains(&option.as_str()) {
                return Err(arg.unexpected().into());
            }
            match option.as_str() {
                "-f" => args.format = Some(format_option(&mut parser)?),
                "-F" => args.other_format = Some(format_option(&mut parser)?),
                "-O" => args.target_format = Some(format_option(&mut parser)?),
                "--key" => args.key = Some(read_key(Path::new(&parser.value()?))?),
                "-n" => args.existing = true,
                "-q" => args.quiet = true,
                "-s" => args.strict = true,
                "--cached" => args.cached = true,
                "--json" => args.json = true,
                _ => return Err(arg_unknown(&option).into()),
            }
        }
        if args.names.len() != names {
            let wanted = if names == 1 { "one name is".into() } else { format!("{names} names are") };
            return Err(Usage::error(format!("{wanted} wanted, {} given", args.names.len())).into());
        }
        Ok(args)
    }

    /// What `-f` says.
    pub fn format(&self) -> Result<ImageType, Usage> {
        self.format.ok_or_else(|| missing("-f", &self.names[0]))
    }

    /// What `-F` says, or else `-f`.
    pub fn other_format(&self) -> Result<ImageType, Usage> {
        self.other_format.map_or_else(|| self.format(), Ok)
    }

    /// What `-O` says.
    pub fn target_format(&self) -> Result<ImageType, Usage> {
        self.target_format.ok_or_else(|| missing("-O", &self.names[1]))
    }

    /// The image of the first name.
    pub fn image(&self) -> Result<Image, Usage> {
        let image = Image::new(self.format()?, &self.names[0]);
        Ok(Image { cached: self.cached, key: self.key.clone(), ..image })
    }
}

fn arg_unknown(option: &str) -> Usage {
    Usage::error(format!("unknown option {option}"))
}

fn missing(option: &str, name: &str) -> Usage {
    Usage::error(format!(
        "what is the format of {name}? It is never guessed: say {option} raw, vhd, qcow, qcow2 or vmdk"
    ))
}

fn format_option(parser: &mut Parser) -> anyhow::Result<ImageType> {
    let name = parser.value()?.string()?;
    format_named(&name).ok_or_else(|| Usage::error(format!("there is no format {name:?}")).into())
}

fn not_text(name: &OsString) -> Usage {
    Usage::error(format!("the name {} is not UTF-8", name.display()))
}

/// A key is all that is in its file.
fn read_key(path: &Path) -> anyhow::Result<Key> {
    let bytes = std::fs::read(path).with_context(|| format!("{}: cannot read the key", path.display()))?;
    Ok(Key::new(bytes))
}

/// Runs a task with an engine and buffers of its own.
pub fn work<T, F>(task: impl FnOnce(Io) -> F) -> anyhow::Result<T>
where
    T: 'static,
    F: Future<Output = anyhow::Result<T>> + 'static,
{
    tapdisk::alone::run(EngineChoice::Auto, BUFFERS, task).context("the I/O engine failed")?
}
