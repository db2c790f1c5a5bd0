//! P: images of VMs: what the farm wishes of them, and what the workers have.

use std::collections::BTreeMap;

use alloy_shared::id::Labels;
use alloy_shared::limits::IMAGES_MAX;
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::image::{
    ImageList, ImageReport, ImageView, ImageWant, ImageWish, PinRequest, PullRequest, WorkerImage, canonical,
};
use alloy_shared::wire::spec::check_image;

use super::OpError;
use super::access::{commit_one, wrong_field};
use crate::App;
use crate::auth::Principal;
use crate::store::{Group, ImageRow, Miss, Worker, Write};

/// Everything that is wished for and everything that a worker has, by name.
pub async fn list(app: &App, who: &Principal) -> Result<ImageList, OpError> {
    let rows = app.store.images(&who.scope()).await?;
    let workers = app.store.workers(&who.scope()).await?;
    let now = app.env.now().mono;
    let mut views: BTreeMap<String, ImageView> = BTreeMap::new();
    for row in &rows {
        let ImageRow { name, want, pinned, generation, .. } = row.clone();
        views.insert(name.clone(), ImageView { name, want, pinned, generation, workers: Vec::new() });
    }
    for worker in workers.iter().filter(|worker| !worker.revoked) {
        let live = app.hub.view(&worker.id, now);
        let connected = live.as_ref().is_some_and(|live| live.connected);
        let inventory = live.map(|live| live.images).unwrap_or_default();
        // Where no VMs are made a wish comes to nothing: only what is there counts.
        let makes_vms = !inventory.is_bare();
        let counts = |report: &&ImageReport| makes_vms || report.digest.is_some();
        let mut told: BTreeMap<&str, &ImageReport> =
            inventory.images.iter().filter(counts).map(|report| (report.name.as_str(), report)).collect();
        let shown = |wanted, report: ImageReport| WorkerImage {
            worker: worker.id,
            worker_name: worker.name.clone(),
            connected,
            wanted,
            report,
        };
        for row in &rows {
            let wanted = row.want == ImageWant::Present && is_meant(row, worker) && makes_vms;
            let report = told.remove(row.name.as_str()).cloned();
            if let (Some(view), true) = (views.get_mut(&row.name), wanted || report.is_some()) {
                let silent = ImageReport { name: row.name.clone(), ..ImageReport::default() };
                view.workers.push(shown(wanted, report.unwrap_or(silent)));
            }
        }
        for (name, report) in told {
            let unwished = || ImageView {
                name: name.to_owned(),
                want: ImageWant::None,
                pinned: false,
                generation: 0,
                workers: Vec::new(),
            };
            views.entry(name.to_owned()).or_insert_with(unwished).workers.push(shown(false, report.clone()));
        }
    }
    Ok(ImageList { images: views.into_values().collect() })
}

/// Wishes that workers have this image, as its registry has it now.
pub async fn pull(app: &App, who: &Principal, request: PullRequest) -> Result<ImageView, OpError> {
    let labels = Labels::try_from(&request.labels).map_err(|bad| wrong_field("labels", bad.to_string()))?;
    let name = checked(&request.name)?;
    let mut workers = request.workers;
    workers.sort();
    workers.dedup();
    let known = app.store.workers(&who.scope()).await?;
    if let Some(stranger) = workers.iter().find(|id| !known.iter().any(|worker| worker.id == **id && !worker.revoked)) {
        return Err(wrong_field("workers", format!("there is no worker {stranger}")));
    }
    change(app, who, &name, |row| {
        let row = ImageRow { want: ImageWant::Present, workers: workers.clone(), labels: labels.clone(), ..row };
        Ok(renewed(row, app))
    })
    .await?;
    one(app, who, &name).await
}

/// Keeps an image from being evicted, or no longer.
pub async fn pin(app: &App, who: &Principal, request: PinRequest) -> Result<ImageView, OpError> {
    let name = checked(&request.name)?;
    change(app, who, &name, |row| {
        let want = if row.want == ImageWant::Absent { ImageWant::None } else { row.want };
        Ok(ImageRow { pinned: request.pinned, want, ..row })
    })
    .await?;
    one(app, who, &name).await
}

/// Removes an image from every worker, once. A job that needs it brings it again.
pub async fn remove(app: &App, who: &Principal, name: &str) -> Result<ImageView, OpError> {
    let name = checked(name)?;
    change(app, who, &name, |row| {
        if row.pinned {
            let why = format!("{} is pinned", row.name);
            return Err(OpError::refused(ErrorCode::InvalidTransition, why).hint("`alloy image pin --off` lets it go"));
        }
        let row = ImageRow { want: ImageWant::Absent, workers: Vec::new(), labels: Labels::default(), ..row };
        Ok(renewed(row, app))
    })
    .await?;
    one(app, who, &name).await
}

/// What one worker is told of the wishes.
pub fn wishes(rows: &[ImageRow], worker: &Worker) -> Vec<ImageWish> {
    let of = |row: &ImageRow| {
        let want = match row.want {
            ImageWant::Present if !is_meant(row, worker) => ImageWant::None,
            want @ (ImageWant::Present | ImageWant::Absent | ImageWant::None) => want,
        };
        let wish = ImageWish { name: row.name.clone(), want, pinned: row.pinned, generation: row.generation };
        (want != ImageWant::None || row.pinned).then_some(wish)
    };
    rows.iter().filter(|row| row.org == worker.org).filter_map(of).collect()
}

