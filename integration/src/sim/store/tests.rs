//! The shipped client against the simulated daemon.

use std::os::fd::AsFd;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use xenstore::{Access, Client, Error, TxId};

use super::*;

const SOON: Duration = Duration::from_secs(30);
const NONE: TxId = TxId::NONE;

/// A daemon, and the directory that its sockets need.
struct World {
    store: SimStore,
    _dir: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().expect("a directory");
        World { store: SimStore::start(dir.path()), _dir: dir }
    }

    fn dom0(&self) -> Client {
        Client::connect_to(&self.store.socket()).expect("it listens")
    }

    fn guest(&self, domid: u16) -> Client {
        Client::connect_to(&self.store.listen_for(domid)).expect("it listens")
    }

    /// A guest with a home directory of its own, as the toolstack makes it.
    fn guest_with_home(&self, domid: u16) -> Client {
        let home = format!("/local/domain/{domid}");
        self.store.mkdir(&home);
        self.store.set_perms(&home, &[Permission::new(domid, Access::None)]);
        self.guest(domid)
    }
}

/// Takes the events that were caused so far, as `path token`.
fn events(client: &mut Client) -> Vec<String> {
    // A new watch's first event follows the reply to WATCH; no later reply can overtake it.
    let _ = client.read(NONE, "/");
    while client.poll_events().expect("connected") > 0 {}
    std::iter::from_fn(|| client.next_event())
        .map(|event| {
            format!("{} {}", String::from_utf8_lossy(&event.path), String::from_utf8_lossy(&event.token))
        })
        .collect()
}

fn errno<T: std::fmt::Debug>(outcome: Result<T, Error>) -> Errno {
    outcome.expect_err("refused").errno().expect("by the daemon")
}

#[test]
fn values_are_bytes_and_parents_appear_by_themselves() {
    let world = World::new();
    let mut client = world.dom0();
    client.write(NONE, "/a/b/c", b"\0\xffx").expect("written");
    assert_eq!(client.read(NONE, "/a/b/c").expect("there"), b"\0\xffx");
    assert_eq!(client.read(NONE, "/a/b").expect("made on the way"), b"");
    client.mkdir(NONE, "/a/d").expect("made");
    client.mkdir(NONE, "/a/b/c").expect("there already");
    assert_eq!(client.read(NONE, "/a/b/c").expect("unchanged"), b"\0\xffx");
    assert_eq!(client.directory(NONE, "/a").expect("there"), [b"b", b"d"]);
    assert_eq!(world.store.list("/a").expect("there"), ["b", "d"]);
    assert_eq!(errno(client.read(NONE, "/a/x")), Errno::ENOENT);
}

#[test]
fn removal_takes_the_subtree_and_needs_a_parent() {
    let world = World::new();
    let mut client = world.dom0();
    client.write(NONE, "/a/b/c", "1").expect("written");
    client.rm(NONE, "/a/b").expect("removed");
    assert!(!world.store.exists("/a/b/c") && world.store.exists("/a"));
    client.rm(NONE, "/a/b").expect("its parent is there");
    assert_eq!(errno(client.rm(NONE, "/x/y")), Errno::ENOENT);
    assert_eq!(errno(client.rm(NONE, "/")), Errno::EINVAL);
    assert!(client.directory(NONE, "/a").expect("there").is_empty());
}

#[test]
fn relative_paths_start_at_home_on_every_socket() {
    let world = World::new();
    let mut dom0 = world.dom0();
    assert_eq!(dom0.read(NONE, "domid").expect("a booted host has it"), b"0");
    let mut guest = world.guest_with_home(7);
    guest.write(NONE, "data/x", "1").expect("its own home");
    assert_eq!(world.store.read("/local/domain/7/data/x").expect("there"), b"1");
}

