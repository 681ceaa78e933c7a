use std::fs;
use std::os::unix::net::UnixListener;

use tap_ctl::inflight::History;
use tap_ctl::proto::{DiskInfo, Polling, QueueParams, Reopen, RingParams};

use super::*;
use crate::porter::Name;

const PID: i32 = 4711;
const MINOR: Minor = Minor(3);

struct Stage {
    folder: tempfile::TempDir,
    judge: Arc<Judge>,
}

impl Stage {
    fn new() -> Stage {
        let folder = tempfile::tempdir().unwrap();
        for name in ["control/tapdisk", "images/below", "elsewhere"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        let dir = ControlDir::at(folder.path().join("control"));
        Stage { judge: Arc::new(Judge::new(dir, PID)), folder }
    }

    fn dir(&self) -> ControlDir {
        ControlDir::at(self.folder.path().join("control"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file with something in it.
    fn file(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, [7; 2048]).unwrap();
        path
    }

    fn vhd(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, [&[0; 1024], b"conectix".as_slice(), &[0; 504]].concat()).unwrap();
        path
    }

    fn image(&self, text: &str) -> ImageSpec {
        let (kind, name) = text.split_once(':').unwrap();
        format!("{kind}:{}", self.path(name).display()).parse().unwrap()
    }

    fn learn(&self, request: &Request) -> Option<Window> {
        self.judge.learn(request)
    }

    fn asked_to_open(&self, image: &str) -> Option<Window> {
        let params = OpenParams::new(self.image(image));
        self.learn(&Request::Open { minor: MINOR, params })
    }

    fn open(&self, path: &Path, how: How) -> Result<File, Errno> {
        let outcome = self.ask(Errand::Open { path: path.into(), how });
        outcome.map(|(_, fd)| fd.unwrap().into())
    }

    fn ask(&self, errand: Errand) -> Result<(Answer, Option<std::os::fd::OwnedFd>), Errno> {
        self.ask_with(errand, None)
    }

    fn ask_with(
        &self,
        errand: Errand,
        with: Option<BorrowedFd<'_>>,
    ) -> Result<(Answer, Option<std::os::fd::OwnedFd>), Errno> {
        self.judge.carry_out(&errand, with).map_err(|failure| Errno::from_raw(failure.errno))
    }

    #[track_caller]
    fn refused(&self, errand: Errand) {
        assert_eq!(self.ask(errand.clone()).err(), Some(Errno::EACCES), "{errand:?}");
    }

    #[track_caller]
    fn allowed(&self, errand: Errand) {
        assert_ne!(self.ask(errand.clone()).err(), Some(Errno::EACCES), "{errand:?}");
    }

    fn root(&self) -> Name {
        self.dir().root().into()
    }

    fn record(&self, image: &str) -> Record {
        let info = DiskInfo {
            sectors: 8,
            sector_size: 512,
            physical_sector_size: 512,
            readonly: false,
            discard: None,
        };
        Record {
            pid: PID,
            socket: self.dir().vbd_path(7, MINOR),
            engine: "auto".into(),
            parent_cache: None,
            params: OpenParams::new(self.image(image)),
            info,
            paused: false,
            rings: Vec::new(),
            history: History::default(),
        }
    }
}

fn ring(domid: u16) -> RingParams {
    RingParams {
        domid,
        vdev: 51712,
        protocol: "x86_64-abi".into(),
        queues: vec![QueueParams { ring_refs: vec![8], port: 9 }],
        readonly: false,
        persistent: true,
        discard: false,
        polling: Polling::default(),
    }
}

#[test]
fn an_image_is_opened_once_it_was_asked_for_and_written_only_if_it_may_be() {
    let stage = Stage::new();
    let (image, other) = (stage.file("images/a"), stage.file("images/b"));
    assert_eq!(stage.open(&image, How::READ).unwrap_err(), Errno::EACCES);
    let params = OpenParams { readonly: true, ..OpenParams::new(stage.image("aio:images/a")) };
    drop(stage.learn(&Request::Open { minor: MINOR, params }));
    stage.open(&image, How::READ).unwrap();
    assert_eq!(stage.open(&image, How::WRITE).unwrap_err(), Errno::EACCES);
    drop(stage.asked_to_open("aio:images/b"));
    stage.open(&other, How { flags: libc::O_NOATIME | libc::O_NONBLOCK, ..How::WRITE }).unwrap();
    let how = How { flags: libc::O_TRUNC, ..How::WRITE };
    assert_eq!(stage.open(&other, how).unwrap_err(), Errno::EACCES);
}

#[test]
fn an_image_is_known_by_all_its_names_and_a_name_by_nothing_but_where_it_leads() {
    let stage = Stage::new();
    let (image, link) = (stage.file("elsewhere/a"), stage.path("images/link"));
    std::os::unix::fs::symlink(&image, &link).unwrap();
    drop(stage.asked_to_open("aio:images/link"));
    stage.open(&image, How::WRITE).unwrap();
    stage.open(&link, How::WRITE).unwrap();
    let beside = stage.path("images/beside");
    std::os::unix::fs::symlink(stage.file("elsewhere/b"), &beside).unwrap();
    assert_eq!(stage.open(&beside, How::READ).unwrap_err(), Errno::EACCES);
}

#[test]
fn parents_are_opened_in_a_window_to_read_and_afterwards_only_again() {
    let stage = Stage::new();
    let leaf = stage.file("images/leaf");
    let parents =
        [stage.file("images/parent"), stage.file("images/below/parent"), stage.vhd("elsewhere/vhd")];
    let foreign = stage.file("elsewhere/raw");
    let window = stage.asked_to_open("vhd:images/leaf");
    // The image comes first: where it lies decides where its parents may.
    assert_eq!(stage.open(&parents[0], How::READ).unwrap_err(), Errno::EACCES);
    stage.open(&leaf, How::WRITE).unwrap();
    for parent in &parents {
        stage.open(parent, How::READ).unwrap();
        assert_eq!(stage.open(parent, How::WRITE).unwrap_err(), Errno::EACCES);
    }
    assert_eq!(stage.open(&foreign, How::READ).unwrap_err(), Errno::EACCES);
    drop(window);
    let late = stage.file("images/late");
    assert_eq!(stage.open(&late, How::READ).unwrap_err(), Errno::EACCES);
    assert_eq!(stage.open(&stage.vhd("elsewhere/late"), How::READ).unwrap_err(), Errno::EACCES);
    stage.open(&parents[1], How::READ).unwrap();
}

#[test]
fn what_is_neither_a_file_nor_a_block_device_is_no_parent_even_beside_the_image() {
    let stage = Stage::new();
    let (leaf, pipe) = (stage.file("images/leaf"), stage.path("images/pipe"));
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _window = stage.asked_to_open("qcow2:images/leaf");
    stage.open(&leaf, How::WRITE).unwrap();
    let how = How { flags: libc::O_NONBLOCK, ..How::READ };
    assert_eq!(stage.open(&pipe, how).unwrap_err(), Errno::EACCES);
}

#[test]
fn a_raw_disk_names_nothing_so_what_lies_beside_it_is_not_opened() {
    let stage = Stage::new();
    let [disk, beside] = ["images/disk", "images/beside"].map(|name| stage.file(name));
    let _window = stage.asked_to_open("aio:images/disk");
    stage.open(&disk, How::WRITE).unwrap();
    assert_eq!(stage.open(&beside, How::READ).unwrap_err(), Errno::EACCES);
}

#[test]
fn extents_are_written_right_beside_their_descriptor_and_nowhere_else() {
    let stage = Stage::new();
    let [extent, below] = ["images/extent", "images/below/extent"].map(|name| stage.file(name));
    stage.file("images/disk");
    let window = stage.asked_to_open("vmdk:images/disk");
    stage.open(&stage.path("images/disk"), How::WRITE).unwrap();
    stage.open(&extent, How::WRITE).unwrap();
    assert_eq!(stage.open(&below, How::WRITE).unwrap_err(), Errno::EACCES);
    drop(window);
    assert_eq!(stage.open(&stage.file("images/other"), How::WRITE).unwrap_err(), Errno::EACCES);
    // An image of another format has no extents.
    let stage = Stage::new();
    let extent = stage.file("images/extent");
    let _window = stage.asked_to_open("vhd:images/extent2");
    stage.open(&stage.file("images/extent2"), How::WRITE).unwrap();
    assert_eq!(stage.open(&extent, How::WRITE).unwrap_err(), Errno::EACCES);
}

#[test]
fn only_what_was_given_is_opened_again_and_with_no_more_rights() {
    let stage = Stage::new();
    let path = stage.file("images/a");
    let params = OpenParams { readonly: true, ..OpenParams::new(stage.image("aio:images/a")) };
    drop(stage.learn(&Request::Open { minor: MINOR, params }));
    let own = File::open(&path).unwrap();
    let again = |file: &File, how| stage.ask_with(Errand::Again { how }, Some(file.as_fd())).err();
    assert_eq!(again(&own, How::READ), Some(Errno::EACCES), "it was not given yet");
    let given = stage.open(&path, How::READ).unwrap();
    assert_eq!(again(&given, How::READ), None);
    assert_eq!(again(&given, How::WRITE), Some(Errno::EACCES));
    assert_eq!(again(&given, How { flags: libc::O_TRUNC, ..How::READ }), Some(Errno::EACCES));
    assert_eq!(stage.ask(Errand::Again { how: How::READ }).err(), Some(Errno::EBADF));
    let other = File::open(stage.file("images/b")).unwrap();
    assert_eq!(again(&other, How::READ), Some(Errno::EACCES));
}

#[test]
fn a_file_of_a_chain_names_images_and_so_does_what_it_says_later() {
    let stage = Stage::new();
    let [leaf, base, later] =
        ["elsewhere/leaf", "elsewhere/base", "elsewhere/later"].map(|name| stage.file(name));
    let chain = stage.path("images/chain");
    fs::write(&chain, format!("aio:{}\naio:{}\n", leaf.display(), base.display())).unwrap();
    drop(stage.asked_to_open("x-chain:images/chain"));
    stage.open(&chain, How::READ).unwrap();
    stage.open(&leaf, How::WRITE).unwrap();
    stage.open(&base, How::READ).unwrap();
    assert_eq!(stage.open(&base, How::WRITE).unwrap_err(), Errno::EACCES);
    assert_eq!(stage.open(&later, How::WRITE).unwrap_err(), Errno::EACCES);
    fs::write(&chain, format!("aio:{}\n", later.display())).unwrap();
    drop(stage.learn(&Request::Unpause { minor: MINOR, change: Reopen::default() }));
    stage.open(&later, How::WRITE).unwrap();
}

#[test]
fn what_an_unpause_names_is_opened_as_the_disk_was() {
    let stage = Stage::new();
    let [mirror, log] = ["elsewhere/mirror", "elsewhere/log"].map(|name| stage.file(name));
    let change = Reopen {
        secondary: Some(Secondary::Image(stage.image("aio:elsewhere/mirror"))),
        log: Some(log.display().to_string()),
        ..Reopen::default()
    };
    let params = OpenParams { readonly: true, ..OpenParams::new(stage.image("aio:images/a")) };
    drop(stage.learn(&Request::Open { minor: MINOR, params }));
    drop(stage.learn(&Request::Unpause { minor: MINOR, change }));
    stage.open(&mirror, How::READ).unwrap();
    assert_eq!(stage.open(&mirror, How::WRITE).unwrap_err(), Errno::EACCES);
    stage.open(&log, How::WRITE).unwrap();
}

#[test]
fn a_snapshot_makes_the_image_it_was_asked_for_by_its_draft() {
    let stage = Stage::new();
    let (child, draft) = (stage.path("images/child"), stage.path(&format!("images/.child.{PID}")));
    let make = How { create: Some(0o600), ..How::WRITE };
    let link = || Errand::Link { from: (&*draft).into(), to: (&*child).into() };
    let remove = |path: &Path| Errand::Remove { path: path.into() };
    assert_eq!(stage.open(&draft, make).unwrap_err(), Errno::EACCES);
    let image = stage.image("vhd:images/child");
    let window = stage.learn(&Request::Snapshot { minor: MINOR, image, within: None });
    assert_eq!(stage.ask(Errand::Exists { path: (&*child).into() }).unwrap().0, Answer::Is(false));
    assert_eq!(stage.open(&stage.path("images/.other.1"), make).unwrap_err(), Errno::EACCES);
    assert_eq!(stage.open(&child, make).unwrap_err(), Errno::EACCES);
    // What has come of that name meanwhile is not ours to remove.
    stage.file("images/child");
    stage.refused(remove(&child));
    fs::remove_file(&child).unwrap();
    stage.open(&draft, make).unwrap();
    stage.refused(Errand::Link { from: (&*draft).into(), to: (&*stage.path("images/x")).into() });
    stage.ask(link()).unwrap();
    let folder = stage.path("images");
    stage.open(&folder, How { flags: libc::O_DIRECTORY, ..How::READ }).unwrap();
    let elsewhere = stage.path("elsewhere");
    let how = How { flags: libc::O_DIRECTORY, ..How::READ };
    assert_eq!(stage.open(&elsewhere, how).unwrap_err(), Errno::EACCES);
    stage.ask(remove(&draft)).unwrap();
    stage.open(&child, How::WRITE).unwrap();
    drop(window);
    stage.refused(remove(&child));
    stage.refused(link());
    assert_eq!(stage.open(&draft, make).unwrap_err(), Errno::EACCES);
}

#[test]
fn sockets_and_minors_are_those_of_its_disks() {
    let stage = Stage::new();
    let (dir, root) = (stage.dir(), stage.root());
    let claim = |minor| Errand::Claim { root: root.clone(), minor };
    let listen = |pid, minor| Errand::Listen { path: (&*dir.vbd_path(pid, minor)).into() };
    let alias = |pid, minor| Errand::Alias {
        path: (&*dir.vbd_path(PID, MINOR)).into(),
        alias: (&*dir.vbd_path(pid, minor)).into(),
    };
    let remove = |path: PathBuf| Errand::Remove { path: (&*path).into() };
    fs::write(dir.marker(MINOR), "").unwrap();
    stage.refused(claim(MINOR));
    stage.refused(listen(PID, MINOR));
    assert!(stage.learn(&Request::Attach { minor: MINOR }).is_none(), "nothing is opened");
    stage.ask(claim(MINOR)).unwrap();
    stage.ask(listen(PID, MINOR)).unwrap();
    stage.ask(alias(7, MINOR)).unwrap();
    stage.refused(claim(Minor(4)));
    stage.refused(Errand::Claim { root: (&*stage.path("elsewhere")).into(), minor: MINOR });
    stage.refused(listen(PID, Minor(4)));
    stage.refused(listen(8, MINOR));
    stage.refused(alias(7, Minor(4)));
    stage.refused(Errand::Listen { path: (&*stage.path("control/ctl8")).into() });
    stage.refused(remove(dir.vbd_path(8, Minor(4))));
    stage.refused(remove(dir.control_socket(8)));
    stage.refused(remove(dir.marker(MINOR)));
    stage.allowed(remove(dir.control_socket(PID)));
    stage.ask(remove(dir.vbd_path(7, MINOR))).unwrap();
    stage.refused(Errand::CleanUp {
        root: root.clone(),
        dead: 8,
        minor: Minor(4),
        except: (&*dir.vbd_path(8, MINOR)).into(),
    });
}

#[test]
fn servers_are_those_that_were_named() {
    let stage = Stage::new();
    let [server, xenstored] = ["elsewhere/nbd", "elsewhere/xenstored"].map(|name| stage.path(name));
    let _listening = [&server, &xenstored].map(|path| UnixListener::bind(path).unwrap());
    let connect = |path: &Path| Errand::Connect { path: path.into() };
    stage.refused(connect(&server));
    let image = format!("nbd:unix:{}", server.display()).parse().unwrap();
    drop(stage.learn(&Request::Open { minor: MINOR, params: OpenParams::new(image) }));
    stage.ask(connect(&server)).unwrap();
    stage.refused(connect(&xenstored));
}

#[test]
fn another_disk_stands_for_parents_if_it_was_named() {
    let stage = Stage::new();
    let path = stage.dir().vbd_path(8, Minor(5));
    let _listening = UnixListener::bind(&path).unwrap();
    let parent = |minor| Errand::Parent { root: stage.root(), minor };
    let connect = || Errand::Connect { path: (&*path).into() };
    stage.refused(parent(Minor(5)));
    let params = OpenParams { shared_parent: Some(Minor(5)), ..OpenParams::new(stage.image("vhd:images/a")) };
    drop(stage.learn(&Request::Open { minor: MINOR, params }));
    stage.refused(parent(Minor(6)));
    stage.refused(connect());
    stage.ask(parent(Minor(5))).unwrap();
    stage.ask(connect()).unwrap();
}

#[test]
fn devices_are_those_of_the_guests_that_it_serves() {
    let stage = Stage::new();
    stage.refused(Errand::Grants);
    stage.refused(Errand::Events { dom: 5 });
    stage.learn(&Request::Connect { minor: MINOR, ring: ring(5) });
    stage.refused(Errand::Events { dom: 6 });
    stage.allowed(Errand::Grants);
    stage.allowed(Errand::Events { dom: 5 });
}

#[test]
fn a_record_says_what_was_asked_for_and_nothing_else() {
    let stage = Stage::new();
    stage.file("images/a");
    let keep = |record: &Record| Errand::Keep {
        root: stage.root(),
        minor: MINOR,
        what: Keep::Write(Box::new(record.clone())),
    };
    let begin = || Errand::Keep { root: stage.root(), minor: MINOR, what: Keep::Begin };
    stage.refused(begin());
    stage.learn(&Request::Attach { minor: MINOR });
    stage.ask(begin()).unwrap();
    let record = stage.record("aio:images/a");
    stage.refused(keep(&record));
    let readonly = OpenParams { readonly: true, ..record.params.clone() };
    drop(stage.learn(&Request::Open { minor: MINOR, params: readonly.clone() }));
    stage.refused(keep(&record));
    stage.ask(keep(&Record { params: readonly, ..record.clone() })).unwrap();
    drop(stage.asked_to_open("aio:images/a"));
    stage.ask(keep(&record)).unwrap();
    let mirror = OpenParams { secondary: Some(stage.image("aio:images/b")), ..record.params.clone() };
    let log = OpenParams { log: Some("/etc/passwd".into()), ..record.params.clone() };
    let shared = OpenParams { shared_parent: Some(Minor(9)), ..record.params.clone() };
    let server = OpenParams::new("nbd:unix:/run/xenstored/socket".parse().unwrap());
    let chain = OpenParams::new(stage.image("x-chain:images/c"));
    for params in [mirror, log, shared, server, chain] {
        stage.refused(keep(&Record { params, ..record.clone() }));
    }
    stage.refused(keep(&Record { pid: 1, ..record.clone() }));
    stage.refused(keep(&Record { socket: stage.dir().vbd_path(7, Minor(4)), ..record.clone() }));
    stage.refused(keep(&Record { socket: stage.path("images/a"), ..record.clone() }));
    stage.refused(keep(&Record { rings: vec![ring(5)], ..record.clone() }));
    stage.learn(&Request::Connect { minor: MINOR, ring: ring(5) });
    stage.ask(keep(&Record { rings: vec![ring(5)], ..record })).unwrap();
}

#[test]
fn journals_and_statistics_are_its_own() {
    let stage = Stage::new();
    let make = How { create: Some(0o600), ..How::WRITE };
    let folder = Folder::of(&stage.dir(), MINOR);
    folder.create().unwrap();
    let journal = folder.journal(&ring(5), &ring(5).queues[0]);
    assert_eq!(stage.open(&journal, make).unwrap_err(), Errno::EACCES);
    stage.learn(&Request::Attach { minor: MINOR });
    stage.open(&journal, make).unwrap();
    stage.open(&journal, How::WRITE).unwrap();
    stage.ask(Errand::Remove { path: (&*journal).into() }).unwrap();
    for name in ["record", "draft"] {
        assert_eq!(stage.open(&folder.path().join(name), make).unwrap_err(), Errno::EACCES);
    }
    let page = |pid: u32| stage.dir().statistics(pid).join("vbd-5-51712");
    let own = stage.dir().statistics(PID.unsigned_abs());
    stage.ask(Errand::MakeFolder { path: (&*own).into() }).unwrap();
    stage.open(&page(PID.unsigned_abs()), make).unwrap();
    assert_eq!(stage.open(&page(1), make).unwrap_err(), Errno::EACCES);
    assert_eq!(stage.open(&own.join("other"), make).unwrap_err(), Errno::EACCES);
    stage.refused(Errand::MakeFolder { path: (&*stage.path("elsewhere/x")).into() });
    stage.refused(Errand::RemoveFolder { path: (&*stage.path("elsewhere")).into() });
}

#[test]
fn who_takes_over_opens_what_the_record_says_until_it_has_settled() {
    let stage = Stage::new();
    let [image, parent, late] = ["images/a", "images/parent", "images/late"].map(|name| stage.file(name));
    let folder = Folder::of(&stage.dir(), MINOR);
    folder.create().unwrap();
    let record = Record { pid: 7, rings: vec![ring(5)], ..stage.record("vhd:images/a") };
    folder.write(&record).unwrap();
    stage.judge.take_over(MINOR);
    stage.open(&image, How::WRITE).unwrap();
    stage.open(&parent, How::READ).unwrap();
    stage.allowed(Errand::Events { dom: 5 });
    let read = Errand::Keep { root: stage.root(), minor: MINOR, what: Keep::Read };
    assert_eq!(stage.ask(read).unwrap().0, Answer::Record(Some(Box::new(record))));
    stage.ask(Errand::Settled).unwrap();
    assert_eq!(stage.open(&late, How::READ).unwrap_err(), Errno::EACCES);
    stage.refused(Errand::Resolve { path: (&*late).into() });
    stage.open(&parent, How::READ).unwrap();
}
