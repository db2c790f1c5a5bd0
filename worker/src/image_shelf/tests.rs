use alloy_shared::limits::Limits;

use super::*;
use crate::image_plan::Book;
use crate::provider::Image;

const NOW: Mono = Mono(1_000_000);

fn digest(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

fn image(name: &str) -> Image {
    Image { digest: digest(name), names: vec![named(name)], size_bytes: 10, removable: true }
}

fn named(name: &str) -> ImageRef {
    ImageRef(name.into())
}

/// Room for nothing beside the worker's own image.
fn having(names: &[&str]) -> Shelf {
    let mut images = Images::new(&[named("r/own:1")], Some(10), true, Limits::default(), Book::default());
    images.found(names.iter().map(|name| image(name)).collect(), Ms(0));
    Shelf::new(images)
}

/// Whatever keeps it.
enum Holder {
    Use(#[expect(dead_code, reason = "kept alive")] Use),
    Want(#[expect(dead_code, reason = "kept alive")] Want),
}

#[test]
fn who_uses_it_first_keeps_it() {
    let ways: [fn(&mut Shelf) -> Holder; 3] = [
        |shelf| Holder::Want(shelf.want(&named("r/x:1"))),
        |shelf| Holder::Use(shelf.hold_named(&named("r/x:1")).unwrap()),
        |shelf| Holder::Use(shelf.hold_seen(digest("r/x:1"), shelf.images.removals(), Ms(1)).unwrap()),
    ];
    for (case, way) in ways.iter().enumerate() {
        let mut shelf = having(&["r/own:1", "r/x:1"]);
        let holder = way(&mut shelf);
        assert!(matches!(shelf.next(NOW), Next::Wait(Some(_))), "case {case}");
        drop(holder);
        assert_eq!(shelf.next(NOW), Next::Remove(digest("r/x:1")), "case {case}");
    }
}

#[test]
fn who_comes_after_its_removal_began_must_look_again() {
    let mut shelf = having(&["r/own:1", "r/x:1"]);
    let before = shelf.images.removals();
    assert_eq!(shelf.next(NOW), Next::Remove(digest("r/x:1")));
    let during = shelf.images.removals();
    for seen in [before, during] {
        assert!(shelf.hold_seen(digest("r/x:1"), seen, Ms(1)).is_none(), "it is being removed");
    }
    assert!(shelf.hold_named(&named("r/x:1")).is_none() && !shelf.images.has(&named("r/x:1")));
    shelf.images.removed(true, NOW, 0);
    for seen in [before, during] {
        assert!(shelf.hold_seen(digest("r/x:1"), seen, Ms(1)).is_none(), "it was seen before it was gone");
    }
    assert!(shelf.hold_named(&named("r/x:1")).is_none(), "although nobody has looked at the disk since");
    // Somebody brought it again, and it was seen after that.
    shelf.images.found(vec![image("r/own:1"), image("r/x:1")], Ms(1));
    assert!(shelf.hold_seen(digest("r/x:1"), shelf.images.removals(), Ms(1)).is_some());
}

#[test]
fn what_was_brought_for_somebody_is_his_before_it_could_go() {
    let mut shelf = having(&["r/own:1"]);
    shelf.images.ask(&named("r/x:1"), NOW).unwrap();
    assert_eq!(shelf.next(NOW), Next::Pull(named("r/x:1")));
    shelf.images.pulled(&Ok(digest("r/x:1")), NOW, Ms(1), 0);
    shelf.images.found(vec![image("r/own:1"), image("r/x:1")], Ms(1));
    shelf.images.unask(&named("r/x:1"));
    let used = shelf.hold_named(&named("r/x:1"));
    assert!(used.is_some() && matches!(shelf.next(NOW), Next::Wait(Some(_))));
    drop(used);
    assert_eq!(shelf.next(NOW), Next::Remove(digest("r/x:1")));
}

/// A small generator; the seed is in every failure.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

#[test]
fn in_no_order_of_things_is_an_image_used_and_removed() {
    const NAMES: [&str; 4] = ["r/own:1", "r/a:1", "r/b:1", "r/c:1"];
    for seed in 0..200 {
        let mut dice = Dice(seed);
        let mut shelf = having(&NAMES);
        let mut disk: BTreeSet<&str> = NAMES.into();
        let mut users: Vec<(&str, Use)> = Vec::new();
        let mut wants: Vec<(&str, Want)> = Vec::new();
        // Who looked at the disk and did not come to use what it saw yet.
        let mut looks: Vec<(&str, u64)> = Vec::new();
        let mut leaving = None;
        for _ in 0..300 {
            let name = NAMES[dice.below(4) as usize];
            match dice.below(8) {
                0 => wants.push((name, shelf.want(&named(name)))),
                1 if disk.contains(name) => looks.push((name, shelf.images.removals())),
                2 if !looks.is_empty() => {
                    let (name, seen) = looks.swap_remove(dice.below(looks.len() as u64) as usize);
                    users.extend(shelf.hold_seen(digest(name), seen, Ms(1)).map(|used| (name, used)));
                }
                3 => users.extend(shelf.hold_named(&named(name)).map(|used| (name, used))),
                4 if !users.is_empty() => _ = users.swap_remove(dice.below(users.len() as u64) as usize),
                5 if !wants.is_empty() => _ = wants.swap_remove(dice.below(wants.len() as u64) as usize),
                6 if leaving.is_none() => match shelf.next(NOW) {
                    Next::Remove(gone) => {
                        leaving = NAMES.into_iter().find(|name| digest(name) == gone);
                        let wanted = wants.iter().any(|(name, _)| Some(*name) == leaving);
                        assert!(!wanted, "seed {seed}: {leaving:?} was wanted");
                    }
                    Next::Pull(brought) => {
                        shelf.images.pulled(&Ok(digest(&brought.0)), NOW, Ms(1), 0);
                        disk.extend(NAMES.into_iter().filter(|name| *name == brought.0));
                        shelf.images.found(disk.iter().map(|name| image(name)).collect(), Ms(1));
                    }
                    Next::BreakOff | Next::Untag(_) | Next::Wait(_) => {}
                },
                7 => {
                    if let Some(gone) = leaving.take() {
                        disk.remove(gone);
                        shelf.images.removed(true, NOW, 0);
                    } else {
                        // Somebody else brings one.
                        disk.insert(name);
                        shelf.images.found(disk.iter().map(|name| image(name)).collect(), Ms(1));
                    }
                }
                _ => {}
            }
            let lost = users.iter().find(|(name, _)| Some(*name) == leaving || !disk.contains(name));
            assert!(lost.is_none(), "seed {seed}: {} is used and goes", lost.unwrap().0);
        }
    }
}
