//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use cbt::Uuid;
use lexopt::prelude::*;

const USAGE: &str = "\
usage: cbt-util COMMAND [OPTIONS]
COMMAND := { create | set | get | coalesce }
";

const CREATE: &str = "\
cbt-util create: makes a new, empty dirty-block log

  -n FILE    the log; one that is there is replaced
  -s BYTES   size of the disk
  -h         this help
";

const GET: &str = "\
cbt-util get: shows one field of a dirty-block log

  -n FILE    the log
  -p         UUID of the log before it
  -c         UUID of the log after it
  -f         whether it is consistent: 0 or 1
  -s         size of the disk in bytes
  -b         the bitmap, as it is
  -h         this help
";

const SET: &str = "\
cbt-util set: changes fields of a dirty-block log

  -n FILE    the log
  -p UUID    the log before it
  -c UUID    the log after it
  -f 0|1     whether it is consistent
  -s BYTES   size of the disk, which can only grow
  -h         this help
";

const COALESCE: &str = "\
cbt-util coalesce: marks in a log what is marked in the one before it

  -p FILE    the log before
  -c FILE    the log that is changed
  -h         this help
";

/// What `get` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    Parent,
    Child,
    Consistent,
    Size,
    Bitmap,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Create {
        name: PathBuf,
        size: u64,
    },
    Get {
        name: PathBuf,
        field: Field,
    },
    Set {
        name: PathBuf,
        parent: Option<Uuid>,
        child: Option<Uuid>,
        consistent: Option<i32>,
        size: Option<u64>,
    },
    Coalesce {
        parent: PathBuf,
        child: PathBuf,
    },
}

/// What the command line comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    Run(Command),
    Help(&'static str),
    /// Options that make no sense; or, without a message, that ask for help, which ends with 22 too in XenServer's tool.
    Wrong {
        message: Option<String>,
        usage: &'static str,
    },
    /// A command that there is not. XenServer's tool ends with 0 then, and so do we.
    Unknown {
        name: String,
        usage: &'static str,
    },
}

/// Makes a command of its options.
type Reader = fn(Options) -> Result<Command, String>;

/// Reads the command line without the program's name.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Parsed {
    let mut args = args.into_iter();
    let Some(name) = args.next() else { return Parsed::Help(USAGE) };
    let (read, usage): (Reader, _) = match name.to_str() {
        Some("create") => (create, CREATE),
        Some("get") => (get, GET),
        Some("set") => (set, SET),
        Some("coalesce") => (coalesce, COALESCE),
        Some("-h" | "--help") => return Parsed::Help(USAGE),
        _ => return Parsed::Unknown { name: name.to_string_lossy().into_owned(), usage: USAGE },
    };
    // The same letter takes a value in one command and none in another.
    let valued = if usage == GET { "n" } else { "npcfs" };
    match options(args, valued).and_then(|found| found.map(read).transpose()) {
        Ok(Some(command)) => Parsed::Run(command),
        Ok(None) => Parsed::Wrong { message: None, usage },
        Err(message) => Parsed::Wrong { message: Some(message), usage },
    }
}

/// The options that were given, in order.
#[derive(Debug, Default)]
struct Options(Vec<(char, OsString)>);

impl Options {
    /// The last value of an option, as with getopt(3).
    fn value(&self, option: char) -> Option<&OsString> {
        self.0.iter().rev().find(|(name, _)| *name == option).map(|(_, value)| value)
    }

    fn path(&self, option: char) -> Result<PathBuf, String> {
        self.value(option).map(PathBuf::from).ok_or_else(|| format!("option -{option} is missing"))
    }

    fn read<T>(&self, option: char) -> Result<Option<T>, String>
    where
        T: std::str::FromStr,
        T::Err: std::fmt::Display,
    {
        let Some(value) = self.value(option) else { return Ok(None) };
        let text = value.to_str().ok_or_else(|| format!("option -{option}: {value:?} is no text"))?;
        text.parse().map(Some).map_err(|error| format!("option -{option}: {error}"))
    }

    fn only(&self, allowed: &str) -> Result<(), String> {
        match self.0.iter().find(|(name, _)| !allowed.contains(*name)) {
            Some((name, _)) => Err(format!("option -{name} is unknown here")),
            None => Ok(()),
        }
    }
}

/// Reads options; `None` if help is asked for.
fn options(args: impl IntoIterator<Item = OsString>, valued: &str) -> Result<Option<Options>, String> {
    let mut parser = lexopt::Parser::from_args(args);
    let mut found = Options::default();
    while let Some(arg) = parser.next().map_err(|error| error.to_string())? {
        match arg {
            Short('h') | Long("help") => return Ok(None),
            Short(name) if valued.contains(name) => {
                found.0.push((name, parser.value().map_err(|error| error.to_string())?));
            }
            Short(name) => found.0.push((name, OsString::new())),
            other => return Err(other.unexpected().to_string()),
        }
    }
    Ok(Some(found))
}

fn create(options: Options) -> Result<Command, String> {
    options.only("ns")?;
    match options.read('s')? {
        Some(size) if size > 0 => Ok(Command::Create { name: options.path('n')?, size }),
        _ => Err("option -s must give the size of the disk in bytes".into()),
    }
}

fn get(options: Options) -> Result<Command, String> {
    options.only("npcfsb")?;
    let name = options.path('n')?;
    let mut fields: Vec<char> = options.0.iter().map(|(name, _)| *name).filter(|name| *name != 'n').collect();
    fields.dedup();
    let field = match fields[..] {
        ['p'] => Field::Parent,
        ['c'] => Field::Child,
        ['f'] => Field::Consistent,
        ['s'] => Field::Size,
        ['b'] => Field::Bitmap,
        _ => return Err("just one of -p, -c, -f, -s and -b must be given".into()),
    };
    Ok(Command::Get { name, field })
}

fn set(options: Options) -> Result<Command, String> {
    options.only("npcfs")?;
    let name = options.path('n')?;
    let (parent, child) = (options.read('p')?, options.read('c')?);
    let (consistent, size) = (options.read('f')?, options.read('s')?.filter(|&size| size > 0));
    if parent.is_none() && child.is_none() && consistent.is_none() && size.is_none() {
        return Err("at least one of -p, -c, -f and -s must be given".into());
    }
    Ok(Command::Set { name, parent, child, consistent, size })
}

fn coalesce(options: Options) -> Result<Command, String> {
    options.only("pc")?;
    Ok(Command::Coalesce { parent: options.path('p')?, child: options.path('c')? })
}
