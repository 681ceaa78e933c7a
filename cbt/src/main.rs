//! `cbt-util`: makes, shows, changes and merges dirty-block logs.
//!
//! Commands, options, output and exit codes are those of XenServer's `cbt-util`. Two things it let pass are refused here: a
//! UUID that is none (it kept the old one and said nothing), and changing a log that a tapdisk is writing.

#![forbid(unsafe_code)]

mod cli;
mod file;

use std::io::Write;
use std::process::ExitCode;

use cbt::Log;
use nix::errno::Errno;

use self::cli::{Command, Field, Parsed};
use self::file::{Access, Failure, LogFile};

fn main() -> ExitCode {
    let result = match cli::parse(std::env::args_os().skip(1)) {
        Parsed::Run(command) => run(command),
        Parsed::Help(text) => print(text.as_bytes()),
        Parsed::Wrong { message, usage } => {
            message.iter().for_each(|message| eprintln!("cbt-util: {message}"));
            print(usage.as_bytes()).and(Err(Failure::quiet(Errno::EINVAL)))
        }
        Parsed::Unknown { name, usage } => {
            eprintln!("cbt-util: {name:?} is no command");
            print(usage.as_bytes())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(message) = &failure.message {
                eprintln!("cbt-util: {message}");
            }
            ExitCode::from(u8::try_from(failure.errno as i32).unwrap_or(1))
        }
    }
}

fn print(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| Failure::io("cannot print", &error))
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Create { name, size } => LogFile::create(&name)?.write(&Log::new(size)),
        Command::Get { name, field } => print(&shown(&LogFile::open(&name, Access::Read)?, field)?),
        Command::Set { name, parent, child, consistent, size } => {
            let file = LogFile::open(&name, Access::Write)?;
            let mut log = file.read()?;
            if let Some(parent) = parent {
                log.set_parent(parent);
            }
            if let Some(child) = child {
                log.set_child(child);
            }
            if let Some(consistent) = consistent {
                log.set_consistent(consistent);
            }
            if let Some(size) = size {
                log.grow(size).map_err(|error| file.refuse(Errno::EINVAL, &error))?;
            }
            file.write(&log)
        }
        Command::Coalesce { parent, child } => {
            let parent = LogFile::open(&parent, Access::Read)?.read()?;
            let file = LogFile::open(&child, Access::Write)?;
            let mut log = file.read()?;
            log.merge(&parent).map_err(|error| file.refuse(Errno::EINVAL, &error))?;
            file.write(&log)
        }
    }
}

fn shown(file: &LogFile, field: Field) -> Result<Vec<u8>, Failure> {
    if field == Field::Bitmap {
        let log = file.read()?;
        return Ok(log.bytes(cbt::HEADER_LEN..u64::MAX));
    }
    let header = file.read_header()?;
    Ok(match field {
        Field::Parent => format!("{}\n", header.parent),
        Field::Child => format!("{}\n", header.child),
        Field::Consistent => format!("{}\n", header.consistent),
        Field::Size | Field::Bitmap => format!("{}\n", header.size),
    }
    .into_bytes())
}
