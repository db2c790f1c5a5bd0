//! S: brings artifacts to the disk, several at a time, as they become ready.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use alloy_shared::client::Client;
use alloy_shared::id::JobId;
use alloy_shared::limits;
use alloy_shared::wire::job::{ArtifactView, JobView};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use indicatif::ProgressBar;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::context::{App, Farm};
use crate::out_dir::{OutDir, OutError};
use crate::output::Failure;
use crate::output::talk::Talk;
use crate::signals::Signals;

/// Downloads at once: one stream does not fill a fast network, forty would not fill it more.
const AT_ONCE: usize = 4;
/// Smaller files are here before a bar could be read.
const BAR_ABOVE: u64 = 4 << 20;

/// Where artifacts go.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    /// `alloy-out/<job>` below this directory, made when the first artifact arrives.
    Collection(PathBuf),
    Dir(PathBuf),
}

/// What arrived and what did not.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Path and size.
    pub(crate) saved: HashMap<String, u64>,
    /// Left out on purpose: it would have written outside.
    pub(crate) unsafe_ones: BTreeMap<String, String>,
    /// By path; what concerns no single artifact stands under the empty one.
    pub(crate) failed: BTreeMap<String, Failure>,
    pub(crate) dir: Option<PathBuf>,
    /// Nobody answered for as long as anybody is waited for. What comes later waits no more.
    away: Option<Failure>,
}

pub(crate) struct Downloader {
    pub(crate) client: Client,
    pub(crate) job: JobId,
    pub(crate) target: Target,
    pub(crate) talk: Talk,
}

/// What a downloader is told.
#[derive(Debug)]
pub(crate) enum News {
    /// The job has this one, unless its attempt is lost.
    Announced(Box<ArtifactView>),
    /// These are all. What else was announced is removed first: it may lie where one of these goes.
    All(Vec<ArtifactView>),
    /// Nobody knows whether there are others.
    NoMore,
}

impl Downloader {
    /// Downloads what comes in until it knows all. An artifact that comes twice is downloaded once, unless it changed: an
    /// attempt that was lost may have left another one under the same name.
    pub(crate) async fn run(self, mut arrivals: mpsc::Receiver<News>) -> Report {
        let mut report = Report::default();
        let mut known: HashMap<String, ArtifactView> = HashMap::new();
        let mut running = FuturesUnordered::new();
        let mut out: Option<Arc<OutDir>> = None;
        let mut queue: VecDeque<ArtifactView> = VecDeque::new();
        let mut knows_all = false;
        loop {
            while running.len() < AT_ONCE
                && let Some(artifact) = queue.pop_front()
            {
                let here = known.get(&artifact.path) == Some(&artifact) && report.saved.contains_key(&artifact.path);
                if !here && known.contains_key(&artifact.path) {
                    report.note_all(&mut known, &mut running).await;
                }
                if known.get(&artifact.path) == Some(&artifact) {
                    continue;
                }
                if let Some(failure) = &report.away {
                    report.failed.insert(artifact.path, failure.clone());
                    continue;
                }
                known.insert(artifact.path.clone(), artifact.clone());
                match out.clone().map_or_else(|| self.open(), Ok) {
                    Ok(dir) => {
                        report.dir = Some(dir.path().to_owned());
                        out = Some(dir.clone());
                        running.push(self.one(dir, artifact));
                    }
                    Err(error) => {
                        report.failed.insert(String::new(), Failure::error(error.to_string()));
                        knows_all = true;
                        queue.clear();
                    }
                }
            }
            tokio::select! {
                biased;
                Some((artifact, outcome)) = running.next(), if !running.is_empty() => {
                    report.note(&mut known, &artifact, outcome);
                }
                news = arrivals.recv(), if !knows_all && running.len() < AT_ONCE => match news {
                    Some(News::Announced(artifact)) => queue.push_back(*artifact),
                    Some(News::All(listed)) => {
                        report.note_all(&mut known, &mut running).await;
                        report.remove_all_but(&listed);
                        report.away = None;
                        queue.extend(listed);
                        knows_all = true;
                    }
                    Some(News::NoMore) | None => knows_all = true,
                },
                else => return report,
            }
        }
    }

    fn open(&self) -> Result<Arc<OutDir>, OutError> {
        let dir = match &self.target {
            Target::Collection(dir) => OutDir::of_job(dir, &self.job.to_string()),
            Target::Dir(dir) => OutDir::at(dir),
        };
        dir.map(Arc::new)
    }