fn is_meant(row: &ImageRow, worker: &Worker) -> bool {
    let has = |(key, value): (&str, &str)| {
        worker.labels.get(key).or_else(|| worker.host_labels.get(key)).is_some_and(|own| own == value)
    };
    (row.workers.is_empty() || row.workers.contains(&worker.id)) && row.labels.iter().all(has)
}

fn checked(name: &str) -> Result<String, OpError> {
    check_image(name).map_err(|why| wrong_field("name", why))?;
    Ok(canonical(name))
}

/// The row as a new wish, which each worker fulfils once more.
fn renewed(row: ImageRow, app: &App) -> ImageRow {
    let at = app.env.now().wall;
    ImageRow { generation: at.0.max(row.generation + 1), at, ..row }
}

/// Changes one row, tells every worker.
async fn change(
    app: &App,
    who: &Principal,
    name: &str,
    next: impl Fn(ImageRow) -> Result<ImageRow, OpError>,
) -> Result<(), OpError> {
    for _ in 0..3 {
        let rows = app.store.images(&who.scope()).await?;
        let known = rows.iter().find(|row| row.name == name && row.org == who.org).cloned();
        if known.is_none() && rows.len() >= IMAGES_MAX {
            make_room(app, &rows).await?;
        }
        let at = app.env.now().wall;
        let fresh = || ImageRow {
            org: who.org,
            name: name.to_owned(),
            want: ImageWant::None,
            pinned: false,
            workers: Vec::new(),
            labels: Labels::default(),
            generation: at.0.max(1),
            at,
        };
        let row = next(known.unwrap_or_else(fresh))?;
        let done = app.store.commit(&[Group(vec![Write::SetImage(row)])]).await?.groups.pop();
        match done {
            Some(Ok(_)) => {
                app.hub.wishes_moved();
                return Ok(());
            }
            // Somebody else's wish was newer: once more, on top of it.
            Some(Err(Miss::Stale)) => {}
            Some(Err(Miss::Exists { .. } | Miss::Corrupt(_))) | None => break,
        }
    }
    Err(OpError::refused(ErrorCode::Unavailable, "the wish was not written down; try again"))
}

/// Forgets the oldest wish that nobody needs to remember.
async fn make_room(app: &App, rows: &[ImageRow]) -> Result<(), OpError> {
    let idle = rows.iter().filter(|row| !row.pinned && row.want != ImageWant::Present);
    let Some(oldest) = idle.min_by_key(|row| row.at) else {
        let why = format!("the farm keeps {IMAGES_MAX} images already");
        return Err(
            OpError::refused(ErrorCode::InvalidTransition, why).hint("`alloy image rm` those that are not needed")
        );
    };
    commit_one(app, Write::DropImage { org: oldest.org, name: oldest.name.clone() }).await
}

async fn one(app: &App, who: &Principal, name: &str) -> Result<ImageView, OpError> {
    let found = list(app, who).await?.images.into_iter().find(|view| view.name == name);
    found.ok_or_else(|| OpError::not_found("image"))
}

#[cfg(test)]
mod tests {
    use alloy_shared::env::Ms;
    use alloy_shared::id::{DEFAULT_ORG, WorkerId};

    use super::*;

    fn row(name: &str, want: ImageWant, pinned: bool) -> ImageRow {
        ImageRow {
            org: DEFAULT_ORG,
            name: name.to_owned(),
            want,
            pinned,
            workers: Vec::new(),
            labels: Labels::default(),
            generation: 7,
            at: Ms(7),
        }
    }

    fn worker(n: u128, label: &str) -> Worker {
        let mut labels = Labels::default();
        labels.insert_pair(label).unwrap();
        Worker { host_labels: labels, ..crate::tests::enrolled(n) }
    }

    #[test]
    fn a_wish_reaches_the_workers_that_it_means() {
        let mut chosen = row("r/chosen:1", ImageWant::Present, false);
        chosen.workers = vec![WorkerId::from_raw(1)];
        chosen.labels.insert_pair("chip=m4").unwrap();
        let mut kept = chosen.clone();
        (kept.name, kept.pinned) = ("r/kept:1".into(), true);
        let rows = [
            chosen,
            kept,
            row("r/all:1", ImageWant::Present, false),
            row("r/gone:1", ImageWant::Absent, false),
            row("r/idle:1", ImageWant::None, false),
        ];
        let told = |worker: Worker| -> Vec<(String, ImageWant, bool)> {
            wishes(&rows, &worker).into_iter().map(|wish| (wish.name, wish.want, wish.pinned)).collect()
        };
        let all = ("r/all:1".to_owned(), ImageWant::Present, false);
        let gone = ("r/gone:1".to_owned(), ImageWant::Absent, false);
        let mine = |name: &str, pinned| (name.to_owned(), ImageWant::Present, pinned);
        let meant = [mine("r/chosen:1", false), mine("r/kept:1", true), all.clone(), gone.clone()];
        assert_eq!(told(worker(1, "chip=m4")), meant);
        let pinned = ("r/kept:1".to_owned(), ImageWant::None, true);
        for other in [worker(2, "chip=m4"), worker(1, "chip=m1")] {
            assert_eq!(told(other), [pinned.clone(), all.clone(), gone.clone()]);
        }
        let stranger = Worker { org: alloy_shared::id::OrgId::from_raw(9), ..worker(1, "chip=m4") };
        assert_eq!(told(stranger), []);
    }
}
