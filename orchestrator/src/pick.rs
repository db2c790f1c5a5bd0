//! D: which waiting job gets which free slot, and why a job waits.

use std::collections::BTreeMap;

use alloy_shared::id::{JobId, Labels, WorkerId};

/// What a connected worker has to offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    pub name: String,
    pub labels: Labels,
    pub draining: bool,
    pub slots: u32,
    pub free: u32,
}

/// A waiting job, as far as placement is concerned.
#[derive(Debug, Clone, Copy)]
pub struct Waiting<'a> {
    pub id: JobId,
    pub required: &'a Labels,
    pub avoid: &'a [WorkerId],
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

/// The emptiest worker that qualifies; one that lost the job before only where no other qualifies at all.
fn place(job: Waiting<'_>, rooms: &BTreeMap<WorkerId, Room>) -> Option<WorkerId> {
    let fits = |room: &Room| !room.draining && room.labels.matches(job.required);
    let other_exists = rooms.iter().any(|(id, room)| fits(room) && !job.avoid.contains(id));
    rooms
        .iter()
        .filter(|(id, room)| fits(room) && room.free > 0 && !(other_exists && job.avoid.contains(id)))
        .max_by(|(a_id, a), (b_id, b)| a.free.cmp(&b.free).then(b_id.cmp(a_id)))
        .map(|(id, _)| *id)
}

/// Why a job is not running, from what is connected at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WhyNot {
    /// Nobody is connected.
    NoWorker,
    /// Nobody connected has these labels.
    NoLabels { missing: String },
    /// All that have the labels are draining.
    Draining { workers: u32 },
    /// All slots that fit are taken.
    Busy { workers: u32, slots: u32 },
    /// It is its turn.
    Next,
}

impl WhyNot {
    pub fn sentence(&self) -> String {
        match self {
            Self::NoWorker => "no worker is connected".to_owned(),
            Self::NoLabels { missing } => format!("no connected worker has the labels {missing}"),
            Self::Draining { workers } => format!("the {workers} worker(s) with its labels are draining"),
            Self::Busy { workers, slots } => {
                format!("all {slots} slots of the {workers} worker(s) with its labels are taken")
            }
            Self::Next => "it is next".to_owned(),
        }
    }

    /// Why a job was not started before it had waited for too long.
    pub fn late(&self) -> String {
        match self {
            Self::NoWorker | Self::NoLabels { .. } | Self::Draining { .. } | Self::Busy { .. } => {
                format!("no worker took it in time: {}", self.sentence())
            }
            Self::Next => "no worker took it in time".to_owned(),
        }
    }
}

pub fn why_not(required: &Labels, rooms: &BTreeMap<WorkerId, Room>) -> WhyNot {
    if rooms.is_empty() {
        return WhyNot::NoWorker;
    }
    let fitting: Vec<&Room> = rooms.values().filter(|room| room.labels.matches(required)).collect();
    if fitting.is_empty() {
        let missing: Vec<String> = required.iter().map(|(key, value)| format!("{key}={value}")).collect();
        return WhyNot::NoLabels { missing: missing.join(", ") };
    }
    let open: Vec<&&Room> = fitting.iter().filter(|room| !room.draining).collect();
    if open.is_empty() {
        return WhyNot::Draining { workers: fitting.len() as u32 };
    }
    if open.iter().all(|room| room.free == 0) {
        return WhyNot::Busy { workers: open.len() as u32, slots: open.iter().map(|room| room.slots).sum() };
    }
    WhyNot::Next
}

#[cfg(test)]
mod tests {
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
                let room =
                    Room { name: format!("w{n}"), labels: labels(l), draining: *draining, slots: 2, free: *free };
                (worker(*n), room)
            })
            .collect()
    }
    fn run(jobs: &[(u128, &[&str], &[u128])], rooms: &mut BTreeMap<WorkerId, Room>) -> Vec<(u128, u128)> {
        let parsed: Vec<(JobId, Labels, Vec<WorkerId>)> = jobs
            .iter()
            .map(|(n, l, avoid)| (JobId::from_raw(*n), labels(l), avoid.iter().map(|n| worker(*n)).collect()))
            .collect();
        let queue = parsed.iter().map(|(id, required, avoid)| Waiting { id: *id, required, avoid });
        pick(queue, rooms).into_iter().map(|(job, w)| (job.raw(), w.raw())).collect()
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
        let mut free = rooms(&[(1, &[], 2, false), (2, &[], 0, false)]);
        assert_eq!(run(&[(10, &[], &[1])], &mut free), []);
        let mut alone = rooms(&[(1, &[], 2, false)]);
        assert_eq!(run(&[(10, &[], &[1])], &mut alone), [(10, 1)]);
    }

    #[test]
    fn the_reason_names_what_is_missing() {
        let none = BTreeMap::new();
        assert_eq!(why_not(&labels(&[]), &none), WhyNot::NoWorker);
        let some = rooms(&[(1, &["a=1"], 0, false), (2, &["b=1"], 2, true)]);
        assert_eq!(why_not(&labels(&["c=1"]), &some), WhyNot::NoLabels { missing: "c=1".into() });
        assert_eq!(why_not(&labels(&["b=1"]), &some), WhyNot::Draining { workers: 1 });
        for (why, text) in [
            (WhyNot::NoWorker, "no worker took it in time: no worker is connected"),
            (why_not(&labels(&["c=1"]), &some), "no worker took it in time: no connected worker has the labels c=1"),
            (WhyNot::Next, "no worker took it in time"),
        ] {
            assert_eq!(why.late(), text);
        }
        assert_eq!(why_not(&labels(&["a=1"]), &some), WhyNot::Busy { workers: 1, slots: 2 });
    }
}