    async fn one(&self, out: Arc<OutDir>, artifact: ArtifactView) -> (ArtifactView, Result<(), Trouble>) {
        let outcome = match &artifact.link {
            Some(target) => out.link(&artifact.path, target).map_err(Trouble::Out),
            None => self.file(&out, &artifact).await,
        };
        (artifact, outcome)
    }

    async fn file(&self, out: &OutDir, artifact: &ArtifactView) -> Result<(), Trouble> {
        let mut file = out.create(artifact).map_err(Trouble::Out)?;
        let bar = match artifact.size_bytes {
            0..BAR_ABOVE => ProgressBar::hidden(),
            BAR_ABOVE.. => self.talk.bytes_bar(&artifact.path, artifact.size_bytes),
        };
        let mut bytes = self.client.download(self.job, &artifact.path, 0);
        let outcome = loop {
            match bytes.recv().await {
                None => break file.finish().map_err(Trouble::Out),
                Some(Ok(piece)) => {
                    if let Err(error) = file.write(&piece) {
                        break Err(Trouble::Out(error));
                    }
                    bar.set_position(file.written());
                }
                Some(Err(error)) => {
                    let failure = Failure::of(error, self.client.url());
                    // Bytes that never come whole look the same: only a farm that says nothing at all is away.
                    let away = failure.farm_is_away() && self.client.ready().await.is_err();
                    break Err(Trouble::Farm { failure, away });
                }
            }
        };
        bar.finish_and_clear();
        outcome
    }
}

#[derive(Debug)]
enum Trouble {
    Out(OutError),
    Farm { failure: Failure, away: bool },
}

impl Report {
    /// The last outcome of a path counts. What failed is forgotten, so that it is tried again when it is announced again.
    fn note(
        &mut self,
        known: &mut HashMap<String, ArtifactView>,
        artifact: &ArtifactView,
        outcome: Result<(), Trouble>,
    ) {
        let path = artifact.path.clone();
        self.saved.remove(&path);
        self.unsafe_ones.remove(&path);
        self.failed.remove(&path);
        if outcome.is_err() {
            known.remove(&path);
        }
        match outcome {
            Ok(()) => {
                self.away = None;
                self.saved.insert(path, artifact.size_bytes);
            }
            Err(Trouble::Out(OutError::Unsafe(why))) => {
                self.unsafe_ones.insert(path, why);
            }
            Err(Trouble::Out(error @ (OutError::InTheWay(_) | OutError::Damaged(_) | OutError::Io { .. }))) => {
                self.failed.insert(path, Failure::error(error.to_string()));
            }
            Err(Trouble::Farm { failure, away }) => {
                if away {
                    self.away = Some(failure.clone());
                }
                self.failed.insert(path, failure);
            }
        }
    }