#[test]
fn a_watch_fires_at_once_and_for_everything_below() {
    let world = World::new();
    let mut client = world.dom0();
    client.watch("/a", "t").expect("watching");
    assert_eq!(events(&mut client), ["/a t"], "also for a node that does not exist");
    world.store.write("/a/b/c", "1");
    world.store.write("/ab", "1");
    assert_eq!(events(&mut client), ["/a/b/c t"]);
    assert_eq!(errno(client.watch("/a", "t")), Errno::EEXIST);
    client.watch("/a", "u").expect("another token is another watch");
    client.unwatch("/a", "t").expect("it was there");
    assert_eq!(errno(client.unwatch("/a", "t")), Errno::ENOENT);
    world.store.write("/a", "2");
    assert_eq!(events(&mut client), ["/a u", "/a u"], "its first event, and the change");
}

#[test]
fn events_of_a_relative_watch_are_relative() {
    let world = World::new();
    let mut client = world.dom0();
    client.watch("backend/vbd3", "t").expect("watching");
    world.store.write("/local/domain/0/backend/vbd3/1/51712/state", "1");
    assert_eq!(events(&mut client), ["backend/vbd3 t", "backend/vbd3/1/51712/state t"]);
}

#[test]
fn removal_tells_watches_above_once_and_watches_below_each() {
    let world = World::new();
    world.store.write("/a/b/c", "1");
    world.store.write("/a/b/d", "1");
    let mut client = world.dom0();
    for (path, token) in [("/a", "above"), ("/a/b", "at"), ("/a/b/c", "below")] {
        client.watch(path, token).expect("watching");
    }
    events(&mut client);
    assert!(world.store.rm("/a/b"));
    assert_eq!(events(&mut client), ["/a/b/c below", "/a/b above", "/a/b at"]);
}

#[test]
fn an_event_precedes_the_reply_to_the_request_that_caused_it() {
    let world = World::new();
    let mut client = world.dom0();
    client.watch("/a", "t").expect("watching");
    events(&mut client);
    client.write(NONE, "/a", "1").expect("written");
    assert!(client.next_event().is_some(), "queued while the reply was awaited, without polling");
}

#[test]
fn equal_events_that_wait_become_one() {
    let world = World::new();
    let mut client = world.dom0();
    client.watch("/a", "t").expect("watching");
    events(&mut client);
    client.mkdir(NONE, "/flood").expect("made");
    // More than the socket takes: what waits in the daemon is merged, so the flood ends in few events.
    for number in 0..20_000 {
        world.store.write("/a", number.to_string());
    }
    let count = events(&mut client).len();
    assert!((1..20_000).contains(&count), "{count}");
    assert_eq!(world.store.read("/a").expect("there"), b"19999");
}

#[test]
fn different_events_that_find_no_room_are_sent_when_there_is_some() {
    let world = World::new();
    let mut client = world.dom0();
    client.watch("/a", "t").expect("watching");
    events(&mut client);
    for number in 0..2000 {
        world.store.write(&format!("/a/{number}"), "1");
    }
    // Nothing is sent to the daemon meanwhile: that would make it look at the connection anyway.
    let mut seen = 0;
    while seen < 2000 {
        let fd = PollFd::new(client.as_fd(), PollFlags::POLLIN);
        assert_eq!(poll(&mut [fd], PollTimeout::from(30_000u16)).expect("poll works"), 1, "after {seen}");
        seen += client.poll_events().expect("connected");
    }
    assert_eq!(seen, 2000);
}

#[test]
fn a_readable_descriptor_announces_events() {
    let world = World::new();
    let mut client = world.dom0();
    client.watch("/a", "t").expect("watching");
    events(&mut client);
    let ready = |client: &Client, timeout: PollTimeout| {
        poll(&mut [PollFd::new(client.as_fd(), PollFlags::POLLIN)], timeout).expect("poll works")
    };
    assert_eq!(ready(&client, PollTimeout::ZERO), 0);
    world.store.write("/a", "1");
    assert_eq!(ready(&client, PollTimeout::ZERO), 1);
}

#[test]
fn a_transaction_is_invisible_until_its_end_and_its_events_come_then() {
    let world = World::new();
    let mut watcher = world.dom0();
    watcher.watch("/a", "t").expect("watching");
    events(&mut watcher);
    let mut client = world.dom0();
    let done: Result<(), Error> = client.transact(|client, tx| {
        client.write(tx, "/a/x", "1")?;
        client.write(tx, "/a/y", "2")?;
        assert_eq!(client.read(tx, "/a/x")?, b"1");
        assert!(!world.store.exists("/a"), "only the transaction sees it");
        assert!(events(&mut watcher).is_empty());
        Ok(())
    });
    done.expect("committed");
    assert_eq!(world.store.list("/a").expect("there"), ["x", "y"]);
    assert_eq!(events(&mut watcher), ["/a/x t", "/a/y t"]);
}

