//! D: which waiting job gets which free slot, and why a job waits.

use std::collections::BTreeMap;
use std::sync::Arc;

use alloy_shared::id::{JobId, Labels, OrgId, WorkerId};
use alloy_shared::wire::image::{Inventory, PullFailed, canonical};
use alloy_shared::wire::network;

/// What a connected worker has to offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    pub org: OrgId,
    pub name: String,
    pub labels: Labels,
    pub draining: bool,
    pub slots: u32,
    pub free: u32,
    /// Sorted by name.
    pub images: Arc<Inventory>,
    /// Images of its warm VMs.
    pub warm: Vec<String>,
}

/// What a worker's part in a job's image is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stance<'a> {
    /// A VM of it waits.
    Warm,
    Here,
    /// It would have to be brought, or nothing is known.
    Can,
    /// It did not come; the worker tries again later.
    Later(&'a PullFailed),
    /// The registry does not have it, or not for this worker.
    Refused(&'a PullFailed),
    /// The worker brings no images.
    Bare,
}

impl Stance<'_> {
    /// How good a place it is; absent: none.
    fn rank(&self) -> Option<u32> {
        match self {
            Self::Warm => Some(2),
            Self::Here => Some(1),
            Self::Can => Some(0),
            Self::Later(_) | Self::Refused(_) | Self::Bare => None,
        }
    }
}

impl Room {
    /// A worker is there for its own organisation's jobs only: it sees their sources and their secrets.
    fn serves(&self, org: OrgId, required: &Labels) -> bool {
        self.org == org && self.labels.matches(required)
    }

    fn stance(&self, image: Option<&str>) -> Stance<'_> {
        let name = image.map_or_else(|| self.images.own.clone(), canonical);
        if self.warm.contains(&name) {
            return Stance::Warm;
        }
        let found = self.images.images.binary_search_by(|report| report.name.as_str().cmp(&name));
        let report = found.ok().map(|at| &self.images.images[at]);
        if report.is_some_and(|report| report.digest.is_some()) {
            return Stance::Here;
        }
        if self.images.is_bare() && name != self.images.own {
            return Stance::Bare;
        }
        match report.and_then(|report| report.failed.as_ref()) {
            Some(failed) if failed.refused => Stance::Refused(failed),
            Some(failed) => Stance::Later(failed),
            None => Stance::Can,
        }
    }

    /// A job that names an image waits until the worker has said what it has: it may be one that brings none.
    fn knows(&self, image: Option<&str>) -> bool {
        image.is_none() || self.images.is_told()
    }
}

/// A waiting job, as far as placement is concerned.
#[derive(Debug, Clone, Copy)]
pub struct Waiting<'a> {
    pub id: JobId,
    pub org: OrgId,
    pub required: &'a Labels,
    /// Absent: the worker's own.
    pub image: Option<&'a str>,
    /// Whoever lost it, in the order of their last losses.
    pub avoid: &'a [WorkerId],
}

impl Waiting<'_> {
    /// How bad a worker's record with this job is: 0 is none, and a loss that lies further back counts less.
    fn grudge(&self, worker: &WorkerId) -> usize {
        self.avoid.iter().rposition(|loser| loser == worker).map_or(0, |at| at + 1)
    }
}

