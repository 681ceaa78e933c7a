//! A simulated host with the real programs running on it, and the toolstack played by the test.
//!
//! [`Rig::plug`] does what libxl and its `block-tap` script do: it writes both XenStore directories in one transaction,
//! waits for the backend's InitWait, starts a tapdisk with `tap-ctl`, and reports the hotplug as done.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tap_ctl::proto::Minor;
use tempfile::TempDir;
use xenstore::{Access, Permission};

use crate::sim::frontend::Frontend;
use crate::sim::host::{SimHost, USER, VARIABLE};
use crate::sim::refuse;
use crate::sim::store::SimStore;

/// How long anything may take that ends by itself: far more than it ever takes, so that only a fault reaches it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The programs under test, which only an integration test knows the paths of; see [`programs!`](crate::programs).
#[derive(Clone, Debug)]
pub struct Programs {
    /// `xenio-sim`.
    pub xenio: PathBuf,
    /// `tap-ctl-sim`, with `tapdisk-sim` beside it.
    pub tap_ctl: PathBuf,
}

/// The programs of this crate's build.
#[macro_export]
macro_rules! programs {
    () => {
        $crate::rig::Programs {
            xenio: env!("CARGO_BIN_EXE_xenio-sim").into(),
            tap_ctl: env!("CARGO_BIN_EXE_tap-ctl-sim").into(),
        }
    };
}

/// What `tap-ctl` did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its exit code.
    pub code: i32,
    /// Its standard output, without the last newline.
    pub out: String,
    /// Its standard error, without the last newline.
    pub err: String,
}

/// A simulated host.
#[derive(Debug)]
pub struct Rig {
    folder: TempDir,
    /// The host's folders.
    pub host: SimHost,
    /// Its XenStore.
    pub store: SimStore,
    programs: Programs,
    xenio: Option<Child>,
    /// Options for `tap-ctl spawn`, such as `--engine=pool`.
    pub spawn_options: Vec<String>,
    /// More options of `tap-ctl open`.
    pub open_options: Vec<String>,
    /// What `tap-ctl` finds on its standard input, such as a key.
    pub input: Option<PathBuf>,
    /// More variables of the programs' environment, which a tapdisk inherits.
    pub environment: Vec<(String, String)>,
    /// What the kernel refuses to tapdisks, see [`refuse::VARIABLE`].
    pub refuse: String,
}

/// Changes the mode of a file or folder.
///
/// # Panics
///
/// If the system refuses it.
pub fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode");
}

/// A disk as the toolstack sees it.
#[derive(Clone, Debug)]
pub struct Device {
    /// The guest.
    pub domid: u16,
    /// The virtual device number.
    pub vdev: u32,
    /// The backend's directory.
    pub backend: String,
    /// The frontend's directory.
    pub frontend: String,
    /// The tapdisk that serves it.
    pub pid: i32,
    /// Its minor there.
    pub minor: Minor,
}

impl Rig {
    /// A host without guests; xenio runs.
    #[must_use]
    pub fn start(programs: Programs) -> Rig {
        Rig::start_in(programs, &std::env::temp_dir())
    }

    /// The same in a new folder below `parent`, which is best short: it becomes part of socket paths.
    #[must_use]
    pub fn start_in(programs: Programs, parent: &Path) -> Rig {
        let folder = tempfile::Builder::new().prefix("xenio").tempdir_in(parent).expect("a temporary folder");
        let host = SimHost::create(folder.path()).expect("the host's folders");
        let store = SimStore::start(&host.store());
        let mut rig = Rig {
            folder,
            host,
            store,
            programs,
            xenio: None,
            spawn_options: Vec::new(),
            open_options: Vec::new(),
            input: None,
            environment: Vec::new(),
            refuse: String::new(),
        };
        rig.start_xenio();
        rig
    }