#[test]
fn of_two_conflicting_transactions_the_second_is_repeated() {
    let world = World::new();
    world.store.write("/counter", "0");
    let (mut one, mut two) = (world.dom0(), world.dom0());
    let mut runs = 0;
    let increment = |client: &mut Client, tx: TxId| -> Result<(), Error> {
        let value = xenstore::value::parse_u32(&client.read(tx, "/counter")?).expect("a number");
        client.write(tx, "/counter", (value + 1).to_string())
    };
    let done: Result<(), Error> = one.transact(|one, tx| {
        increment(one, tx)?;
        runs += 1;
        if runs == 1 {
            two.transact(increment)?;
        }
        Ok(())
    });
    done.expect("the second run meets no conflict");
    assert_eq!(runs, 2);
    assert_eq!(world.store.read("/counter").expect("there"), b"2");
}

#[test]
fn transactions_on_different_nodes_do_not_disturb_each_other() {
    let world = World::new();
    world.store.write("/a/x", "0");
    world.store.write("/b/x", "0");
    let (mut one, mut two) = (world.dom0(), world.dom0());
    let mut runs = 0;
    let done: Result<(), Error> = one.transact(|one, tx| {
        runs += 1;
        one.write(tx, "/a/x", "1")?;
        two.transact(|two, tx| two.write(tx, "/b/x", "1"))
    });
    done.expect("committed");
    assert_eq!(runs, 1);
}

#[test]
fn transactions_of_many_threads_lose_no_increment() {
    let world = World::new();
    world.store.write("/counter", "0");
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut client = world.dom0();
                for _ in 0..25 {
                    let done: Result<(), Error> = client.transact(|client, tx| {
                        let value =
                            xenstore::value::parse_u32(&client.read(tx, "/counter")?).expect("a number");
                        client.write(tx, "/counter", (value + 1).to_string())
                    });
                    done.expect("100 tries are plenty for 4 threads");
                }
            });
        }
    });
    assert_eq!(world.store.read("/counter").expect("there"), b"100");
}

#[test]
fn h52_a_guarded_write_does_not_resurrect_a_removed_directory() {
    let world = World::new();
    world.store.write("/backend/1/online", "1");
    let mut client = world.dom0();
    let mut runs = 0;
    let outcome: Result<(), Error> = client.transact(|client, tx| {
        runs += 1;
        client.read(tx, "/backend/1/online")?;
        // The toolstack is faster than our write.
        world.store.rm("/backend/1");
        client.write(tx, "/backend/1/state", "2")
    });
    assert!(outcome.expect_err("the second run finds nothing").is_not_found());
    assert_eq!(runs, 2);
    assert!(!world.store.exists("/backend/1"));
}

#[test]
fn a_transaction_that_looked_for_a_missing_node_loses_when_it_appears() {
    let world = World::new();
    let mut client = world.dom0();
    let mut seen = Vec::new();
    let done: Result<(), Error> = client.transact(|client, tx| {
        seen.push(client.read(tx, "/late").is_ok());
        world.store.write("/late", "1");
        client.write(tx, "/mine", "1")
    });
    // Each run rewrites /late, so only the first sees it missing and every one loses.
    assert!(matches!(done, Err(Error::Busy { .. })), "{done:?}");
    assert!(!seen[0] && seen[1..].iter().all(|&found| found));
    assert!(!world.store.exists("/mine"));
}

#[test]
fn an_unknown_transaction_is_refused() {
    let world = World::new();
    let mut client = world.dom0();
    let mut kept = NONE;
    let done: Result<(), Error> = client.transact(|_, tx| {
        kept = tx;
        Ok(())
    });
    done.expect("committed");
    assert_eq!(errno(client.read(kept, "/")), Errno::ENOENT);
}