/// Gives jobs, oldest first, to free slots until one of the two runs out. Lowers `free` as it goes.
pub fn pick<'a>(
    queue: impl Iterator<Item = Waiting<'a>>,
    rooms: &mut BTreeMap<WorkerId, Room>,
) -> Vec<(JobId, WorkerId)> {
    let mut left: u64 = rooms.values().filter(|room| !room.draining).map(|room| u64::from(room.free)).sum();
    let mut picked = Vec::new();
    if left == 0 {
        return picked;
    }
    for job in queue {
        if let Some(worker) = place(job, rooms) {
            if let Some(room) = rooms.get_mut(&worker) {
                room.free -= 1;
            }
            picked.push((job.id, worker));
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    picked
}

/// The worker that has the job's image nearest at hand, of those the emptiest; one that lost the job before only where no
/// other qualifies at all, and of such the one whose loss lies furthest back.
fn place(job: Waiting<'_>, rooms: &BTreeMap<WorkerId, Room>) -> Option<WorkerId> {
    let least = least_grudge(job, rooms)?;
    rooms
        .iter()
        .filter(|(id, room)| room.free > 0 && room.knows(job.image) && job.grudge(id) == least)
        .filter_map(|(id, room)| Some((fit(job, room)?, room.free, std::cmp::Reverse(*id))))
        .max()
        .map(|(_, _, id)| id.0)
}

/// True while a worker that has not lost the job could run it, at once or when its turn comes.
pub fn untried(job: Waiting<'_>, rooms: &BTreeMap<WorkerId, Room>) -> bool {
    least_grudge(job, rooms) == Some(0)
}

fn least_grudge(job: Waiting<'_>, rooms: &BTreeMap<WorkerId, Room>) -> Option<usize> {
    rooms.iter().filter(|(_, room)| fit(job, room).is_some()).map(|(id, _)| job.grudge(id)).min()
}

/// How well the worker suits the job; absent: not at all. One whose slots are all in quarantine is waited for by nobody.
fn fit(job: Waiting<'_>, room: &Room) -> Option<u32> {
    let open = room.slots > 0 && !room.draining && room.serves(job.org, job.required);
    open.then(|| room.stance(job.image).rank()).flatten()
}

/// Why nobody can ever run a job in this image, as far as is known: a worker has asked for it in vain, and no other of its
/// organisation's that have the labels can do better. That workers bring no images proves nothing: one that does may be on its way back.
pub fn refusal(org: OrgId, required: &Labels, image: Option<&str>, rooms: &BTreeMap<WorkerId, Room>) -> Option<String> {
    let mut told = None;
    for room in rooms.values().filter(|room| room.serves(org, required)) {
        match room.stance(image) {
            Stance::Refused(failed) => told = told.or(Some((room, failed))),
            Stance::Bare => {}
            Stance::Warm | Stance::Here | Stance::Can | Stance::Later(_) => return None,
        }
    }
    let (room, failed) = told?;
    let name = image.unwrap_or(&room.images.own);
    Some(format!("no worker can get the image {name}: {}: {}", room.name, failed.message))
}

/// Why a job is not running, from what is connected of its organisation at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WhyNot {
    /// Nobody is connected.
    NoWorker,
    /// Nobody connected has these labels.
    NoLabels { missing: String },
    /// All that have the labels are draining.
    Draining { workers: u32 },
    /// The image did not come on any that is open to it.
    NoImage { why: String, again: bool },
    /// Nobody who is open to it has said yet which images it has.
    Untold { worker: String },
    /// All slots of those that have the labels are in quarantine.
    Broken { workers: u32 },
    /// All slots that fit are taken.
    Busy { workers: u32, slots: u32 },
    /// It waits for a farm that runs for everybody.
    Asleep,
    /// It is its turn.
    Next,
}

impl WhyNot {
    pub fn sentence(&self) -> String {
        match self {
            Self::NoWorker => "no worker is connected".to_owned(),
            Self::NoLabels { missing } => format!("no connected worker has the labels {missing}{}", wish(missing)),
            Self::Draining { workers: 1 } => "the one worker with its labels is draining".to_owned(),
            Self::Draining { workers } => format!("all {workers} workers with its labels are draining"),
            Self::NoImage { why, again: true } => format!("its image did not come, and is tried again later: {why}"),
            Self::NoImage { why, again: false } => format!("no connected worker has its image: {why}"),
            Self::Untold { worker } => format!("{worker} has not said yet which images it has"),
            Self::Broken { workers } => format!("no slot of the {} can start a VM", with_labels(*workers)),
            Self::Busy { workers, slots: 1 } => format!("the one slot of the {} is taken", with_labels(*workers)),
            Self::Busy { workers, slots } => format!("all {slots} slots of the {} are taken", with_labels(*workers)),
            Self::Asleep => "nobody waits for it, and this farm lives only as long as `alloy run --local`".to_owned(),
            Self::Next => "it is next".to_owned(),
        }
    }

    /// Why a job was not started before it had waited for too long.
    pub fn late(&self) -> String {
        match self {
            Self::NoWorker
            | Self::NoLabels { .. }
            | Self::Draining { .. }
            | Self::NoImage { .. }
            | Self::Untold { .. }
            | Self::Asleep
            | Self::Broken { .. }
            | Self::Busy { .. } => {
                format!("no worker took it in time: {}", self.sentence())
            }
            Self::Next => "no worker took it in time".to_owned(),
        }
    }
}

fn with_labels(workers: u32) -> String {
    match workers {
        1 => "worker with its labels".to_owned(),
        many => format!("{many} workers with its labels"),
    }
}

/// What a label means that no person has asked for.
pub fn wish(missing: &str) -> &'static str {
    match missing.split(", ").any(|label| label.split_once('=') == Some(network::LABEL)) {
        true => " (the job has a network policy of its own, which takes VMs behind a packet filter)",
        false => "",
    }
}