    /// A path for an image or the like.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env(VARIABLE, self.host.dir())
            .env("XENSTORED_PATH", self.store.socket())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        command
    }

    /// From now on tapdisks become the user `name`, also those that xenio starts. It takes root.
    ///
    /// # Panics
    ///
    /// As everywhere in this file: if the system refuses something.
    pub fn give_user(&mut self, name: &str) {
        set_mode(self.host.dir(), 0o711);
        set_mode(&self.host.xen(), 0o777);
        self.environment.push((USER.into(), name.into()));
        self.kill_xenio();
        self.start_xenio();
    }

    /// Lets that user reach what frontends have made so far: the simulated devices are files.
    pub fn share_devices(&self) {
        for entry in std::fs::read_dir(self.host.xen()).expect("the folder of devices") {
            set_mode(&entry.expect("a device").path(), 0o666);
        }
    }

    /// Starts xenio in the foreground, its words going to `xenio.log` in the host's folder.
    pub fn start_xenio(&mut self) {
        let log =
            std::fs::File::options().create(true).append(true).open(self.path("xenio.log")).expect("a log");
        let mut command = self.command(&self.programs.xenio);
        command.arg("-D").stdout(log.try_clone().expect("a descriptor")).stderr(log);
        self.xenio = Some(command.spawn().expect("xenio-sim starts"));
    }

    /// Kills xenio as a crash would.
    pub fn kill_xenio(&mut self) {
        if let Some(mut xenio) = self.xenio.take() {
            xenio.kill().expect("xenio was running");
            xenio.wait().expect("xenio ends");
        }
    }

    /// The process id of the xenio that runs.
    ///
    /// # Panics
    ///
    /// If none does.
    #[must_use]
    pub fn xenio_pid(&self) -> i32 {
        let xenio = self.xenio.as_ref().expect("xenio runs");
        xenio.id().try_into().expect("a process id")
    }

    /// What xenio has said so far.
    #[must_use]
    pub fn xenio_log(&self) -> String {
        std::fs::read_to_string(self.path("xenio.log")).unwrap_or_default()
    }

    /// Runs `tap-ctl`.
    #[must_use]
    pub fn tap_ctl(&self, args: &[&str]) -> Outcome {
        let mut command = self.command(&self.programs.tap_ctl);
        if !self.refuse.is_empty() {
            command.env(refuse::VARIABLE, &self.refuse);
        }
        if let Some(path) = &self.input {
            command.stdin(std::fs::File::open(path).expect("the input of tap-ctl"));
        }
        let output = command.args(args).output().expect("tap-ctl-sim starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        Outcome {
            code: output.status.code().unwrap_or(-1),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }

    /// Starts `tap-ctl` with a command that goes on until it is killed; what it prints can be read.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    pub fn start_tap_ctl(&self, args: &[&str]) -> Child {
        let mut command = self.command(&self.programs.tap_ctl);
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("tap-ctl-sim starts")
    }

    fn tap_ctl_ok(&self, args: &[&str]) -> Result<String, String> {
        let outcome = self.tap_ctl(args);
        if outcome.code == 0 { Ok(outcome.out) } else { Err(outcome.err) }
    }

    /// Waits until a node has a value.
    ///
    /// # Panics
    ///
    /// When it does not within [`PATIENCE`], with xenio's log.
    pub fn wait_value(&self, path: &str, value: &str) {
        let reached =
            self.store.wait_for(path, PATIENCE, |found| found.is_some_and(|found| found == value.as_bytes()));
        let found = self.store.read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        assert!(reached, "{path} is {found:?}, not {value:?}; xenio said:\n{}", self.xenio_log());
    }

    /// Makes guest `domid` known, with the directory that its toolstack gives it.
    pub fn create_domain(&self, domid: u16) {
        self.store.introduce(domid);
        self.store.mkdir(&format!("/local/domain/{domid}/device/vbd"));
    }

    /// The directories of a new disk, as libxl writes them, both in state 1.
    #[must_use]
    pub fn write_device(&self, domid: u16, vdev: u32, params: &str, mode: &str) -> Device {
        self.write_device_with(domid, vdev, params, mode, &[])
    }

    fn write_device_with(
        &self,
        domid: u16,
        vdev: u32,
        params: &str,
        mode: &str,
        keys: &[(&str, &str)],
    ) -> Device {
        let backend = format!("/local/domain/0/backend/vbd3/{domid}/{vdev}");
        let frontend = format!("/local/domain/{domid}/device/vbd/{vdev}");
        self.store.mkdir(&backend);
        self.store.mkdir(&frontend);
        let entry = |domid, access| Permission { domid, access };
        self.store.set_perms(&backend, &[entry(0, Access::None), entry(domid, Access::Read)]);
        self.store.set_perms(&frontend, &[entry(domid, Access::None), entry(0, Access::Read)]);
        let (b, f) = (|key: &str| format!("{backend}/{key}"), |key: &str| format!("{frontend}/{key}"));
        let (domid_text, vdev_text) = (domid.to_string(), vdev.to_string());
        let values = [
            (f("backend"), backend.as_str()),
            (f("backend-id"), "0"),
            (f("state"), "1"),
            (f("virtual-device"), &vdev_text),
            (f("device-type"), "disk"),
            (b("frontend"), &frontend),
            (b("frontend-id"), &domid_text),
            (b("online"), "1"),
            (b("params"), params),
            (b("removable"), "0"),
            (b("bootable"), "1"),
            (b("dev"), "xvda"),
            (b("type"), "vbd3"),
            (b("mode"), mode),
            (b("device-type"), "disk"),
            (b("discard-enable"), "1"),
            (b("script"), "/etc/xen/scripts/block-tap"),
            (b("state"), "1"),
        ];
        let mut values: Vec<(&str, &str)> =
            values.iter().map(|(key, value)| (key.as_str(), *value)).collect();
        let more: Vec<_> = keys.iter().map(|(key, value)| (b(key), *value)).collect();
        // Of two values of one key, the later counts.
        values.extend(more.iter().map(|(key, value)| (key.as_str(), *value)));
        self.store.write_all(&values);
        Device { domid, vdev, backend, frontend, pid: 0, minor: Minor(0) }
    }

    /// Adds a disk to a guest: directories, InitWait, tapdisk, hotplug done.
    ///
    /// # Errors
    ///
    /// What `tap-ctl` said on standard error. The directories stay, as they do when libxl's script fails.
    pub fn plug(&self, domid: u16, vdev: u32, params: &str, mode: &str) -> Result<Device, String> {
        self.plug_with(domid, vdev, params, mode, &[])
    }

    /// The same with other values, or more of them, in the backend's directory.
    ///
    /// # Errors
    ///
    /// As [`Rig::plug`].
    pub fn plug_with(
        &self,
        domid: u16,
        vdev: u32,
        params: &str,
        mode: &str,
        keys: &[(&str, &str)],
    ) -> Result<Device, String> {
        let mut device = self.write_device_with(domid, vdev, params, mode, keys);
        self.wait_value(&format!("{}/state", device.backend), "2");
        self.hotplug(&mut device, params)?;
        Ok(device)
    }

    /// What libxl's hotplug script does for a disk that was added: a tapdisk with the image, and its name in XenStore.
    ///
    /// # Errors
    ///
    /// As [`Rig::plug`].
    pub fn hotplug(&self, device: &mut Device, params: &str) -> Result<(), String> {
        self.hotplug_in(device, params, None)
    }

    /// The same with a tapdisk that runs already.
    ///
    /// # Errors
    ///
    /// As [`Rig::plug`].
    pub fn hotplug_in(&self, device: &mut Device, params: &str, tapdisk: Option<i32>) -> Result<(), String> {
        let marker = self.tap_ctl_ok(&["allocate"])?;
        let minor = marker.rsplit('-').next().unwrap_or_default().to_owned();
        let options = self.spawn_options.iter().map(String::as_str);
        let pid = match tapdisk {
            Some(pid) => pid.to_string(),
            None => self.tap_ctl_ok(&std::iter::once("spawn").chain(options).collect::<Vec<_>>())?,
        };
        self.tap_ctl_ok(&["attach", "-p", &pid, "-m", &minor])?;
        if let Err(error) = self.open(&pid, &minor, params) {
            self.tap_ctl_ok(&["detach", "-p", &pid, "-m", &minor])?;
            self.tap_ctl_ok(&["free", "-m", &minor])?;
            return Err(error);
        }
        device.pid = pid.parse().map_err(|error| format!("spawn printed {pid:?}: {error}"))?;
        device.minor = Minor(minor.parse().map_err(|error| format!("allocate printed {marker:?}: {error}"))?);
        let path = self.host.control().vbd_path(device.pid, device.minor);
        self.store
            .write(&format!("{}/physical-device-path", device.backend), path.to_string_lossy().as_bytes());
        self.store.write(&format!("{}/hotplug-status", device.backend), "connected");
        Ok(())
    }

    fn open(&self, pid: &str, minor: &str, params: &str) -> Result<String, String> {
        let options = self.open_options.iter().map(String::as_str);
        let open = ["open", "-p", pid, "-m", minor, "-a", params];
        self.tap_ctl_ok(&open.into_iter().chain(options).collect::<Vec<_>>())
    }

    /// The guest's side of connecting, as Linux does it: keys and state 3, wait for the backend's 4, state 4.
    pub fn connect(&self, device: &Device, frontend: &Frontend) {
        self.connect_with(device, &frontend.keys());
    }

    /// The same with any keys.
    pub fn connect_with(&self, device: &Device, keys: &[(String, String)]) {
        self.announce(device, keys);
        self.wait_value(&format!("{}/state", device.backend), "4");
        self.store.write(&format!("{}/state", device.frontend), "4");
    }

    /// The first half of connecting: the guest's keys, and state 3.
    pub fn announce(&self, device: &Device, keys: &[(String, String)]) {
        let state = format!("{}/state", device.frontend);
        let mut values: Vec<_> =
            keys.iter().map(|(key, value)| (format!("{}/{key}", device.frontend), value.clone())).collect();
        values.push((state, "3".into()));
        let values: Vec<(&str, &str)> =
            values.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        self.store.write_all(&values);
    }

    /// The guest's side of a cooperative removal: answers the backend's 5 with 6.
    pub fn close_frontend(&self, device: &Device) {
        self.wait_value(&format!("{}/state", device.backend), "5");
        self.store.write(&format!("{}/state", device.frontend), "6");
    }

    /// The toolstack's side of taking a disk away from a guest that cooperates, or of destroying the guest.
    pub fn ask_to_close(&self, device: &Device) {
        self.store.write_all(&[
            (&format!("{}/online", device.backend), "0"),
            (&format!("{}/state", device.backend), "5"),
        ]);
    }

    /// Takes a disk away with the guest's help.
    pub fn unplug(&self, device: &Device) {
        self.ask_to_close(device);
        self.close_frontend(device);
        self.finish_removal(device);
    }

    /// Takes a disk away as libxl does when it destroys a guest: frontend gone first, then 5, wait for 6, hotplug remove.
    pub fn destroy(&self, device: &Device) {
        self.store.rm(&device.frontend);
        self.ask_to_close(device);
        self.finish_removal(device);
    }

    /// Waits for state 6, runs the hotplug `remove`, and deletes both directories.
    pub fn finish_removal(&self, device: &Device) {
        self.wait_value(&format!("{}/state", device.backend), "6");
        let (pid, minor) = (device.pid.to_string(), device.minor.to_string());
        let destroyed = self.tap_ctl(&["destroy", "-p", &pid, "-m", &minor]);
        assert_eq!(destroyed.code, 0, "{}", destroyed.err);
        self.store.rm(&device.backend);
        self.store.rm(&device.frontend);
    }

    /// Checks that no tapdisk, marker, socket or statistics are left.
    pub fn assert_clean(&self) {
        assert_eq!(self.tap_ctl(&["list"]).out, "", "tapdisks or markers are left");
        let control = self.host.control();
        let left: Vec<PathBuf> = std::fs::read_dir(control.root())
            .expect("the runtime folder")
            .chain(std::fs::read_dir(control.markers()).expect("the markers' folder"))
            .chain(std::fs::read_dir(control.all_statistics()).into_iter().flatten())
            .filter_map(|entry| Some(entry.ok()?.path()))
            // As /dev/shm, it stays; what is in it is the tapdisks'.
            .filter(|path| *path != control.markers() && path != control.all_statistics())
            .chain(
                std::fs::read_dir(control.all_statistics())
                    .into_iter()
                    .flatten()
                    .filter_map(|entry| Some(entry.ok()?.path())),
            )
            .collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.kill_xenio();
        // A test that failed half-way leaves tapdisks behind; their sockets tell which.
        let Ok(entries) = std::fs::read_dir(self.host.control().root()) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix("ctl")?.parse().ok());
            if let Some(pid) = pid {
                // ESRCH: it has ended by itself.
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
    }
}