#[test]
fn a_directory_above_one_message_is_complete() {
    let world = World::new();
    let names: Vec<String> = (0..1500).map(|number| format!("child-{number}")).collect();
    for name in &names {
        world.store.mkdir(&format!("/dir/{name}"));
    }
    let mut client = world.dom0();
    let expected: Vec<&[u8]> = names.iter().map(String::as_bytes).collect();
    assert_eq!(client.directory(NONE, "/dir").expect("in parts"), expected);
    let in_transaction = client.transact(|client, tx| client.directory(tx, "/dir"));
    assert_eq!(in_transaction.expect("in parts"), expected);
}

#[test]
fn lists_around_the_limit_of_one_message_are_complete() {
    let world = World::new();
    let mut client = world.dom0();
    // With the fourth name the list grows over everything that a message can hold: with and without the generation
    // and the end mark of a part, and with the list itself still fitting or not.
    for fourth in 1005..=1025 {
        for fifth in [0, 1, 50] {
            world.store.rm("/dir");
            let lengths: [usize; 5] = [1023, 1023, 1023, fourth, fifth];
            for (letter, len) in
                ["a", "b", "c", "d", "e"].into_iter().zip(lengths).filter(|&(_, len)| len > 0)
            {
                world.store.mkdir(&format!("/dir/{}", letter.repeat(len)));
            }
            let names = client.directory(NONE, "/dir").expect("there");
            let expected: Vec<usize> = lengths.into_iter().filter(|&len| len > 0).collect();
            assert_eq!(names.iter().map(Vec::len).collect::<Vec<_>>(), expected);
        }
    }
}

#[test]
fn a_guest_can_neither_read_nor_write_nor_probe_what_it_has_no_right_to() {
    let world = World::new();
    world.store.write("/secret/a", "1");
    world.store.set_perms("/secret", &[Permission::new(0, Access::None)]);
    let mut guest = world.guest_with_home(7);
    assert_eq!(errno(guest.read(NONE, "/secret/a")), Errno::EACCES);
    assert_eq!(errno(guest.read(NONE, "/secret/missing")), Errno::EACCES);
    assert_eq!(errno(guest.write(NONE, "/secret/a", "2")), Errno::EACCES);
    assert_eq!(errno(guest.write(NONE, "/secret/new", "2")), Errno::EACCES);
    assert_eq!(errno(guest.rm(NONE, "/secret/a")), Errno::EACCES);
    assert_eq!(errno(guest.directory(NONE, "/")), Errno::EACCES);
    assert_eq!(errno(guest.get_perms(NONE, "/secret")), Errno::EACCES);
    assert_eq!(world.store.read("/secret/a").expect("untouched"), b"1");
}

#[test]
fn read_access_of_a_guest_is_read_access_only() {
    let world = World::new();
    world.store.write("/shared", "1");
    world.store.set_perms("/shared", &[Permission::new(0, Access::None), Permission::new(7, Access::Read)]);
    let (mut guest, mut other) = (world.guest(7), world.guest(8));
    assert_eq!(guest.read(NONE, "/shared").expect("granted"), b"1");
    assert_eq!(errno(guest.write(NONE, "/shared", "2")), Errno::EACCES);
    assert_eq!(errno(guest.set_perms(NONE, "/shared", &[Permission::new(7, Access::None)])), Errno::EACCES);
    assert_eq!(errno(other.read(NONE, "/shared")), Errno::EACCES);
}

#[test]
fn write_access_lets_a_guest_create_its_own_nodes_but_not_change_permissions() {
    let world = World::new();
    let shared = [Permission::new(0, Access::None), Permission::new(7, Access::ReadWrite)];
    world.store.mkdir("/shared");
    world.store.set_perms("/shared", &shared);
    let mut guest = world.guest(7);
    guest.write(NONE, "/shared/x/y", "1").expect("granted");
    let created = [Permission::new(7, Access::None), Permission::new(7, Access::ReadWrite)];
    for path in ["/shared/x", "/shared/x/y"] {
        assert_eq!(world.store.perms(path).expect("there"), created, "{path}");
    }
    assert_eq!(errno(guest.set_perms(NONE, "/shared", &shared)), Errno::EACCES);
}