pub fn why_not(org: OrgId, required: &Labels, image: Option<&str>, rooms: &BTreeMap<WorkerId, Room>) -> WhyNot {
    if !rooms.values().any(|room| room.org == org) {
        return WhyNot::NoWorker;
    }
    let fitting: Vec<&Room> = rooms.values().filter(|room| room.serves(org, required)).collect();
    if fitting.is_empty() {
        let missing: Vec<String> = required.iter().map(|(key, value)| format!("{key}={value}")).collect();
        return WhyNot::NoLabels { missing: missing.join(", ") };
    }
    let open: Vec<&&Room> = fitting.iter().filter(|room| !room.draining).collect();
    if open.is_empty() {
        return WhyNot::Draining { workers: fitting.len() as u32 };
    }
    if open.iter().all(|room| room.slots == 0) {
        return WhyNot::Broken { workers: open.len() as u32 };
    }
    let failed = |room: &Room| match room.stance(image) {
        Stance::Later(failed) => Some(format!("{}: {}", room.name, failed.message)),
        Stance::Refused(failed) => Some(format!("{}: {}", room.name, failed.message)),
        Stance::Bare => room.images.brings_none().map(|why| format!("{}: {why}", room.name)),
        Stance::Warm | Stance::Here | Stance::Can => None,
    };
    let (without, open): (Vec<&&Room>, Vec<&&Room>) = open.into_iter().partition(|room| failed(room).is_some());
    if open.is_empty() {
        let later = without.iter().find(|room| matches!(room.stance(image), Stance::Later(_)));
        let why = later.or(without.first()).and_then(|room| failed(room)).unwrap_or_default();
        return WhyNot::NoImage { why, again: later.is_some() };
    }
    if let Some(room) = open.first().filter(|_| !open.iter().any(|room| room.knows(image))) {
        return WhyNot::Untold { worker: room.name.clone() };
    }
    if open.iter().all(|room| room.free == 0) {
        return WhyNot::Busy { workers: open.len() as u32, slots: open.iter().map(|room| room.slots).sum() };
    }
    WhyNot::Next
}

#[cfg(test)]
mod tests {
    use alloy_shared::id::DEFAULT_ORG as ORG;
    use alloy_shared::wire::image::ImageReport;

    use super::*;

    fn worker(n: u128) -> WorkerId {
        WorkerId::from_raw(n)
    }
    fn labels(pairs: &[&str]) -> Labels {
        let mut labels = Labels::default();
        pairs.iter().for_each(|pair| labels.insert_pair(pair).unwrap());
        labels
    }
    fn rooms(list: &[(u128, &[&str], u32, bool)]) -> BTreeMap<WorkerId, Room> {
        list.iter()
            .map(|(n, l, free, draining)| {
                let name = format!("w{n}");
                let (images, warm) = (Arc::default(), Vec::new());
                let (labels, draining, free) = (labels(l), *draining, *free);
                (worker(*n), Room { org: ORG, name, labels, draining, slots: 2, free, images, warm })
            })
            .collect()
    }
    fn run(jobs: &[(u128, &[&str], &[u128])], rooms: &mut BTreeMap<WorkerId, Room>) -> Vec<(u128, u128)> {
        let parsed: Vec<(JobId, Labels, Vec<WorkerId>)> = jobs
            .iter()
            .map(|(n, l, avoid)| (JobId::from_raw(*n), labels(l), avoid.iter().map(|n| worker(*n)).collect()))
            .collect();
        let queue =
            parsed.iter().map(|(id, required, avoid)| Waiting { id: *id, org: ORG, required, image: None, avoid });
        pick(queue, rooms).into_iter().map(|(job, w)| (job.raw(), w.raw())).collect()
    }

