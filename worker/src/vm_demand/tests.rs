use super::*;

const NOW: Mono = Mono(100_000_000);

fn image(name: &str) -> ImageRef {
    ImageRef(name.into())
}

fn wish(floors: &[(&str, usize)]) -> Wish {
    let floors = floors.iter().map(|(name, count)| (image(name), *count)).collect();
    Wish { slots: 2, image: image("own"), floors }
}

fn shown(demand: &Demand, wish: &Wish, now: Mono) -> Vec<(String, usize, u64)> {
    demand.shares(wish, now).into_iter().map(|share| (share.image.0, share.floor, share.heat)).collect()
}

#[test]
fn requests_fade_by_half_and_then_count_no_more() {
    assert_eq!([0, HALF_LIFE_MS / 2, HALF_LIFE_MS, 2 * HALF_LIFE_MS].map(heat), [1_000, 750, 500, 250]);
    assert_eq!([20 * HALF_LIFE_MS, u64::MAX].map(heat), [0, 0]);
    let mut last = heat(0);
    for age in (0..4 * HALF_LIFE_MS).step_by(1_000) {
        assert!(heat(age) <= last, "{age}");
        last = heat(age);
    }
}

#[test]
fn shares_are_the_own_image_the_floors_and_what_was_asked_for() {
    let mut demand = Demand::default();
    for name in ["b", "own", "c", "b"] {
        demand.asked(&image(name), name == "b", NOW);
    }
    let row = |name: &str, floor, heat| (name.to_owned(), floor, heat);
    let wish = wish(&[("d", 1), ("own", 2)]);
    let expected = [row("own", 2, OWN + 1_000), row("d", 1, 0), row("b", 0, 2_000), row("c", 0, 1_000)];
    assert_eq!(shown(&demand, &wish, NOW), expected);
    demand.forget(&image("b"));
    demand.rename(&image("c"), &image("own"));
    assert_eq!(shown(&demand, &wish, NOW), [row("own", 2, OWN + 2_000), row("d", 1, 0)]);
    assert_eq!(shown(&demand, &wish, NOW + 30 * HALF_LIFE_MS), [row("own", 2, OWN), row("d", 1, 0)]);
    for _ in 0..2 * DEMAND_MAX {
        demand.asked(&image("e"), true, NOW);
    }
    assert_eq!(demand.0.len(), DEMAND_MAX);
}

#[test]
fn a_request_that_named_its_image_stays_with_it() {
    let mut demand = Demand::default();
    for named in [true, false, true] {
        demand.asked(&image("old"), named, NOW);
    }
    demand.rename(&image("old"), &image("own"));
    let row = |name: &str, heat| (name.to_owned(), 0, heat);
    assert_eq!(shown(&demand, &wish(&[]), NOW), [row("own", OWN + 1_000), row("old", 2_000)]);
}