#[test]
fn a_guest_owns_what_it_creates_and_may_not_give_it_away() {
    let world = World::new();
    let mut guest = world.guest_with_home(7);
    guest.write(NONE, "data/x", "1").expect("at home");
    let owner = |path: &str| world.store.perms(path).expect("there")[0].domid;
    assert_eq!((owner("/local/domain/7/data"), owner("/local/domain/7/data/x")), (7, 7));
    let open = [Permission::new(7, Access::None), Permission::new(0, Access::Read)];
    guest.set_perms(NONE, "data/x", &open).expect("its own node");
    assert_eq!(guest.get_perms(NONE, "data/x").expect("its own node"), open);
    let given = [Permission::new(0, Access::None)];
    assert_eq!(errno(guest.set_perms(NONE, "data/x", &given)), Errno::EPERM);
}

#[test]
fn domain_0_creating_below_a_guests_node_leaves_it_the_guests() {
    let world = World::new();
    let _guest = world.guest_with_home(7);
    let mut dom0 = world.dom0();
    dom0.write(NONE, "/local/domain/7/device/vbd/51712", "1").expect("domain 0 may");
    let perms = dom0.get_perms(NONE, "/local/domain/7/device/vbd").expect("there");
    assert_eq!(perms, [Permission::new(7, Access::None)], "inherited from the home directory");
}

#[test]
fn guests_are_not_told_of_what_they_may_not_read() {
    let world = World::new();
    world.store.write("/hidden/a", "1");
    world.store.write("/shown", "1");
    world.store.set_perms("/shown", &[Permission::new(0, Access::Read)]);
    let mut guest = world.guest(7);
    for path in ["/hidden", "/shown", "@releaseDomain"] {
        guest.watch(path, "t").expect("watching is free");
    }
    events(&mut guest);
    world.store.write("/hidden/a", "2");
    world.store.write("/shown", "2");
    world.store.introduce(9);
    world.store.release(9);
    assert_eq!(events(&mut guest), ["/shown t"]);
    world.store.set_perms("/shown", &[Permission::new(0, Access::None)]);
    assert_eq!(events(&mut guest), ["/shown t"], "losing the right is told as well");
}

#[test]
fn the_coming_and_going_of_domains_is_told_and_takes_their_nodes() {
    let world = World::new();
    let mut dom0 = world.dom0();
    dom0.watch("@introduceDomain", "in").expect("watching");
    dom0.watch("@releaseDomain", "out").expect("watching");
    events(&mut dom0);
    let mut guest = world.guest_with_home(7);
    guest.write(NONE, "device/vbd/51712/state", "1").expect("at home");
    world.store.introduce(7);
    world.store.introduce(7);
    dom0.watch("/local/domain/7/device/vbd/51712/state", "fe").expect("watching");
    assert_eq!(events(&mut dom0), ["@introduceDomain in", "/local/domain/7/device/vbd/51712/state fe"]);
    assert!(world.store.release(7));
    assert!(!world.store.release(7), "once only");
    assert_eq!(events(&mut dom0), ["/local/domain/7/device/vbd/51712/state fe", "@releaseDomain out"]);
    assert!(!world.store.exists("/local/domain/7"));
    assert!(guest.read(NONE, "device").expect_err("its connection is gone").is_disconnected());
}

#[test]
fn quotas_bind_guests_and_only_when_switched_on() {
    let world = World::new();
    let mut guest = world.guest_with_home(7);
    guest.write(NONE, "big", vec![b'x'; 3000]).expect("no quotas yet");
    let quotas = Quotas { nodes: 5, watches: 2, transactions: 1, node_bytes: 100, permissions: 2 };
    world.store.set_quotas(Some(quotas));
    // The home directory and `big` are two already.
    guest.write(NONE, "a/b/c", "1").expect("three more");
    assert_eq!(errno(guest.mkdir(NONE, "d")), Errno::ENOSPC);
    assert_eq!(errno(guest.write(NONE, "a", vec![b'x'; 101])), Errno::ENOSPC);
    let in_transaction = guest.transact(|guest, tx| {
        guest.rm(tx, "big")?;
        guest.mkdir(tx, "d")?;
        guest.mkdir(tx, "e")
    });
    assert_eq!(errno(in_transaction), Errno::ENOSPC);
    let nested: Result<(), Error> = guest.transact(|guest, _| guest.transact(|_, _| Ok(())));
    assert_eq!(errno(nested), Errno::ENOSPC);
    guest.watch("a", "1").expect("one");
    guest.watch("a", "2").expect("two");
    assert_eq!(errno(guest.watch("a", "3")), Errno::E2BIG);
    assert_eq!(errno(guest.set_perms(NONE, "a", &[Permission::new(7, Access::None); 3])), Errno::ENOSPC);
    let mut dom0 = world.dom0();
    dom0.write(NONE, "/x/y/z/1/2/3/4/5/6", vec![b'x'; 3000]).expect("domain 0 is exempt");
}