    fn why_not(required: &Labels, image: Option<&str>, rooms: &BTreeMap<WorkerId, Room>) -> WhyNot {
        super::why_not(ORG, required, image, rooms)
    }
    fn refusal(image: Option<&str>, rooms: &BTreeMap<WorkerId, Room>) -> Option<String> {
        super::refusal(ORG, &Labels::default(), image, rooms)
    }

    #[test]
    fn jobs_spread_over_workers_oldest_first() {
        let mut free = rooms(&[(1, &[], 2, false), (2, &[], 2, false)]);
        assert_eq!(run(&[(10, &[], &[]), (11, &[], &[]), (12, &[], &[])], &mut free), [(10, 1), (11, 2), (12, 1)]);
        assert_eq!(free[&worker(2)].free, 1);
    }

    #[test]
    fn labels_and_draining_decide_who_qualifies() {
        let mut free = rooms(&[(1, &["chip=m1"], 2, false), (2, &["chip=m4"], 1, false), (3, &["chip=m4"], 2, true)]);
        assert_eq!(
            run(&[(10, &["chip=m4"], &[]), (11, &["chip=m4"], &[]), (12, &["chip=m1"], &[])], &mut free),
            [(10, 2), (12, 1)]
        );
    }

    #[test]
    fn a_worker_that_lost_the_job_gets_it_only_when_no_other_qualifies() {
        type Rooms<'a> = &'a [(u128, &'a [&'a str], u32, bool)];
        let cases: [(Rooms<'_>, &[u128], Option<u128>); 8] = [
            (&[(1, &[], 2, false), (2, &[], 1, false)], &[1], Some(2)),
            // The other one is busy: its turn is waited for.
            (&[(1, &[], 2, false), (2, &[], 0, false)], &[1], None),
            (&[(1, &[], 2, false), (2, &[], 2, false), (3, &[], 1, false)], &[1, 2], Some(3)),
            (&[(1, &[], 2, false), (2, &[], 2, false), (3, &[], 0, false)], &[1, 2], None),
            // Nobody else will do.
            (&[(1, &[], 2, false)], &[1], Some(1)),
            (&[(1, &["a=1"], 2, false), (2, &[], 2, false), (3, &["a=1"], 2, true)], &[1], Some(1)),
            // All have lost it: whose loss lies furthest back, also when another has more room.
            (&[(1, &["a=1"], 1, false), (2, &["a=1"], 2, false)], &[1, 2], Some(1)),
            (&[(1, &["a=1"], 2, false), (2, &["a=1"], 1, false)], &[2, 1], Some(2)),
        ];
        for (workers, avoid, expected) in cases {
            let required: &[&str] = if workers[0].1.is_empty() { &[] } else { &["a=1"] };
            let picked = run(&[(10, required, avoid)], &mut rooms(workers));
            let expected: Vec<_> = expected.map(|worker| (10, worker)).into_iter().collect();
            assert_eq!(picked, expected, "{workers:?} avoiding {avoid:?}");
        }
    }

