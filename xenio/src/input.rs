//! What XenStore says about a device, read strictly.
//!
//! The backend's directory belongs to the toolstack: what is wrong there is a fault of the host and refuses the device.
//! The frontend's directory belongs to the guest: what is wrong there is the guest's own loss and never more.

use blkif::{XenbusState, keys};
use nix::errno::Errno;
use tap_ctl::proto::Polling;
use tap_ctl::{ControlDir, Minor};
use xenstore::path::{Escaped, PathUse, check};
use xenstore::value::{parse_u16, parse_u32};
use xenstore::{Client, Error, TxId};

use crate::features::Role;
use crate::machine::{Frontend, Own, Phase};
use crate::paths::DeviceId;
use crate::problem::Problem;

/// The tapdisk that the hotplug script named in `physical-device-path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    /// None yet.
    Nobody,
    /// This process and this VBD of it.
    Tapdisk(i32, Minor),
    /// Something else than a tapdisk's VBD; for messages, escaped.
    Malformed(String),
}

/// A backend directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// `state`.
    pub own: Own,
    /// `online`; absent counts as online.
    pub online: bool,
    /// `hotplug-status` is `connected`.
    pub hotplug: bool,
    /// `mode`, `device-type` and `discard-enable`.
    pub role: Role,
    /// `physical-device-path`.
    pub named: Named,
    /// The frontend's directory, or why it cannot be the frontend of this device.
    pub frontend: Result<Vec<u8>, Problem>,
}

/// Values of the keys of a backend directory, as they stand there.
#[derive(Clone, Debug, Default)]
struct Raw {
    state: Option<Vec<u8>>,
    online: Option<Vec<u8>>,
    hotplug_status: Option<Vec<u8>>,
    mode: Option<Vec<u8>>,
    device_type: Option<Vec<u8>>,
    discard_enable: Option<Vec<u8>>,
    physical_device_path: Option<Vec<u8>>,
    frontend: Option<Vec<u8>>,
    frontend_id: Option<Vec<u8>>,
}