#[test]
fn an_event_during_a_held_request_is_there_before_the_reply() {
    let world = World::new();
    world.store.write("/a", "1");
    let mut client = world.dom0();
    client.watch("/a", "t").expect("watching");
    events(&mut client);
    world.store.hold_requests();
    thread::scope(|scope| {
        let read = scope.spawn(|| client.read(NONE, "/a").expect("released in the end"));
        assert!(world.store.wait_held(1, SOON));
        world.store.write("/a", "2");
        world.store.release_requests();
        assert_eq!(read.join().expect("no panic"), b"2");
    });
    assert_eq!(client.next_event().map(|event| event.token), Some(b"t".to_vec()));
}

#[test]
fn a_connection_lost_while_a_reply_is_awaited_is_an_error() {
    let world = World::new();
    let mut client = world.dom0();
    world.store.hold_requests();
    thread::scope(|scope| {
        let read = scope.spawn(|| client.read(NONE, "/").expect_err("lost"));
        assert!(world.store.wait_held(1, SOON));
        world.store.drop_connections();
        assert!(read.join().expect("no panic").is_disconnected());
    });
    assert!(client.watch("/a", "t").expect_err("gone").is_disconnected());
    world.store.release_requests();
    world.dom0().read(NONE, "/").expect("a new connection works");
}

#[test]
fn h53_after_a_restart_a_new_connection_finds_the_tree_as_asked() {
    let world = World::new();
    world.store.write("/a", "1");
    let mut client = world.dom0();
    world.store.stop();
    assert!(client.poll_events().expect_err("gone").is_disconnected());
    assert!(matches!(Client::connect_to(&world.store.socket()), Err(Error::Connect { .. })));
    world.store.resume(TreeAfter::Kept);
    assert_eq!(world.dom0().read(NONE, "/a").expect("kept"), b"1");
    world.store.restart(TreeAfter::Fresh);
    let mut client = world.dom0();
    assert_eq!(errno(client.read(NONE, "/a")), Errno::ENOENT);
    assert_eq!(client.read(NONE, "domid").expect("as after a boot"), b"0");
}

#[test]
fn the_nth_write_of_a_client_fails_once() {
    let world = World::new();
    let mut client = world.dom0();
    world.store.fail_write(2, Errno::EIO);
    world.store.write("/direct", "not counted");
    client.write(NONE, "/a", "1").expect("the first");
    assert_eq!(errno(client.write(NONE, "/a", "2")), Errno::EIO);
    client.write(NONE, "/a", "3").expect("the third");
    assert_eq!(world.store.read("/a").expect("there"), b"3");
}

#[test]
fn waiting_for_a_value_ends_when_a_client_writes_it() {
    let world = World::new();
    let mut client = world.dom0();
    thread::scope(|scope| {
        scope.spawn(|| client.write(NONE, "/a", "4").expect("written"));
        assert!(world.store.wait_for("/a", SOON, |value| value == Some(b"4")));
    });
    assert!(!world.store.wait_for("/a", Duration::ZERO, |value| value.is_none()));
}

#[test]
fn several_values_written_at_once_come_as_one_step() {
    let world = World::new();
    let mut client = world.dom0();
    client.watch("/b", "t").expect("watching");
    events(&mut client);
    world.store.write_all(&[("/b/online", "0"), ("/b/state", "5")]);
    assert_eq!(events(&mut client), ["/b/online t", "/b/state t"]);
}

mod model;
mod raw;