    #[test]
    fn only_a_worker_that_could_run_the_job_and_has_not_lost_it_is_another_chance() {
        let required = labels(&["a=1"]);
        let untried = |rooms, avoid: &[u128]| {
            let avoid: Vec<WorkerId> = avoid.iter().map(|n| worker(*n)).collect();
            untried(
                Waiting { id: JobId::from_raw(1), org: ORG, required: &required, image: None, avoid: &avoid },
                &rooms,
            )
        };
        let all =
            || rooms(&[(1, &["a=1"], 2, false), (2, &["a=1"], 0, false), (3, &["a=1"], 2, true), (4, &[], 2, false)]);
        assert!(untried(all(), &[1]), "a busy one has its turn later");
        assert!(!untried(all(), &[1, 2]), "one drains, one lacks the label");
        assert!(!untried(rooms(&[]), &[]));
        let mut ill = all();
        ill.get_mut(&worker(2)).unwrap().slots = 0;
        assert!(!untried(ill.clone(), &[1]), "all its slots are in quarantine");
        assert_eq!(run(&[(10, &["a=1"], &[1])], &mut ill), [(10, 1)], "nobody waits for such a one");
        ill.get_mut(&worker(1)).unwrap().slots = 0;
        assert_eq!(why_not(&required, None, &ill), WhyNot::Broken { workers: 2 });
    }

    #[test]
    fn the_reason_names_what_is_missing() {
        let none = BTreeMap::new();
        assert_eq!(why_not(&labels(&[]), None, &none), WhyNot::NoWorker);
        let some = rooms(&[(1, &["a=1"], 0, false), (2, &["b=1"], 2, true)]);
        assert_eq!(why_not(&labels(&["c=1"]), None, &some), WhyNot::NoLabels { missing: "c=1".into() });
        assert_eq!(why_not(&labels(&["b=1"]), None, &some), WhyNot::Draining { workers: 1 });
        for (why, text) in [
            (WhyNot::NoWorker, "no worker took it in time: no worker is connected"),
            (
                why_not(&labels(&["c=1"]), None, &some),
                "no worker took it in time: no connected worker has the labels c=1",
            ),
            (
                why_not(&labels(&["c=1", "network-policy=per-job"]), None, &some),
                "no worker took it in time: no connected worker has the labels c=1, network-policy=per-job (the job has a \
                 network policy of its own, which takes VMs behind a packet filter)",
            ),
            (WhyNot::Next, "no worker took it in time"),
        ] {
            assert_eq!(why.late(), text);
        }
        assert_eq!(why_not(&labels(&["a=1"]), None, &some), WhyNot::Busy { workers: 1, slots: 2 });
    }

    #[test]
    fn reasons_count_as_people_do() {
        for (why, text) in [
            (WhyNot::Draining { workers: 1 }, "the one worker with its labels is draining"),
            (WhyNot::Draining { workers: 2 }, "all 2 workers with its labels are draining"),
            (WhyNot::Broken { workers: 1 }, "no slot of the worker with its labels can start a VM"),
            (WhyNot::Broken { workers: 3 }, "no slot of the 3 workers with its labels can start a VM"),
            (WhyNot::Busy { workers: 1, slots: 1 }, "the one slot of the worker with its labels is taken"),
            (WhyNot::Busy { workers: 1, slots: 2 }, "all 2 slots of the worker with its labels are taken"),
            (WhyNot::Busy { workers: 2, slots: 4 }, "all 4 slots of the 2 workers with its labels are taken"),
        ] {
            assert_eq!(why.sentence(), text);
        }
    }

    fn told(name: &str, digest: Option<&str>, refused: Option<bool>) -> ImageReport {
        let failed = refused.map(|refused| PullFailed { message: "404".into(), refused });
        ImageReport { name: name.into(), digest: digest.map(str::to_owned), failed, ..ImageReport::default() }
    }

    /// Five workers: nothing known, failed for now, refused, here, warm.
    fn imaged() -> BTreeMap<WorkerId, Room> {
        let mut rooms = rooms(&[
            (1, &[], 2, false),
            (2, &[], 2, false),
            (3, &[], 2, false),
            (4, &[], 1, false),
            (5, &[], 1, false),
        ]);
        let own = |reports| Arc::new(Inventory { pulls: true, own: "r/own:1".into(), images: reports });
        for (n, reports) in [
            (1, vec![]),
            (2, vec![told("r/a:latest", None, Some(false))]),
            (3, vec![told("r/a:latest", None, Some(true)), told("r/own:1", None, Some(true))]),
            (4, vec![told("r/a:latest", Some("sha256:ab"), Some(true))]),
            (5, vec![]),
        ] {
            rooms.get_mut(&worker(n)).unwrap().images = own(reports);
        }
        rooms.get_mut(&worker(5)).unwrap().warm = vec!["r/a:latest".into()];
        rooms
    }