/// Reads a key that may be absent.
///
/// # Errors
///
/// All but ENOENT.
pub fn optional(store: &mut Client, tx: TxId, path: impl AsRef<[u8]>) -> Result<Option<Vec<u8>>, Error> {
    match store.read(tx, path) {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads the backend directory `dir` of the device `id`.
///
/// # Errors
///
/// Those of the connection; nothing that stands in the directory is one.
pub fn backend(store: &mut Client, dir: &str, id: DeviceId, control: &ControlDir) -> Result<Backend, Error> {
    let mut get = |key: &str| optional(store, TxId::NONE, format!("{dir}/{key}"));
    let raw = Raw {
        state: get(keys::STATE)?,
        online: get(keys::ONLINE)?,
        hotplug_status: get(keys::HOTPLUG_STATUS)?,
        mode: get(keys::MODE)?,
        device_type: get(keys::DEVICE_TYPE)?,
        discard_enable: get(keys::DISCARD_ENABLE)?,
        physical_device_path: get(keys::PHYSICAL_DEVICE_PATH)?,
        frontend: get(keys::FRONTEND)?,
        frontend_id: get(keys::FRONTEND_ID)?,
    };
    Ok(interpret(&raw, id, control))
}

fn interpret(raw: &Raw, id: DeviceId, control: &ControlDir) -> Backend {
    let own = match (&raw.frontend, &raw.state) {
        (Some(_), Some(state)) => own_state(state),
        _ => Own::Absent,
    };
    Backend {
        own,
        online: raw.online.as_deref() != Some(b"0"),
        hotplug: raw.hotplug_status.as_deref() == Some(b"connected"),
        role: Role {
            // As blkback reads it: anything that does not begin with w is read-only.
            writable: raw.mode.as_ref().is_some_and(|mode| mode.starts_with(b"w")),
            cdrom: raw.device_type.as_deref() == Some(b"cdrom"),
            // As blkback reads it: only a number that is 0 forbids.
            discard: raw.discard_enable.as_deref().and_then(|value| parse_u32(value).ok()) != Some(0),
        },
        named: named(raw.physical_device_path.as_deref(), control),
        frontend: frontend_path(raw, id),
    }
}

/// The toolstack's wishes about polling, in XenServer's keys; beside them what is none, for the log. Nobody loses a disk
/// over such a key.
///
/// # Errors
///
/// Those of the connection.
pub fn polling(store: &mut Client, dir: &str) -> Result<(Polling, Vec<String>), Error> {
    let mut get = |key: &str| optional(store, TxId::NONE, format!("{dir}/{key}"));
    let (duration, threshold) = (get(keys::POLLING_DURATION)?, get(keys::POLLING_IDLE_THRESHOLD)?);
    Ok(wishes(duration.as_deref(), threshold.as_deref()))
}

fn wishes(duration: Option<&[u8]>, threshold: Option<&[u8]>) -> (Polling, Vec<String>) {
    let mut odd = Vec::new();
    let mut number = |key: &str, value: Option<&[u8]>, limit: u32, what: &str| {
        let value = value?;
        let number = parse_u32(value).ok().filter(|number| *number <= limit);
        if number.is_none() {
            odd.push(format!("ignoring {key} \"{}\", which is no {what}", Escaped(value)));
        }
        number
    };
    let duration_us = number(keys::POLLING_DURATION, duration, u32::MAX, "number of microseconds");
    let percent = number(keys::POLLING_IDLE_THRESHOLD, threshold, 100, "percentage");
    let idle_threshold = percent.and_then(|percent| percent.try_into().ok()).unwrap_or_default();
    (Polling { duration_us, idle_threshold }, odd)
}

fn own_state(value: &[u8]) -> Own {
    match XenbusState::parse(value) {
        Some(XenbusState::Initialising) => Own::Is(Phase::Initialising),
        Some(XenbusState::InitWait) => Own::Is(Phase::InitWait),
        Some(XenbusState::Connected) => Own::Is(Phase::Connected),
        Some(XenbusState::Closing) => Own::Is(Phase::Closing),
        Some(XenbusState::Closed) => Own::Is(Phase::Closed),
        _ => Own::Odd,
    }
}

fn named(value: Option<&[u8]>, control: &ControlDir) -> Named {
    let Some(value) = value.filter(|value| !value.is_empty()) else {
        return Named::Nobody;
    };
    let path = std::str::from_utf8(value).ok().map(std::path::Path::new);
    match path.and_then(|path| control.parse_vbd_path(path)) {
        Some((pid, minor)) => Named::Tapdisk(pid, minor),
        None => Named::Malformed(Escaped(value).to_string()),
    }
}

/// The frontend's directory, if it is one of the domain that the backend's path names. Anything else would let one
/// guest steer the disk of another (the class of XSA-175 and XSA-178).
fn frontend_path(raw: &Raw, id: DeviceId) -> Result<Vec<u8>, Problem> {
    let refuse = |message: String| Err(Problem::new(Errno::EINVAL, message));
    let path = raw.frontend.clone().unwrap_or_default();
    if raw.frontend_id.as_ref().is_some_and(|value| parse_u16(value) != Ok(id.domid.0)) {
        let value = raw.frontend_id.clone().unwrap_or_default();
        return refuse(format!("frontend-id {} is not domain {}", Escaped(&value), id.domid));
    }
    let home = format!("/local/domain/{}/", id.domid);
    if !path.starts_with(home.as_bytes()) {
        return refuse(format!("frontend {} is not below {home}", Escaped(&path)));
    }
    match check(&path, PathUse::Node) {
        Ok(()) => Ok(path),
        Err(reason) => refuse(format!("frontend {} is no path: {reason}", Escaped(&path))),
    }
}

/// The frontend's state; beside it what it wrote if that is no state, escaped.
///
/// # Errors
///
/// Those of the connection.
pub fn frontend(store: &mut Client, path: &[u8]) -> Result<(Frontend, Option<String>), Error> {
    match store.read(TxId::NONE, frontend_key(path, keys::STATE)) {
        Ok(value) => Ok(match XenbusState::parse(&value) {
            Some(state) => (Frontend::Is(state), None),
            None => (Frontend::Bogus, Some(Escaped(&value).to_string())),
        }),
        // A guest that forbids us to look has taken its end away (in a driver domain; dom0 may read everything).
        Err(error) if matches!(error.errno(), Some(Errno::ENOENT | Errno::EACCES)) => {
            Ok((Frontend::Gone, None))
        }
        Err(error) => Err(error),
    }
}

/// The path of a key in a frontend's directory.
pub fn frontend_key(path: &[u8], key: &str) -> Vec<u8> {
    [path, b"/", key.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use blkif::{DomId, VdevId};

    const ID: DeviceId = DeviceId { domid: DomId(5), vdev: VdevId(51712) };

    fn raw() -> Raw {
        let value = |text: &str| Some(text.as_bytes().to_vec());
        Raw {
            state: value("1"),
            online: value("1"),
            hotplug_status: None,
            mode: value("w"),
            device_type: value("disk"),
            discard_enable: None,
            physical_device_path: None,
            frontend: value("/local/domain/5/device/vbd/51712"),
            frontend_id: value("5"),
        }
    }

    fn read(raw: &Raw) -> Backend {
        interpret(raw, ID, &ControlDir::default())
    }

    #[test]
    fn what_libxl_writes_is_understood() {
        let backend = read(&raw());
        assert_eq!(backend.own, Own::Is(Phase::Initialising));
        assert!(backend.online && !backend.hotplug);
        assert_eq!(backend.role, Role { writable: true, cdrom: false, discard: true });
        assert_eq!(backend.named, Named::Nobody);
        assert_eq!(backend.frontend, Ok(b"/local/domain/5/device/vbd/51712".to_vec()));
    }

    #[test]
    fn only_a_mode_that_begins_with_w_is_writable() {
        for (mode, writable) in [
            (Some("w"), true),
            (Some("w!"), true),
            (Some("r"), false),
            (Some("rw"), false),
            (Some(""), false),
            (None, false),
        ] {
            let mode = mode.map(|mode| mode.as_bytes().to_vec());
            assert_eq!(read(&Raw { mode: mode.clone(), ..raw() }).role.writable, writable, "{mode:?}");
        }
    }

    #[test]
    fn only_a_discard_enable_that_is_zero_forbids_discard() {
        for (value, discard) in [
            (Some("0"), false),
            (Some("1"), true),
            (Some(""), true),
            (Some("false"), true),
            (Some("-0"), true),
            (None, true),
        ] {
            let discard_enable = value.map(|value| value.as_bytes().to_vec());
            assert_eq!(read(&Raw { discard_enable, ..raw() }).role.discard, discard, "{value:?}");
        }
    }

    #[test]
    fn polling_keys_that_are_no_numbers_are_ignored_and_told() {
        let polling = |duration_us, idle_threshold| Polling { duration_us, idle_threshold };
        for (duration, threshold, expected, complaints) in [
            (None, None, polling(None, 0), 0),
            (Some("0"), Some("0"), polling(Some(0), 0), 0),
            (Some("8000"), Some("50"), polling(Some(8000), 50), 0),
            (Some("4294967295"), Some("100"), polling(Some(u32::MAX), 100), 0),
            (Some("4294967296"), Some("101"), polling(None, 0), 2),
            (Some("-1"), Some("50%"), polling(None, 0), 2),
            (Some(""), Some("20"), polling(None, 20), 1),
            (Some("6ms\n"), None, polling(None, 0), 1),
        ] {
            let (read, odd) = wishes(duration.map(str::as_bytes), threshold.map(str::as_bytes));
            assert_eq!((read, odd.len()), (expected, complaints), "{duration:?} {threshold:?}");
            assert!(odd.iter().all(|line| !line.contains('\n')), "{odd:?}");
        }
    }

    #[test]
    fn a_directory_without_state_or_frontend_is_no_device() {
        assert_eq!(read(&Raw { state: None, ..raw() }).own, Own::Absent);
        assert_eq!(read(&Raw { frontend: None, ..raw() }).own, Own::Absent);
    }

    #[test]
    fn own_states_nobody_writes_are_left_alone() {
        for state in ["0", "3", "7", "8", "9", "banana", "", "4\n"] {
            assert_eq!(read(&Raw { state: Some(state.into()), ..raw() }).own, Own::Odd, "{state:?}");
        }
    }

    #[test]
    fn h47_a_frontend_of_another_domain_is_refused() {
        for frontend in [
            "/local/domain/6/device/vbd/51712",
            "/local/domain/55/device/vbd/51712",
            "/local/domain/5",
            "/local/domain/5/",
            "/local/domain/5//x",
            "/vm/5",
            "device/vbd/51712",
            "",
            "/local/domain/5/\0",
        ] {
            let backend = read(&Raw { frontend: Some(frontend.into()), ..raw() });
            assert!(backend.frontend.is_err(), "{frontend:?}");
        }
        for id in ["6", "", "-5", "5 ", "05x"] {
            assert!(read(&Raw { frontend_id: Some(id.into()), ..raw() }).frontend.is_err(), "{id:?}");
        }
    }

    #[test]
    fn h48_a_physical_device_path_is_a_tapdisks_vbd_or_refused() {
        let named = |path: &[u8]| read(&Raw { physical_device_path: Some(path.to_vec()), ..raw() }).named;
        assert_eq!(named(b"/run/blktap-control/nbd12.3"), Named::Tapdisk(12, Minor(3)));
        assert_eq!(named(b""), Named::Nobody);
        for path in [
            &b"/dev/loop0"[..],
            b"/run/blktap-control/../nbd12.3",
            b"/run/blktap-control/nbd12.3\0",
            b"/run/blktap-control/nbd12",
            b"nbd:unix:/run/blktap-control/nbd12.3",
            b"file:///run/blktap-control/nbd12.3",
            b"|/run/blktap-control/nbd12.3",
            b"/tmp/nbd12.3",
            b"\xff\xfe",
        ] {
            assert!(matches!(named(path), Named::Malformed(_)), "{}", path.escape_ascii());
        }
    }
}
