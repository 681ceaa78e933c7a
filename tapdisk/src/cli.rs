//! The process: options, start-up, and the hand-shake with `tap-ctl spawn`.
//!
//! `tap-ctl spawn` starts us with a pipe for stdout and stderr. We leave its session, bind the control socket, print its
//! path as one line, and only then point stdout and stderr at `/dev/null`: whatever goes wrong before is read by the
//! administrator.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use caps::{CapSet, Capability};
use lexopt::prelude::*;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::stat;
use nix::unistd::User;
use tap_ctl::ControlDir;
use tap_ctl::logging::{self, Mode};
use tap_ctl::proto::{Minor, null_size};

use crate::confine;
use crate::image::cache;
use crate::porter::{self, process};
use crate::reactor::EngineChoice;
use crate::server::{Entrance, Server};
use crate::xen::Xen;

const HELP: &str = "\
usage: tapdisk [-D] [--engine uring|pool|auto] [--parent-cache SIZE] [--take-over MINOR]
               [-h] [--version]

Serves the disks that tap-ctl opens and xenio connects. Started by `tap-ctl spawn`;
it ends when its last disk is detached.

  -D         stay in the foreground: debug messages on stderr, Ctrl-C ends
  --engine   how I/O is done: by io_uring, by a pool of threads, or (auto, the
             default) by io_uring unless the kernel refuses it
  --parent-cache
             how much memory the disks of this process share for what they read
             from parents: bytes, or a number with K, M or G. None without it,
             or without XENIO_PARENT_CACHE in the environment, which tap-ctl hands on
  --take-over
             go on with a disk whose tapdisk has died, or made room for this one
  -h         this help
";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Serve {
        foreground: bool,
        engine: EngineChoice,
        parent_cache: Option<u64>,
        take_over: Option<Minor>,
    },
    /// Not for people: see [`process`].
    Porter {
        foreground: bool,
        take_over: Option<Minor>,
    },
    Help,
    Version,
}

/// Names the size of the cache for parents to a tapdisk that `tap-ctl` starts.
const PARENT_CACHE: &str = "XENIO_PARENT_CACHE";

/// Reads the command line; `environment` is the value of [`PARENT_CACHE`].
fn parse(
    args: impl IntoIterator<Item = OsString>,
    environment: Option<OsString>,
) -> Result<Action, lexopt::Error> {
    let mut parser = lexopt::Parser::from_args(args);
    let (mut foreground, mut engine, mut take_over) = (false, EngineChoice::default(), None);
    let mut porter = false;
    let mut parent_cache = environment.map(|value| size(&value)).transpose()?;
    while let Some(arg) = parser.next()? {
        match arg {
            Short('D') => foreground = true,
            Long("engine") => engine = parser.value()?.parse()?,
            Long("parent-cache") => parent_cache = Some(size(&parser.value()?)?),
            Long("take-over") => take_over = Some(parser.value()?.parse()?),
            Long(process::OPTION) => porter = true,
            Short('h') | Long("help") => return Ok(Action::Help),
            Long("version") => return Ok(Action::Version),
            other => return Err(other.unexpected()),
        }
    }
    if porter {
        return Ok(Action::Porter { foreground, take_over });
    }
    Ok(Action::Serve { foreground, engine, parent_cache, take_over })
}

fn size(value: &OsString) -> Result<u64, lexopt::Error> {
    let bytes = value.to_str().and_then(null_size);
    bytes.ok_or_else(|| {
        format!("{value:?} is no size of a cache: write bytes, or a number with K, M or G").into()
    })
}