    fn only(workers: &[u128]) -> BTreeMap<WorkerId, Room> {
        imaged().into_iter().filter(|(id, _)| workers.contains(&id.raw())).collect()
    }

    #[test]
    fn a_job_goes_where_its_image_is_nearest_and_never_where_it_does_not_come() {
        let none = Labels::default();
        let queue = |n: u128| {
            let waiting =
                |n| Waiting { id: JobId::from_raw(n), org: ORG, required: &none, image: Some("r/a"), avoid: &[] };
            (1..=n).map(waiting)
        };
        let picked: Vec<u128> = pick(queue(9), &mut imaged()).into_iter().map(|(_, w)| w.raw()).collect();
        assert_eq!(picked, [5, 4, 1, 1], "warm, here, and then whoever is not known to fail");
    }

    #[test]
    fn a_job_that_names_an_image_goes_to_nobody_who_brings_none_or_has_not_said() {
        let none = Labels::default();
        let picked = |image, rooms: &BTreeMap<WorkerId, Room>| {
            let waiting = Waiting { id: JobId::from_raw(1), org: ORG, required: &none, image, avoid: &[] };
            pick([waiting].into_iter(), &mut rooms.clone()).len()
        };
        let mut rooms = rooms(&[(1, &[], 1, false)]);
        assert_eq!((picked(None, &rooms), picked(Some("r/a"), &rooms)), (1, 0), "not a word yet");
        assert_eq!(why_not(&none, Some("r/a"), &rooms), WhyNot::Untold { worker: "w1".into() });
        let host = vec![told("host", Some("sha256:ab"), None)];
        let images = Arc::new(Inventory { pulls: false, own: "host".into(), images: host });
        rooms.get_mut(&worker(1)).unwrap().images = images;
        assert_eq!((picked(Some("host"), &rooms), picked(Some("r/a"), &rooms)), (1, 0));
        let why = "w1: it brings no images and runs jobs in `host`";
        assert_eq!(why_not(&none, Some("r/a"), &rooms), WhyNot::NoImage { why: why.into(), again: false });
        assert_eq!(refusal(Some("r/a"), &rooms), None, "one that brings images may come back");
    }

    #[test]
    fn a_refusal_is_one_when_every_worker_that_could_get_the_image_says_so() {
        assert_eq!(refusal(Some("r/a"), &only(&[3])).unwrap(), "no worker can get the image r/a: w3: 404");
        assert_eq!(refusal(None, &only(&[3])).unwrap(), "no worker can get the image r/own:1: w3: 404");
        for workers in [&[][..], &[1, 3], &[2, 3], &[3, 4], &[3, 5]] {
            assert_eq!(refusal(Some("r/a"), &only(workers)), None, "{workers:?}");
        }
        let mut beside = only(&[1, 3]);
        beside.get_mut(&worker(1)).unwrap().draining = true;
        assert_eq!(refusal(Some("r/a"), &beside), None, "it comes back from draining");
        let bare = Inventory { pulls: false, own: "host".into(), images: Vec::new() };
        beside.get_mut(&worker(1)).unwrap().images = Arc::new(bare);
        assert!(refusal(Some("r/a"), &beside).is_some(), "it never brings one");
        let why = |workers: &[u128]| why_not(&Labels::default(), Some("r/a"), &only(workers));
        assert_eq!(why(&[2, 3]), WhyNot::NoImage { why: "w2: 404".into(), again: true });
        assert_eq!(why(&[3]), WhyNot::NoImage { why: "w3: 404".into(), again: false });
        assert_eq!(why(&[1, 2]), WhyNot::Next);
        assert!(why(&[2]).sentence().contains("tried again later: w2: 404"));
    }
}
