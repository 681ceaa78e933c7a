//! What commands print: for scripts as XenServer's tap-ctl, for people with columns, or as JSON.

use serde_json::json;

use crate::dir::ControlDir;
use crate::list::{self, Entry};
use crate::proto::{Limits, Minor};

/// For whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Script,
    People,
    Json,
}

impl Form {
    /// A minor that was allocated.
    pub(super) fn minor(self, dir: &ControlDir, minor: Minor) -> String {
        let marker = dir.marker(minor);
        match self {
            Form::Json => format!("{}\n", json!({ "minor": minor, "marker": marker })),
            Form::Script | Form::People => format!("{}\n", marker.display()),
        }
    }

    /// A tapdisk that was started.
    pub(super) fn tapdisk(self, pid: u32) -> String {
        match self {
            Form::Json => format!("{}\n", json!({ "pid": pid })),
            Form::People => format!("tapdisk spawned with pid {pid}\n"),
            Form::Script => format!("{pid}\n"),
        }
    }

    /// What a disk may do.
    pub(super) fn limits(self, limits: Limits) -> String {
        match self {
            Form::Json => format!("{}\n", json!(limits)),
            Form::Script | Form::People => format!("{limits}\n"),
        }
    }

    /// What there is; what is not known of an entry is `null`.
    pub(super) fn entries(self, entries: &[Entry]) -> String {
        let lines = |line: fn(&Entry) -> String| entries.iter().map(|entry| line(entry) + "\n").collect();
        match self {
            Form::Script => lines(list::script_line),
            Form::People => lines(list::people_line),
            Form::Json => {
                let all: Vec<_> = entries.iter().map(object).collect();
                format!("{}\n", json!(all))
            }
        }
    }
}

fn object(Entry { pid, minor, state, image, uri }: &Entry) -> serde_json::Value {
    json!({
        "pid": pid,
        "minor": minor,
        "state": state,
        "type": image.as_ref().map(|image| image.kind.name()),
        "path": image.as_ref().map(|image| &image.path),
        "uri": uri,
    })
}
