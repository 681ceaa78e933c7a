//! How an image is opened, and opened again.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ImageSpec, Limits, Minor};

/// How to open an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenParams {
    /// What to open.
    pub image: ImageSpec,
    /// `-R`: no writes, whoever asks.
    pub readonly: bool,
    /// `-D`: through the page cache instead of O_DIRECT.
    pub buffered: bool,
    /// `-2`: the image that gets every write too; see `standby`.
    #[serde(default)]
    pub secondary: Option<ImageSpec>,
    /// `-s`: the secondary image, a child of the first or of its parent, takes the writes from the moment on when the first has no
    /// space left, and not before.
    #[serde(default)]
    pub standby: bool,
    /// `-C`: the file in which is noted which blocks were written.
    #[serde(default)]
    pub log: Option<String>,
    /// `-r`: what is read from parents is written to the leaf.
    #[serde(default)]
    pub local_cache: bool,
    /// `-e`: the disk that this minor's tapdisk serves stands for the chain of parents.
    #[serde(default)]
    pub shared_parent: Option<Minor>,
    /// What that tapdisk is reached by; the tapdisk that opens the image fills it in.
    #[serde(skip)]
    pub parent: Option<ImageSpec>,
    /// `-E`: what an encrypted image is encrypted with.
    #[serde(default)]
    pub key: Option<Key>,
    /// `-t`: in seconds, how long a request is tried again that fails for a reason that may pass, and after which one that
    /// is still in flight counts as late; `None`: 120.
    #[serde(default)]
    pub timeout: Option<u32>,
    /// How much may be done in a second.
    #[serde(default)]
    pub limit: Limits,
}

impl OpenParams {
    /// Just the image, to read and write.
    pub fn new(image: ImageSpec) -> OpenParams {
        OpenParams {
            image,
            readonly: false,
            buffered: false,
            secondary: None,
            standby: false,
            log: None,
            local_cache: false,
            shared_parent: None,
            parent: None,
            key: None,
            timeout: None,
            limit: Limits::default(),
        }
    }

    /// These, after what an unpause changes.
    pub fn reopened(mut self, change: Reopen) -> OpenParams {
        if let Some(image) = change.image {
            self.image = image;
        }
        match change.secondary {
            None => {}
            Some(Secondary::Nothing) => (self.secondary, self.standby) = (None, false),
            Some(Secondary::Image(image)) => {
                (self.secondary, self.standby) = (Some(image), change.standby);
            }
        }
        if change.log.is_some() {
            self.log = change.log;
        }
        self
    }
}

/// What is other than before when a paused disk is opened again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reopen {
    /// `-a`: another image in place of the one before.
    #[serde(default)]
    pub image: Option<ImageSpec>,
    /// `-2`: another secondary image, or none.
    #[serde(default)]
    pub secondary: Option<Secondary>,
    /// `-s`: the other secondary image stands by.
    #[serde(default)]
    pub standby: bool,
    /// `-c`: another log of written blocks.
    #[serde(default)]
    pub log: Option<String>,
}

/// What `-2` of `unpause` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Secondary {
    /// `-2 null`: none any more.
    Nothing,
    /// This one.
    Image(ImageSpec),
}

/// The key or the pass phrase of an encrypted image. It is never shown, nor logged.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Key(Vec<u8>);

impl Key {
    /// A key of these bytes; how many make sense is for the image to say.
    pub fn new(bytes: Vec<u8>) -> Key {
        Key(bytes)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_travels_but_is_never_shown() {
        let image: ImageSpec = "vhd:/a".parse().unwrap();
        let params = OpenParams { key: Some(Key::new(vec![201, 202, 203])), ..OpenParams::new(image) };
        let shown = format!("{params:?} {params:#?}");
        assert!(["201", "202", "0xc9"].iter().all(|byte| !shown.contains(byte)), "{shown}");
        let text = serde_json::to_string(&params).unwrap();
        assert_eq!(serde_json::from_str::<OpenParams>(&text).unwrap(), params);
    }

    #[test]
    fn what_an_older_client_does_not_say_is_as_it_always_was() {
        let text = r#"{"image":{"kind":"vhd","path":"/a"},"readonly":false,"buffered":false}"#;
        let params: OpenParams = serde_json::from_str(text).unwrap();
        assert_eq!(params, OpenParams::new("vhd:/a".parse().unwrap()));
    }

    #[test]
    fn an_unpause_changes_what_it_names_and_nothing_else() {
        let image = |text: &str| text.parse::<ImageSpec>().unwrap();
        let before = OpenParams {
            secondary: Some(image("vhd:/m")),
            standby: true,
            log: Some("/l".into()),
            timeout: Some(7),
            ..OpenParams::new(image("vhd:/a"))
        };
        assert_eq!(before.clone().reopened(Reopen::default()), before);
        let change = Reopen {
            image: Some(image("aio:/b")),
            secondary: Some(Secondary::Nothing),
            standby: false,
            log: Some("/k".into()),
        };
        let after = before.clone().reopened(change);
        let expected = OpenParams {
            image: image("aio:/b"),
            secondary: None,
            standby: false,
            log: Some("/k".into()),
            ..before.clone()
        };
        assert_eq!(after, expected);
        for standby in [false, true] {
            let secondary = Some(Secondary::Image(image("vhd:/n")));
            let after = before.clone().reopened(Reopen { secondary, standby, ..Reopen::default() });
            assert_eq!((after.secondary, after.standby), (Some(image("vhd:/n")), standby));
        }
    }
}
