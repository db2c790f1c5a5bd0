//! S: brings artifacts to the disk, several at a time, as they become ready.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use alloy_shared::client::Client;
use alloy_shared::id::JobId;
use alloy_shared::wire::job::ArtifactView;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use indicatif::ProgressBar;
use tokio::sync::mpsc;

use crate::out_dir::{OutDir, OutError};
use crate::output::Failure;
use crate::output::talk::Talk;

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
    pub(crate) unsafe_ones: Vec<String>,
    pub(crate) failed: Vec<Failure>,
    pub(crate) dir: Option<PathBuf>,
}

pub(crate) struct Downloader {
    pub(crate) client: Client,
    pub(crate) job: JobId,
    pub(crate) target: Target,
    pub(crate) talk: Talk,
}

impl Downloader {
    /// Downloads what comes in until the sender is gone. An artifact that comes twice is downloaded once, unless it changed:
    /// an attempt that was lost may have left another one under the same name.
    pub(crate) async fn run(self, mut arrivals: mpsc::Receiver<ArtifactView>) -> Report {
        let mut report = Report::default();
        let mut known: HashMap<String, ArtifactView> = HashMap::new();
        let mut running = FuturesUnordered::new();
        let mut out: Option<Arc<OutDir>> = None;
        loop {
            tokio::select! {
                biased;
                Some((artifact, outcome)) = running.next(), if !running.is_empty() => report.note(&artifact, outcome),
                next = arrivals.recv(), if running.len() < AT_ONCE => {
                    let Some(artifact) = next else { break };
                    if known.get(&artifact.path) == Some(&artifact) {
                        continue;
                    }
                    if known.insert(artifact.path.clone(), artifact.clone()).is_some() {
                        while let Some((artifact, outcome)) = running.next().await {
                            report.note(&artifact, outcome);
                        }
                    }
                    let dir = match out.clone().map_or_else(|| self.open(), Ok) {
                        Ok(dir) => dir,
                        Err(error) => {
                            report.failed.push(Failure::error(error.to_string()));
                            break;
                        }
                    };
                    report.dir = Some(dir.path().to_owned());
                    out = Some(dir.clone());
                    running.push(self.one(dir, artifact));
                }
            }
        }
        while let Some((artifact, outcome)) = running.next().await {
            report.note(&artifact, outcome);
        }
        report
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
                Some(Err(error)) => break Err(Trouble::Farm(Failure::of(error, self.client.url()))),
            }
        };
        bar.finish_and_clear();
        outcome
    }
}

#[derive(Debug)]
enum Trouble {
    Out(OutError),
    Farm(Failure),
}

impl Report {
    fn note(&mut self, artifact: &ArtifactView, outcome: Result<(), Trouble>) {
        match outcome {
            Ok(()) => {
                self.saved.insert(artifact.path.clone(), artifact.size_bytes);
            }
            Err(Trouble::Out(OutError::Unsafe(why))) => self.unsafe_ones.push(why),
            Err(Trouble::Out(error @ (OutError::Damaged(_) | OutError::Io { .. }))) => {
                self.failed.push(Failure::error(error.to_string()));
            }
            Err(Trouble::Farm(failure)) => self.failed.push(failure),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.saved.values().sum()
    }

    /// Removes what is no artifact of the job after all: an attempt that was lost had announced it.
    pub(crate) fn remove_all_but(&mut self, listed: &[ArtifactView]) {
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

#[cfg(test)]
mod tests {
    use alloy_shared::id::Digest;

    use super::*;

    fn view(path: &str) -> ArtifactView {
        ArtifactView { path: path.into(), size_bytes: 3, sha256: Digest::of(b"abc"), mode: 0o644, link: None }
    }

    #[test]
    fn trouble_with_one_artifact_is_told_apart() {
        let mut report = Report::default();
        report.note(&view("a"), Ok(()));
        report.note(&view("b"), Err(Trouble::Out(OutError::Unsafe("`b` leaves".into()))));
        report.note(&view("c"), Err(Trouble::Out(OutError::Damaged("`c` is damaged".into()))));
        assert_eq!((report.saved.len(), report.bytes()), (1, 3));
        assert_eq!(report.unsafe_ones, ["`b` leaves"]);
        assert_eq!(report.failed.len(), 1);
    }

    #[test]
    fn what_a_lost_attempt_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let mut report = Report { dir: Some(dir.path().to_owned()), ..Report::default() };
        for name in ["kept", "stray"] {
            std::fs::write(dir.path().join(name), "abc").unwrap();
            report.note(&view(name), Ok(()));
        }
        report.remove_all_but(&[view("kept")]);
        assert!(dir.path().join("kept").exists() && !dir.path().join("stray").exists());
        assert_eq!(report.saved.len(), 1);
    }
}