/// The whole program, over the given hypervisor and runtime folder.
pub fn main<X: Xen>(xen: X, dir: &ControlDir) -> ExitCode {
    let action = match parse(std::env::args_os().skip(1), std::env::var_os(PARENT_CACHE)) {
        Ok(action) => action,
        Err(error) => {
            eprint!("tapdisk: {error}\n{HELP}");
            return ExitCode::from(2);
        }
    };
    let result = match action {
        Action::Help => write!(std::io::stdout(), "{HELP}").context("cannot print"),
        Action::Version => {
            writeln!(std::io::stdout(), "tapdisk {}", env!("CARGO_PKG_VERSION")).context("cannot print")
        }
        Action::Serve { foreground, engine, parent_cache, take_over } => {
            parent_cache.into_iter().for_each(cache::turn_on);
            start(foreground).and_then(|()| enter(&xen, dir, foreground, take_over)).and_then(|entrance| {
                let server = Server::new(xen, dir.clone(), engine, parent_cache, entrance);
                serve(server.context("cannot begin to serve")?, foreground, take_over)
            })
        }
        Action::Porter { foreground, take_over } => set_up_logging(foreground)
            .and_then(|()| process::run(dir, take_over).context("cannot open files for a tapdisk")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tapdisk: {error:#}");
            log::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(foreground: bool) -> anyhow::Result<()> {
    if !foreground {
        close_inherited();
        // Fails only for a process group leader, which a spawned tapdisk is not.
        let _ = nix::unistd::setsid();
    }
    set_up_logging(foreground)?;
    // The control socket's mode is its lock: whoever started us may have allowed others to write.
    stat::umask(stat::Mode::S_IWGRP | stat::Mode::S_IWOTH);
    Ok(())
}

fn set_up_logging(foreground: bool) -> anyhow::Result<()> {
    let mode = if foreground { Mode::Foreground } else { Mode::Daemon };
    logging::init("tapdisk", mode, foreground).context("cannot set up logging")
}

/// Opens the control socket, and gives up what a tapdisk does not need. The socket is made by this process while it is root's: who connects
/// sees both.
fn enter<X: Xen>(
    xen: &X,
    dir: &ControlDir,
    foreground: bool,
    take_over: Option<Minor>,
) -> anyhow::Result<Entrance> {
    let mut entrance = Entrance::bind(dir)
        .with_context(|| format!("cannot bind a control socket in {}", dir.root().display()))?;
    let confined = match own_user(xen) {
        None => confine::this_thread(dir),
        Some(user) => {
            // io_uring counts registered memory as locked, and to pass by the limit takes a capability.
            if let Err(errno) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
                log::warn!("cannot raise the limit of locked memory: {}; I/O may be slower", errno.desc());
            }
            let porter =
                process::start(entrance.listener(), &porters_options(foreground, take_over), foreground)?;
            // Also the last moment at which a log file of root's can be opened.
            log::info!("goes on as user {}; process {} opens files for it", user.name, porter.pid);
            let confined = confine::as_user(&user, &xen.folders());
            porter::engage(porter.channel);
            entrance.through(porter.visitors);
            confined
        }
    };
    confined.context("cannot give up what a tapdisk does not need")?;
    Ok(entrance)
}

/// Whom this process can become: nobody if it is not root, or the host has no such user.
fn own_user<X: Xen>(xen: &X) -> Option<User> {
    let name = xen.user().filter(|_| nix::unistd::geteuid().is_root())?;
    let can = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
    let why = match User::from_name(&name) {
        Ok(Some(user)) if can(Capability::CAP_SETUID) && can(Capability::CAP_SETGID) => return Some(user),
        Ok(Some(_)) => "without CAP_SETUID and CAP_SETGID it cannot become that user".to_owned(),
        Ok(None) => "there is no such user".to_owned(),
        Err(errno) => format!("the user cannot be looked up: {}", errno.desc()),
    };
    log::warn!("this tapdisk stays root and opens files itself, instead of running as {name}: {why}");
    None
}

fn porters_options(foreground: bool, take_over: Option<Minor>) -> Vec<OsString> {
    let foreground = foreground.then(|| "-D".into());
    let take_over = take_over.map(|minor| format!("--take-over={minor}").into());
    foreground.into_iter().chain(take_over).collect()
}

fn serve<X: Xen>(mut server: Server<X>, foreground: bool, take_over: Option<Minor>) -> anyhow::Result<()> {
    if let Some(minor) = take_over {
        server.take_over(minor)?;
    }
    let told = writeln!(std::io::stdout(), "{}", server.socket().display());
    // Guests are served now, whether or not the one who started us still lives to hear of it.
    if take_over.is_none() {
        told.context("cannot report the control socket")?;
    }
    if !foreground {
        let null = std::fs::File::options().write(true).open("/dev/null").context("cannot open /dev/null")?;
        nix::unistd::dup2_stdout(&null).context("cannot give up stdout")?;
        nix::unistd::dup2_stderr(&null).context("cannot give up stderr")?;
    }
    log::info!("serving on {}", server.socket().display());
    server.run().context("the control server failed")?;
    log::info!("ended");
    Ok(())
}

/// Closes what the shell behind `tap-ctl` left open, above all the lock of its hotplug script.
fn close_inherited() {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
    let open: Vec<i32> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&fd| fd > 2)
        .collect();
    for fd in open {
        // EBADF: the descriptor of the listing itself, closed by now.
        let _ = nix::unistd::close(fd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Action, lexopt::Error> {
        parse(args.iter().map(OsString::from), None)
    }

    #[test]
    fn options_are_read_and_unknown_ones_refused() {
        let serve =
            |foreground, engine| Action::Serve { foreground, engine, parent_cache: None, take_over: None };
        assert_eq!(parsed(&[]).unwrap(), serve(false, EngineChoice::Auto));
        assert_eq!(parsed(&["-D"]).unwrap(), serve(true, EngineChoice::Auto));
        assert_eq!(parsed(&["--engine", "pool"]).unwrap(), serve(false, EngineChoice::Pool));
        assert_eq!(parsed(&["--engine=uring", "-D"]).unwrap(), serve(true, EngineChoice::Uring));
        assert!(parsed(&["--engine", "aio"]).unwrap_err().to_string().contains("uring"));
        let cached = |bytes| Action::Serve {
            foreground: false,
            engine: EngineChoice::Auto,
            parent_cache: Some(bytes),
            take_over: None,
        };
        assert_eq!(parsed(&["--parent-cache", "64M"]).unwrap(), cached(64 << 20));
        assert_eq!(parse([], Some("1M".into())).unwrap(), cached(1 << 20));
        assert!(parsed(&["--parent-cache", "much"]).is_err());
        let next = Action::Serve {
            foreground: false,
            engine: EngineChoice::Pool,
            parent_cache: None,
            take_over: Some(Minor(3)),
        };
        assert_eq!(parsed(&["--engine", "pool", "--take-over", "3"]).unwrap(), next);
        assert!(parsed(&["--take-over", "16384"]).is_err());
        assert_eq!(parsed(&["-D", "-h"]).unwrap(), Action::Help);
        let mut started = vec![OsString::from("--porter")];
        started.extend(porters_options(true, Some(Minor(3))));
        let porter = Action::Porter { foreground: true, take_over: Some(Minor(3)) };
        assert_eq!(parse(started, None).unwrap(), porter);
        assert!(parsed(&["-x"]).is_err());
        assert!(parsed(&["image"]).is_err());
    }
}
