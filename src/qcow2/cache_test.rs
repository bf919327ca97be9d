use super::*;

fn page(byte: u8) -> Arc<[u8]> {
    vec![byte; 512].into()
}

#[test]
fn clean_pages_go_and_dirty_pages_stay() {
    let mut cache = Cache::new(8);
    cache.insert(0, page(0));
    cache.get_mut(0).unwrap()[0] = 7;
    for i in 1..100 {
        cache.insert(i * 512, page(i as u8));
    }
    assert!(cache.slots.len() <= 8);
    assert_eq!(cache.get(0).unwrap()[0], 7);
    assert_eq!(cache.get(99 * 512).unwrap()[0], 99);
    assert!(!cache.has(512));
}

#[test]
fn a_page_in_use_stays_longer_than_one_that_is_not() {
    let mut cache = Cache::new(8);
    for i in 0..200u64 {
        cache.insert(512 + i * 512, page(1));
        if i == 0 {
            cache.insert(0, page(9));
        }
        assert!(cache.get(0).is_some(), "round {i}");
    }
}

#[test]
fn what_changes_during_a_checkpoint_stays_dirty() {
    let mut cache = Cache::new(8);
    for i in 0..3 {
        cache.insert(i * 512, page(0));
        cache.get_mut(i * 512).unwrap()[0] = 1;
    }
    let taken = cache.snapshot();
    assert_eq!(taken.len(), 3);
    cache.get_mut(512).unwrap()[0] = 2;
    assert_eq!(taken[1].1[0], 1, "what is being written does not change");
    cache.written(&taken);
    assert_eq!(cache.dirty(), 1);
    let again = cache.snapshot();
    assert_eq!((again[0].0, again[0].1[0]), (512, 2));
    cache.forget(0..1536, 512);
    assert_eq!((cache.dirty(), cache.bytes()), (0, 0));
    cache.written(&again);
}

#[test]
fn trim_gives_up_what_was_not_used() {
    let mut cache = Cache::new(64);
    (0..10).for_each(|i| cache.insert(i * 512, page(0)));
    cache.get_mut(0);
    cache.trim();
    assert_eq!(cache.bytes(), 10 * 512, "all were used since");
    cache.get(512);
    cache.trim();
    assert_eq!(cache.bytes(), 2 * 512, "one is dirty, one was used");
}
