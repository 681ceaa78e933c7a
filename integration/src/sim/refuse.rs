//! System calls that a simulated host's kernel refuses, as one with a strict filter or a failing disk does.
//!
//! A thin binary calls [`from_environment`] before anything else; the filter then holds for all its threads.
//!
//! # Invariants of this file
//!
//! - The filter program lives until `prctl` has returned; the kernel keeps a copy.
#![expect(unsafe_code, reason = "installs a seccomp filter; see the invariant above")]

use std::io;

/// Names system calls, separated by commas, each with the errno it fails with: `fdatasync=5,io_uring_setup=1`.
pub const VARIABLE: &str = "XENIO_SIM_REFUSE";

/// Offset of the number in the kernel's `struct seccomp_data`.
const NUMBER: u32 = 0;

/// Installs what [`VARIABLE`] says, if it is set.
///
/// # Panics
///
/// If it says nonsense or the kernel does not take the filter: a test would test nothing.
pub fn from_environment() {
    let Ok(text) = std::env::var(VARIABLE) else { return };
    let refused: Vec<_> = text.split(',').map(|part| parse(part).expect("name=errno")).collect();
    install(&refused).expect("the kernel takes a filter");
}

fn parse(part: &str) -> Option<(u32, u16)> {
    let (name, errno) = part.split_once('=')?;
    let number = match name {
        "fdatasync" => libc::SYS_fdatasync,
        "pwrite64" => libc::SYS_pwrite64,
        "io_uring_setup" => libc::SYS_io_uring_setup,
        _ => return None,
    };
    Some((u32::try_from(number).ok()?, errno.parse().ok()?))
}

/// Makes each of these system calls fail with its errno, for this thread and those it starts.
fn install(refused: &[(u32, u16)]) -> io::Result<()> {
    let statement = |code: u32, k: u32| filter(code, k, 0);
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, NUMBER)];
    for (number, errno) in refused {
        // Another number: over the next statement.
        program.push(filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, *number, 1));
        program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | u32::from(*errno)));
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    // SAFETY: no pointers; without it only root may install a filter.
    let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the program and its statements live until the call returns.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A statement that goes on with the next one, or skips `skip` when a comparison fails.
fn filter(code: u32, k: u32, skip: u8) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).unwrap_or(u16::MAX), jt: 0, jf: skip, k }
}