    /// Waits for what is on its way.
    async fn note_all<F>(&mut self, known: &mut HashMap<String, ArtifactView>, running: &mut FuturesUnordered<F>)
    where
        F: Future<Output = (ArtifactView, Result<(), Trouble>)>,
    {
        while let Some((artifact, outcome)) = running.next().await {
            self.note(known, &artifact, outcome);
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.saved.values().sum()
    }

    /// Removes what is no artifact of the job after all: an attempt that was lost had announced it.
    fn remove_all_but(&mut self, listed: &[ArtifactView]) {
        let counts = |path: &String| path.is_empty() || listed.iter().any(|artifact| artifact.path == *path);
        self.unsafe_ones.retain(|path, _| counts(path));
        self.failed.retain(|path, _| counts(path));
        let Some(out) = self.dir.as_ref().and_then(|dir| OutDir::at(dir).ok()) else { return };
        let strays: Vec<String> =
            self.saved.keys().filter(|path| !listed.iter().any(|a| a.path == **path)).cloned().collect();
        for path in strays {
            if out.remove(&path).is_ok() {
                self.saved.remove(&path);
            }
        }
    }
}

/// Artifacts on their way while the job still runs.
pub(crate) struct Downloads {
    pub(crate) arrivals: mpsc::Sender<News>,
    report: oneshot::Receiver<Report>,
    stop: CancellationToken,
}

impl Downloads {
    pub(crate) fn start(app: &App, farm: &Farm, job: &JobView) -> Self {
        let (arrivals, rx) = mpsc::channel(limits::ARTIFACTS_MAX);
        let (tx, report) = oneshot::channel();
        let downloader = Downloader {
            client: farm.client.clone(),
            job: job.id,
            target: Target::Collection(app.dir.clone()),
            talk: app.talk.clone(),
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let work = async move {
            let report = tokio::select! {
                biased;
                () = stopped.cancelled() => None,
                report = downloader.run(rx) => Some(report),
            };
            if let Some(report) = report {
                // Nobody waits for it any more when the command ends early.
                let _ = tx.send(report);
            }
        };
        app.env.spawn("download", Box::pin(work));
        Self { arrivals, report, stop }
    }

    /// The list at the end is the truth: what was not announced is downloaded, what was announced wrongly is removed.
    pub(crate) async fn finish(mut self, farm: &Farm, job: &JobView, signals: &mut Signals) -> Result<Report, Failure> {
        match signals.unless_told(self.rest(farm, job)).await {
            Ok(report) => Ok(report),
            Err(told) => {
                self.stop().await;
                Err(told)
            }
        }
    }

    /// Ends what is under way. Then no half of a file is left, also if the process ends at once.
    pub(crate) async fn stop(&mut self) {
        self.stop.cancel();
        // There is no report, or nobody reads it.
        let _ = (&mut self.report).await;
    }

    async fn rest(&mut self, farm: &Farm, job: &JobView) -> Report {
        let list = farm.client.artifacts_in_the_end(job.id).await.map_err(|error| Failure::of(error, &farm.url));
        let (news, failure) = match list {
            Ok(list) => (News::All(list.artifacts), None),
            Err(failure) => (News::NoMore, Some(failure)),
        };
        // It is gone already if it could not open its directory, which its report says.
        let _ = self.arrivals.send(news).await;
        let mut report = (&mut self.report).await.unwrap_or_else(|_| Report {
            failed: [(String::new(), Failure::error("the download ended early"))].into(),
            ..Report::default()
        });
        report.failed.extend(failure.map(|failure| (String::new(), failure)));
        report
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use alloy_shared::client::Options;
    use alloy_shared::env::{Env, Mono, Ms, Now};
    use alloy_shared::id::Digest;
    use alloy_shared::runtime::SystemEnv;
    use async_trait::async_trait;
    use futures_util::future::BoxFuture;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// For artifacts that are links: they come without a word of the farm.
    fn nowhere(env: Arc<dyn Env>) -> Client {
        let options = Options { url: "http://127.0.0.1:9".into(), token: None, agent: "test".into() };
        Client::new(options, env).unwrap()
    }

    /// Pauses pass at once; deadlines never come.
    #[derive(Default)]
    struct Hasty(AtomicU64);

    #[async_trait]
    impl Env for Hasty {
        fn now(&self) -> Now {
            Now { wall: Ms(0), mono: Mono(self.0.load(Ordering::Relaxed)) }
        }
        async fn sleep_until(&self, at: Mono) {
            if at.since(self.now().mono) > 4_000 {
                std::future::pending::<()>().await;
            }
            self.0.fetch_max(at.0, Ordering::Relaxed);
        }
        fn spawn(&self, _: &'static str, task: BoxFuture<'static, ()>) {
            SystemEnv::detached().spawn("task", task);
        }
        fn dice(&self) -> u64 {
            4_000_007
        }
    }

    fn view(path: &str) -> ArtifactView {
        ArtifactView { path: path.into(), size_bytes: 3, sha256: Digest::of(b"abc"), mode: 0o644, link: None }
    }

    #[test]
    fn trouble_with_one_artifact_is_told_apart() {
        let mut report = Report::default();
        let mut known: HashMap<String, ArtifactView> = ["a", "b", "c"].map(|p| (p.to_owned(), view(p))).into();
        let damaged = || Err(Trouble::Out(OutError::Damaged("it is damaged".into())));
        report.note(&mut known, &view("a"), Ok(()));
        report.note(&mut known, &view("b"), Err(Trouble::Out(OutError::Unsafe("`b` leaves".into()))));
        report.note(&mut known, &view("c"), damaged());
        assert_eq!((report.saved.len(), report.bytes()), (1, 3));
        assert_eq!(report.unsafe_ones["b"], "`b` leaves");
        assert_eq!(report.failed.len(), 1);
        assert_eq!(known.keys().collect::<Vec<_>>(), ["a"], "what failed is tried again");
        // A later outcome takes an earlier one's place, and a path that is no artifact after all spoils nothing.
        report.note(&mut known, &view("c"), Ok(()));
        report.note(&mut known, &view("gone"), damaged());
        report.remove_all_but(&[view("a"), view("c")]);
        assert_eq!((report.saved.len(), report.unsafe_ones.len(), report.failed.len()), (2, 0, 0));
    }

    #[tokio::test]
    async fn what_a_lost_attempt_left_keeps_nothing_out() {
        let link = |path: &str| ArtifactView { link: Some("./x".into()), ..view(path) };
        for (left, last) in [("report", "report/index.html"), ("report/a/index.html", "report")] {
            let dir = tempfile::tempdir().unwrap();
            let downloader = Downloader {
                client: nowhere(Arc::new(SystemEnv::detached())),
                job: JobId::from_raw(1),
                target: Target::Dir(dir.path().to_owned()),
                talk: Talk::new(Arc::new(SystemEnv::detached()), false, true),
            };
            let (tx, rx) = mpsc::channel(3);
            for news in [News::Announced(link(left).into()), News::Announced(link(last).into())] {
                tx.send(news).await.unwrap();
            }
            tx.send(News::All(vec![link(last)])).await.unwrap();
            let report = downloader.run(rx).await;
            assert!(report.failed.is_empty() && report.unsafe_ones.is_empty(), "{left}: {report:?}");
            assert_eq!(report.saved.keys().collect::<Vec<_>>(), [last]);
            assert!(dir.path().join(last).is_symlink(), "{last}");
        }
    }

    #[tokio::test]
    async fn a_farm_that_is_away_is_waited_for_once_and_not_for_each_file() {
        let (dir, env) = (tempfile::tempdir().unwrap(), Arc::new(Hasty::default()));
        let downloader = Downloader {
            client: nowhere(env.clone()),
            job: JobId::from_raw(1),
            target: Target::Dir(dir.path().to_owned()),
            talk: Talk::new(env.clone(), false, true),
        };
        let (tx, rx) = mpsc::channel(1);
        tx.send(News::All((0..40).map(|n| view(&format!("{n}"))).collect())).await.unwrap();
        let report = downloader.run(rx).await;
        assert_eq!((report.saved.len(), report.failed.len()), (0, 40));
        assert!(report.failed.values().all(Failure::farm_is_away));
        let waited = env.now().mono.since(Mono(0));
        assert!((590_000..660_000).contains(&waited), "{waited}");
    }

    /// Answers every request, and cuts off each artifact that is not `good`.
    async fn half_a_farm() -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let answers = async move {
            while let Ok((mut peer, _)) = listener.accept().await {
                let mut asked = vec![0; 4_096];
                let len = peer.read(&mut asked).await.unwrap_or(0);
                let line = String::from_utf8_lossy(&asked[..len]).lines().next().unwrap_or_default().to_owned();
                let (len, body) = match () {
                    () if line.contains("readyz") => (5, "ready"),
                    () if line.contains("good") => (3, "abc"),
                    () => (3, "a"),
                };
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {len}\r\nconnection: close\r\n\r\n{body}");
                let _peer_is_gone = peer.write_all(answer.as_bytes()).await;
            }
        };
        SystemEnv::detached().spawn("farm", Box::pin(answers));
        Client::new(Options { url, token: None, agent: "test".into() }, Arc::new(Hasty::default())).unwrap()
    }

    #[tokio::test]
    async fn artifacts_that_never_come_whole_keep_no_other_one_out() {
        let dir = tempfile::tempdir().unwrap();
        let downloader = Downloader {
            client: half_a_farm().await,
            job: JobId::from_raw(1),
            target: Target::Dir(dir.path().to_owned()),
            talk: Talk::new(Arc::new(Hasty::default()), false, true),
        };
        let (tx, rx) = mpsc::channel(1);
        let bad: Vec<String> = (0..AT_ONCE).map(|n| format!("bad{n}")).collect();
        tx.send(News::All(bad.iter().map(|path| view(path)).chain([view("good")]).collect())).await.unwrap();
        let report = downloader.run(rx).await;
        assert_eq!(report.saved.keys().collect::<Vec<_>>(), ["good"], "{report:?}");
        assert_eq!(report.failed.keys().collect::<Vec<_>>(), bad.iter().collect::<Vec<_>>());
    }

    #[test]
    fn what_a_lost_attempt_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let mut report = Report { dir: Some(dir.path().to_owned()), ..Report::default() };
        for name in ["kept", "stray"] {
            std::fs::write(dir.path().join(name), "abc").unwrap();
            report.note(&mut HashMap::new(), &view(name), Ok(()));
        }
        report.remove_all_but(&[view("kept")]);
        assert!(dir.path().join("kept").exists() && !dir.path().join("stray").exists());
        assert_eq!(report.saved.len(), 1);
    }
}
