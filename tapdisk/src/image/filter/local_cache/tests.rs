use std::rc::Rc;

use tap_ctl::proto::{ImageType, OpenParams};

use super::*;
use crate::image::tests::{make, params, read, run, snapshot, write};
use crate::image::{Disk, open};
use crate::sync::both;

fn cache(disk: &Disk) -> &LocalCache {
    disk.filters.as_ref().unwrap().local.as_ref().unwrap()
}

/// Lets others go on until the cache has nothing left to do.
async fn settled(disk: &Disk) {
    while !cache(disk).waiting.borrow().is_empty() || !cache(disk).locks.is_idle() {
        // A turn of the reactor.
        let _ = disk.flush().await;
    }
}

/// A child of a VHD with 7s in its first 2 MiB, and a task beside its work.
fn with_child<F: Future<Output = ()> + 'static>(test: impl FnOnce(Rc<Disk>, Io) -> F + 'static) {
    let dir = tempfile::tempdir().unwrap();
    let (base, child) = (dir.path().join("base"), dir.path().join("child"));
    make(&base, 8);
    snapshot(&child, &base);
    run(move |io| async move {
        let parent = open(&params(ImageType::Vhd, &base, false), &io).unwrap();
        for sector in (0..4096).step_by(64) {
            write(&parent, &io, sector, &[7; 64 * 512]).await.unwrap();
        }
        parent.close().await.unwrap();
        drop(parent);
        let params = OpenParams { local_cache: true, ..params(ImageType::Vhd, &child, false) };
        let disk = Rc::new(open(&params, &io).unwrap());
        let work = disk.background().unwrap();
        both(work, test(disk, io)).await;
        drop(dir);
    });
}

#[test]
fn what_was_read_from_a_parent_is_in_the_leaf_afterwards_and_zeros_are_not() {
    with_child(|disk, io| async move {
        assert_eq!(read(&disk, &io, 8, 16).await, [7; 16 * 512]);
        assert_eq!(read(&disk, &io, 8192, 16).await, [0; 16 * 512]);
        settled(&disk).await;
        let extent = disk.chain.leaf.map(&io, Sector(8), 16).await.unwrap();
        assert!(matches!(extent, Extent::Data { count: 16, .. }), "{extent:?}");
        let extent = disk.chain.leaf.map(&io, Sector(8192), 16).await.unwrap();
        assert_eq!(extent, Extent::Parent { count: 16 });
        assert!(disk.stats().local_cache.unwrap().kept >= 16);
        disk.close().await.unwrap();
    });
}

#[test]
fn what_a_guest_wrote_meanwhile_stays() {
    with_child(|disk, io| async move {
        let mut random = format::testing::Random::new(3);
        let mut model = vec![7_u8; 4096];
        for round in 0..300 {
            let (sector, sectors) = (random.below(4000), 1 + random.below(90));
            let byte = u8::try_from(round % 200).unwrap() + 20;
            if random.once_in(2) {
                write(&disk, &io, sector as u64, &vec![byte; sectors * 512]).await.unwrap();
                model[sector..sector + sectors].fill(byte);
            } else {
                let seen = read(&disk, &io, sector as u64, sectors).await;
                let (seen, _) = seen.as_chunks::<512>();
                assert!(seen.iter().zip(&model[sector..]).all(|(seen, &byte)| *seen == [byte; 512]));
            }
        }
        settled(&disk).await;
        for (sector, &byte) in model.iter().enumerate() {
            assert_eq!(read(&disk, &io, sector as u64, 1).await, [byte; 512], "sector {sector}");
        }
        assert!(disk.stats().local_cache.unwrap().kept > 0);
        disk.close().await.unwrap();
    });
}

#[test]
fn without_room_nothing_is_kept_and_a_leaf_that_cannot_be_written_ends_it() {
    with_child(|disk, io| async move {
        cache(&disk).room.set(Some((Instant::now() + Duration::from_secs(60), false)));
        assert_eq!(read(&disk, &io, 8, 16).await, [7; 16 * 512]);
        settled(&disk).await;
        let stats = disk.stats().local_cache.unwrap();
        assert!(stats.kept == 0 && stats.left_out >= 16, "{stats:?}");
        cache(&disk).room.set(None);
        disk.chain.leaf.file().unwrap().make_readonly().unwrap();
        assert_eq!(read(&disk, &io, 8, 16).await, [7; 16 * 512]);
        settled(&disk).await;
        assert!(disk.stats().local_cache.unwrap().failed.is_some());
        assert_eq!(read(&disk, &io, 8, 16).await, [7; 16 * 512]);
        cache(&disk).stop().await;
    });
}
