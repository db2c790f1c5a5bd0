use super::*;

const NOW: Mono = Mono(1_000_000);

fn digest(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

fn image(name: &str, gigabytes: u64) -> Image {
    let names = vec![ImageRef(name.into())];
    Image { digest: digest(name), names, size_bytes: gigabytes << 30, removable: true }
}

fn named(name: &str) -> ImageRef {
    ImageRef(name.into())
}

fn wish(name: &str, want: ImageWant, pinned: bool, generation: i64) -> ImageWish {
    ImageWish { name: name.into(), want, pinned, generation }
}

fn store(budget_gib: Option<u64>) -> Images {
    let budget = budget_gib.map(|gib| gib << 30);
    Images::new(&[named("r/own:1")], budget, true, Limits::default(), Book::default())
}

/// A store that has these, used in this order.
fn having(budget_gib: Option<u64>, names: &[&str]) -> Images {
    let mut images = store(budget_gib);
    let all = names.iter().map(|name| image(name, 10)).collect();
    images.found(all, Ms(0));
    for (at, name) in names.iter().enumerate() {
        assert!(images.used(digest(name), 0, Ms(at as i64 + 1)));
    }
    images.uses(BTreeSet::new(), BTreeSet::new());
    images
}

fn farm_fault(what: VmFault) -> VmError {
    VmError::farm(what, "503")
}

#[test]
fn its_own_image_is_brought_unasked_and_then_the_wishes_in_their_order() {
    let mut images = store(None);
    images.wish(vec![wish("r/b:1", ImageWant::Present, false, 5), wish("r/a:1", ImageWant::Present, false, 7)]);
    for name in ["r/own:1", "r/b:1", "r/a:1"] {
        assert_eq!(images.next(NOW), Next::Pull(named(name)));
        assert_eq!(images.next(NOW), Next::Wait(None), "one at a time");
        images.pulled(&Ok(digest(name)), NOW, Ms(1), 0);
        let known = images.cached.clone().into_iter().chain([image(name, 1)]).collect();
        images.found(known, Ms(1));
    }
    assert_eq!(images.next(NOW), Next::Wait(None));
    assert_eq!(images.book().done, [("r/a:1".to_owned(), 7), ("r/b:1".to_owned(), 5)].into());
    // A newer wish asks the registry again, although the image is here.
    images.wish(vec![wish("r/b:1", ImageWant::Present, false, 9)]);
    assert_eq!(images.next(NOW), Next::Pull(named("r/b:1")));
}

#[test]
fn what_a_job_waits_for_comes_before_the_wishes() {
    let mut images = having(None, &["r/own:1"]);
    images.wish(vec![wish("r/a:1", ImageWant::Present, false, 5)]);
    images.ask(&named("r/job"), NOW).unwrap();
    assert_eq!(images.next(NOW), Next::Pull(named("r/job:latest")));
    let shown: Vec<_> = images.view(NOW).into_iter().map(|r| (r.name, r.waiting, r.pulling.is_some())).collect();
    let row = |name: &str, waiting, pulling| (name.to_owned(), waiting, pulling);
    assert_eq!(shown, [row("r/a:1", true, false), row("r/job:latest", false, true), row("r/own:1", false, false)]);
}

#[test]
fn a_refusal_is_believed_for_a_while_and_other_failures_back_off() {
    let limits = Limits::default();
    let mut images = having(None, &["r/own:1"]);
    let refusal = VmError::policy(VmFault::NoImage, "404".repeat(TROUBLE_MAX));
    images.ask(&named("r/no:1"), NOW).unwrap();
    assert_eq!(images.next(NOW), Next::Pull(named("r/no:1")));
    images.pulled(&Err(refusal.clone()), NOW, Ms(1), 0);
    images.unask(&named("r/no:1"));
    assert_eq!(images.ask(&named("r/no:1"), NOW), Err(refusal));
    let told = |images: &Images, now| images.view(now).into_iter().find(|r| r.name == "r/no:1").and_then(|r| r.failed);
    assert_eq!(
        told(&images, NOW),
        Some(PullFailed { message: "404".repeat(TROUBLE_MAX)[..TROUBLE_MAX].into(), refused: true })
    );
    let over = NOW + limits.pull_refused_ms;
    assert_eq!(images.next(NOW), Next::Wait(Some(over)), "the farm is told when it is over");
    assert_eq!((told(&images, over), images.ask(&named("r/no:1"), over)), (None, Ok(())));
    images.unask(&named("r/no:1"));

    images.wish(vec![wish("r/a:1", ImageWant::Present, false, 5)]);
    let mut now = over;
    for pause in [10_000, 20_000, 40_000, 80_000, 160_000, 320_000, 600_000, 600_000] {
        assert_eq!(images.next(now), Next::Pull(named("r/a:1")));
        images.pulled(&Err(farm_fault(VmFault::Pull)), now, Ms(1), 0);
        assert!(matches!(images.next(now + (pause - 1)), Next::Wait(_)));
        now = now + pause;
    }
    // Whoever wishes anew does not wait for the end of a pause.
    images.next(now);
    images.pulled(&Err(farm_fault(VmFault::Pull)), now, Ms(1), 0);
    images.wish(vec![wish("r/a:1", ImageWant::Present, false, 6)]);
    assert_eq!(images.next(now), Next::Pull(named("r/a:1")));
}

#[test]
fn the_least_recently_used_goes_when_the_budget_is_exceeded() {
    let mut images = having(Some(25), &["r/own:1", "r/old:1", "r/new:1"]);
    assert_eq!(images.next(NOW), Next::Remove(digest("r/old:1")));
    assert!(!images.used(digest("r/old:1"), 1, Ms(9)), "whoever comes now must bring it again");
    images.removed(true, NOW, 0);
    images.found(vec![image("r/own:1", 10), image("r/new:1", 10)], Ms(9));
    assert_eq!(images.next(NOW), Next::Wait(None));
}

#[test]
fn nothing_that_is_needed_is_ever_evicted() {
    let keep: [fn(&mut Images); 6] = [
        |images| images.wish(vec![wish("r/x:1", ImageWant::None, true, 1)]),
        |images| {
            images.book.done.insert("r/x:1".into(), 1);
            images.wish(vec![wish("r/x:1", ImageWant::Present, false, 1)]);
        },
        |images| images.uses([digest("r/x:1")].into(), BTreeSet::new()),
        |images| images.uses(BTreeSet::new(), ["r/x:1".to_owned()].into()),
        |images| images.ask(&named("r/x:1"), NOW).unwrap(),
        |images| images.cached[1].removable = false,
    ];
    for (case, keep) in keep.iter().enumerate() {
        let mut images = having(Some(5), &["r/own:1", "r/x:1"]);
        keep(&mut images);
        assert!(matches!(images.next(NOW), Next::Wait(_)), "case {case}");
    }
    let mut images = having(Some(5), &["r/own:1", "r/x:1"]);
    assert_eq!(images.next(NOW), Next::Remove(digest("r/x:1")), "without a reason it goes");
}

#[test]
fn a_full_disk_costs_the_oldest_image_or_is_told_plainly() {
    let mut images = having(None, &["r/own:1", "r/old:1"]);
    images.ask(&named("r/big:1"), NOW).unwrap();
    images.next(NOW);
    images.pulled(&Err(farm_fault(VmFault::Disk)), NOW, Ms(1), 0);
    assert_eq!(images.next(NOW), Next::Remove(digest("r/old:1")));
    images.removed(true, NOW, 0);
    images.found(vec![image("r/own:1", 10)], Ms(1));
    assert_eq!(images.next(NOW), Next::Pull(named("r/big:1")), "at once");
    images.pulled(&Err(farm_fault(VmFault::Disk)), NOW, Ms(1), 0);
    images.unask(&named("r/big:1"));
    let error = images.ask(&named("r/big:1"), NOW).unwrap_err();
    assert_eq!(error.what, VmFault::Disk);
    assert!(error.tail.contains("no room for r/big:1: all 1 images here") && error.tail.contains("503"), "{error}");
}

#[test]
fn an_image_is_removed_once_when_nobody_uses_it() {
    let mut images = having(None, &["r/own:1", "r/x:1"]);
    images.uses([digest("r/x:1")].into(), BTreeSet::new());
    images.wish(vec![wish("r/x:1", ImageWant::Absent, false, 4), wish("r/never:1", ImageWant::Absent, false, 5)]);
    assert_eq!(images.next(NOW), Next::Wait(Some(NOW + IN_USE_LOOK_MS)));
    images.uses(BTreeSet::new(), BTreeSet::new());
    assert_eq!(images.next(NOW), Next::Remove(digest("r/x:1")));
    images.removed(true, NOW, 0);
    images.found(vec![image("r/own:1", 10)], Ms(1));
    assert_eq!(images.next(NOW), Next::Wait(None));
    assert_eq!(images.book().done, [("r/x:1".to_owned(), 4), ("r/never:1".to_owned(), 5)].into());
    let told = images.view(NOW).into_iter().find(|report| report.name == "r/x:1").unwrap();
    assert_eq!((told.digest, told.generation), (None, 4), "whoever asked for it sees that it is done");
    // A job brings it again, and it stays.
    images.found(vec![image("r/own:1", 10), image("r/x:1", 10)], Ms(2));
    assert_eq!(images.next(NOW), Next::Wait(None));
}

#[test]
fn a_wish_to_remove_waits_for_the_pull_that_runs() {
    let mut images = having(None, &["r/own:1", "r/x:1"]);
    images.wish(vec![wish("r/y:1", ImageWant::Present, false, 3)]);
    assert_eq!(images.next(NOW), Next::Pull(named("r/y:1")));
    let wishes = vec![wish("r/y:1", ImageWant::Present, false, 3), wish("r/x:1", ImageWant::Absent, false, 4)];
    images.wish(wishes);
    assert_eq!(images.next(NOW), Next::Wait(None));
    images.pulled(&Ok(digest("r/y:1")), NOW, Ms(1), 0);
    assert_eq!(images.next(NOW), Next::Remove(digest("r/x:1")));
}

#[test]
fn a_host_without_images_of_its_own_brings_and_removes_nothing() {
    let mut images = Images::new(&[named("host")], Some(1), false, Limits::default(), Book::default());
    images.wish(vec![wish("r/a:1", ImageWant::Present, false, 5), wish("host", ImageWant::Absent, false, 6)]);
    images.found(vec![Image { names: vec![named("host")], removable: false, ..image("host", 9) }], Ms(1));
    assert_eq!(images.next(NOW), Next::Wait(None));
    assert!(images.has(&named("host")));
    assert_eq!(images.ask(&named("r/a:1"), NOW).unwrap_err().what, VmFault::NoImage);
}

#[test]
fn a_pull_that_nobody_wants_any_more_is_broken_off_once_and_counts_as_no_failure() {
    let broken = Err(farm_fault(VmFault::Pull));
    let mut images = having(None, &["r/own:1"]);
    for image in ["r/job", "r/next"] {
        images.ask(&named(image), NOW).unwrap();
    }
    assert_eq!(images.next(NOW), Next::Pull(named("r/job:latest")));
    assert_eq!(images.next(NOW), Next::Wait(None), "somebody waits");
    images.unask(&named("r/job"));
    assert_eq!(images.next(NOW), Next::BreakOff);
    assert_eq!(images.next(NOW), Next::Wait(None), "it is ending");
    images.pulled(&broken, NOW, Ms(1), 0);
    assert_eq!(images.next(NOW), Next::Pull(named("r/next:latest")));
    images.pulled(&Ok(digest("r/next:latest")), NOW, Ms(1), 0);
    images.unask(&named("r/next"));
    images.ask(&named("r/job"), NOW).unwrap();
    assert_eq!(images.next(NOW), Next::Pull(named("r/job:latest")), "it did not fail");

    // The farm's wish carries it on, and its end ends it.
    images.wish(vec![wish("r/job:latest", ImageWant::Present, false, 5)]);
    images.unask(&named("r/job"));
    assert_eq!(images.next(NOW), Next::Wait(None));
    images.wish(vec![]);
    assert_eq!(images.next(NOW), Next::BreakOff);
    images.pulled(&broken, NOW, Ms(1), 0);

    let mut images = store(None);
    assert_eq!(images.next(NOW), Next::Pull(named("r/own:1")));
    assert_eq!(images.next(NOW), Next::Wait(None), "idle slots always want it");
}

#[test]
fn of_several_tags_one_goes_alone_and_the_image_with_the_last() {
    let mut images = having(None, &["r/own:1"]);
    let tags = |names: &[&str]| Image {
        names: names.iter().chain(&["r/a@sha256:1"]).map(|name| named(name)).collect(),
        ..image("r/a", 10)
    };
    let absent = |name| wish(name, ImageWant::Absent, false, 4);
    let own = image("r/own:1", 10);
    images.found(vec![own.clone(), tags(&["r/a:1", "r/a:2", "r/a:3"])], Ms(9));
    images.uses([digest("r/a")].into(), BTreeSet::new());
    images.wish(vec![absent("r/a:1"), absent("r/a:2"), wish("r/a:3", ImageWant::Present, true, 1)]);
    assert_eq!(images.next(NOW), Next::Untag(named("r/a:1")), "whatever the image is used for");
    assert_eq!(images.next(NOW), Next::Wait(None));
    images.removed(true, NOW, 0);
    images.found(vec![own.clone(), tags(&["r/a:2", "r/a:3"])], Ms(9));
    images.ask(&named("r/a:2"), NOW).unwrap();
    assert!(!matches!(images.next(NOW), Next::Untag(_) | Next::Remove(_)), "somebody waits for it");
    images.pulled(&Ok(digest("r/a")), NOW, Ms(9), 0);
    images.unask(&named("r/a:2"));
    assert_eq!(images.next(NOW), Next::Untag(named("r/a:2")));
    images.removed(true, NOW, 0);

    images.uses(BTreeSet::new(), BTreeSet::new());
    images.found(vec![own, tags(&["r/a:3"])], Ms(9));
    images.wish(vec![absent("r/a:3")]);
    assert_eq!(images.next(NOW), Next::Remove(digest("r/a")));
}

#[test]
fn what_will_not_go_is_tried_again_after_pauses_that_grow_and_holds_up_nothing_else() {
    let stuck = || {
        let mut images = having(None, &["r/own:1", "r/a:1", "r/b:1"]);
        images.wish(vec![wish("r/a:1", ImageWant::Absent, false, 4), wish("r/b:1", ImageWant::Absent, false, 4)]);
        images
    };
    let mut images = stuck();
    assert_eq!(images.next(NOW), Next::Remove(digest("r/a:1")));
    images.removed(false, NOW, 0);
    assert_eq!(images.next(NOW), Next::Remove(digest("r/b:1")), "the other one does not wait");
    images.removed(true, NOW, 0);
    let (mut now, mut last) = (NOW, 0);
    for _ in 0..4 {
        // Every look at the disk finds it again.
        images.found(vec![image("r/own:1", 10), image("r/a:1", 10)], Ms(9));
        let Next::Wait(Some(wake)) = images.next(now) else { panic!("it was tried again without a pause") };
        assert!(wake > now);
        let pause = images.stuck[&digest("r/a:1").to_string()].until.since(now);
        assert!(matches!(images.next(now + (pause - 1)), Next::Wait(_)));
        assert!(pause >= STUCK_PAUSE_MS && pause >= last, "{pause} after {last}");
        (now, last) = (now + pause, pause);
        assert_eq!(images.next(now), Next::Remove(digest("r/a:1")));
        // Dice that show the whole of each pause.
        images.removed(false, now, (STUCK_PAUSE_MS << 4) - 1);
    }
    images.removed(true, now, 0);

    let mut images = stuck();
    images.budget = Some(1);
    assert_eq!(images.next(NOW), Next::Remove(digest("r/a:1")));
    images.removed(false, NOW, 0);
    images.wish(vec![]);
    assert_eq!(images.next(NOW), Next::Remove(digest("r/b:1")), "another one makes room");
}

#[test]
fn a_tag_that_will_not_go_is_tried_again_after_a_pause() {
    let mut images = having(None, &["r/own:1"]);
    let names = ["r/a:1", "r/a:2"].map(named).to_vec();
    images.found(vec![image("r/own:1", 10), Image { names, ..image("r/a", 10) }], Ms(9));
    images.wish(vec![wish("r/a:1", ImageWant::Absent, false, 4)]);
    assert_eq!(images.next(NOW), Next::Untag(named("r/a:1")));
    images.removed(false, NOW, 0);
    assert!(matches!(images.next(NOW), Next::Wait(Some(_))));
    assert_eq!(images.next(NOW + STUCK_PAUSE_MS), Next::Untag(named("r/a:1")));
}

#[test]
fn a_use_a_moment_later_is_not_worth_a_write_and_everything_else_is() {
    let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
    let kept = Book { done: [("x".into(), 1)].into(), used_at: [(a, Ms(1_000))].into() };
    let used =
        |at: &[(Digest, i64)]| Book { used_at: at.iter().map(|(d, at)| (*d, Ms(*at))).collect(), ..kept.clone() };
    for (book, news) in [
        (kept.clone(), false),
        (used(&[(a, 60_999)]), false),
        (used(&[(a, 61_000)]), true),
        (used(&[(a, 1_000), (b, 1_000)]), true),
        (used(&[(b, 1_000)]), true),
        (used(&[]), true),
        (Book { done: [("x".into(), 2)].into(), ..kept.clone() }, true),
    ] {
        assert_eq!(book.is_news_after(&kept), news, "{book:?}");
    }
}

#[test]
fn a_worker_that_brings_no_images_has_no_part_in_wishes() {
    let mut images = Images::new(&[named("host")], None, false, Limits::default(), Book::default());
    for (want, generation) in [(ImageWant::Present, 5), (ImageWant::Absent, 6)] {
        images.wish(vec![wish("r/a:1", want, true, generation)]);
        assert_eq!((images.view(NOW), images.next(NOW)), (vec![], Next::Wait(None)), "{want:?}");
    }
}
