//! Writing to a device's backend directory, only while it is there and only over what was seen there.
//!
//! A plain XenStore write creates missing parents, so a state written a moment after the toolstack removed the
//! directory would bring a piece of it back for ever. Each change is therefore a transaction that first reads what
//! proves the directory's existence, and our own state: if the toolstack has changed that since the decision was made,
//! nothing is written and the device is looked at again.

use blkif::keys;
use xenstore::{Access, Client, Error, Permission, TxId};

use crate::features::{Entry, KTHREAD_PID};
use crate::input::optional;
use crate::machine::Phase;
use crate::paths::DeviceId;

/// A device's directory, and who may read what is published in it.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its path.
    pub dir: String,
    /// Our own domain, the owner of what is published.
    pub own_domid: u16,
    /// The device; its frontend's domain is the reader.
    pub id: DeviceId,
}

/// Whether a change took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did.
    Done,
    /// The directory is gone, or our state is not the expected one any more. Nothing was written.
    Stale,
}

/// A change of a device's directory.
#[derive(Clone, Debug)]
pub struct Change {
    /// Keys to publish. Those that have their value already are not written: every write wakes the guest.
    pub entries: Vec<Entry>,
    /// A message for the device's `error` node, as `error` in the directory named first.
    pub error: Option<(String, String)>,
    /// The state to write.
    pub state: Option<Phase>,
    /// Write nothing, not even the state, if all the keys have their values already.
    pub only_news: bool,
}

/// Where Xen's `block-tap` script keeps the tapdisk's process id (tools/hotplug/Linux/block-tap).
const HOTPLUG_PID: &str = "pid";

/// Why a disk is not as it was asked for. A key of our own.
const DEGRADED: &str = "degraded";

/// Characters of a reason that have room in a node whatever they are.
const MOST_CHARACTERS: usize = 800;

/// What ends the transaction without a commit.
enum Stop {
    Stale,
    Store(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Store(error)
    }
}

/// Carries a change out, in whole or not at all. `expected` is our state that the decision was based on.
///
/// # Errors
///
/// Those of XenStore.
pub fn apply(store: &mut Client, place: &Place, expected: Phase, change: &Change) -> Result<Outcome, Error> {
    match store.transact(|store, tx| attempt(store, tx, place, expected, change)) {
        Ok(()) => Ok(Outcome::Done),
        Err(Stop::Stale) => Ok(Outcome::Stale),
        Err(Stop::Store(error)) => Err(error),
    }
}

/// Names another tapdisk in a device's directory, if it names the `old` one: in `physical-device-path`, by which everybody
/// finds it, and in `pid` and `kthread-pid` if they are there. `old` and `new`: path and process id.
///
/// # Errors
///
/// Those of XenStore.
pub fn rename(store: &mut Client, dir: &str, old: (&str, i32), new: (&str, i32)) -> Result<Outcome, Error> {
    let (old_pid, new_pid) = (old.1.to_string(), new.1.to_string());
    let renamed = store.transact(|store, tx| {
        let key = |name: &str| format!("{dir}/{name}");
        let path = optional(store, tx, key(keys::PHYSICAL_DEVICE_PATH))?;
        if optional(store, tx, key(keys::FRONTEND))?.is_none() || path.as_deref() != Some(old.0.as_bytes()) {
            return Err(Stop::Stale);
        }
        store.write(tx, key(keys::PHYSICAL_DEVICE_PATH), new.0)?;
        for name in [HOTPLUG_PID, KTHREAD_PID].map(key) {
            if optional(store, tx, &name)?.as_deref() == Some(old_pid.as_bytes()) {
                store.write(tx, &name, &new_pid)?;
            }
        }
        Ok(())
    });
    match renamed {
        Ok(()) => Ok(Outcome::Done),
        Err(Stop::Stale) => Ok(Outcome::Stale),
        Err(Stop::Store(error)) => Err(error),
    }
}

/// Notes in a device's directory why its disk is not as it was asked for, or takes the note away. Only our own domain may read
/// it, and dom0, which may read everything: it names images.
///
/// # Errors
///
/// Those of XenStore.
pub fn note(store: &mut Client, place: &Place, reason: Option<&str>) -> Result<Outcome, Error> {
    let path = format!("{}/{}", place.dir, DEGRADED);
    let reason: Option<String> = reason.map(|reason| reason.chars().take(MOST_CHARACTERS).collect());
    let noted = store.transact(|store, tx| {
        if optional(store, tx, format!("{}/{}", place.dir, keys::FRONTEND))?.is_none() {
            return Err(Stop::Stale);
        }
        let known = optional(store, tx, &path)?;
        if known.as_deref() == reason.as_deref().map(str::as_bytes) {
            return Ok(());
        }
        match &reason {
            Some(reason) => {
                store.write(tx, &path, reason)?;
                store.set_perms(tx, &path, &[Permission::new(place.own_domid, Access::None)])?;
            }
            None => store.rm(tx, &path)?,
        }
        Ok(())
    });
    match noted {
        Ok(()) => Ok(Outcome::Done),
        Err(Stop::Stale) => Ok(Outcome::Stale),
        Err(Stop::Store(error)) => Err(error),
    }
}

fn attempt(
    store: &mut Client,
    tx: TxId,
    place: &Place,
    expected: Phase,
    change: &Change,
) -> Result<(), Stop> {
    let key = |name: &str| format!("{}/{name}", place.dir);
    if optional(store, tx, key(keys::FRONTEND))?.is_none() {
        return Err(Stop::Stale);
    }
    let own = optional(store, tx, key(keys::STATE))?;
    if own.as_deref() != Some(expected.state().as_str().as_bytes()) {
        return Err(Stop::Stale);
    }
    let readers =
        [Permission::new(place.own_domid, Access::None), Permission::new(place.id.domid.0, Access::Read)];
    let mut news = false;
    for (name, value) in &change.entries {
        let path = key(name);
        if optional(store, tx, &path)?.as_deref() != Some(value.as_bytes()) {
            store.write(tx, &path, value)?;
            store.set_perms(tx, &path, &readers)?;
            news = true;
        }
    }
    if change.only_news && !news {
        return Ok(());
    }
    if let Some((dir, message)) = &change.error {
        store.write(tx, format!("{dir}/error"), message)?;
    }
    if let Some(state) = change.state {
        store.write(tx, key(keys::STATE), state.state().as_str())?;
    }
    Ok(())
}
