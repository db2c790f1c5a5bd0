//! S: sends what the farm does not have: the manifest, then packs of missing blobs, then the manifest again until it is whole.

use std::collections::HashSet;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use alloy_shared::client::{Client, ClientError};
use alloy_shared::env::{Env, Mono, backoff};
use alloy_shared::id::Digest;
use alloy_shared::limits::{FRAME_TARGET, PACK_MAX};
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::source::PackFrame;
use bytes::Bytes;
use indicatif::ProgressBar;
use tokio::sync::mpsc;

use super::{Scan, piece_len, walk};
use crate::output::Failure;
use crate::output::talk::Talk;

/// Times that the farm takes all that it misses and then misses more. One suffices.
const ROUNDS: u32 = 5;
/// So long an upload goes on trying without getting anywhere: a farm restarts in less.
pub(crate) const STALLED_MS: u64 = 120_000;
const ROUND_BASE_MS: u64 = 200;
const ROUND_CAP_MS: u64 = 5_000;
/// Frames packed ahead of the network.
const FRAMES_AHEAD: usize = 4;
const PACKERS_MAX: usize = 8;
/// Blobs in one frame: their list stands in the frame's header.
const FRAME_BLOBS_MAX: usize = 4_096;
/// What a blob costs in its frame's header, at most.
const HEADER_BYTES_PER_BLOB: u64 = 112;
/// Source code shrinks tenfold at this level, faster than most networks take it.
const LEVEL: i32 = 3;

/// What an upload moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Bytes of the tree that the farm did not have.
    pub(crate) new_bytes: u64,
    /// The same, compressed.
    pub(crate) sent_bytes: u64,
}

/// How long an upload waits for a farm that does not answer.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Patience {
    /// Until it has answered once.
    pub(crate) first_ms: u64,
    /// Later, since something last moved and the first error after it.
    pub(crate) stalled_ms: u64,
}

/// A piece of a file that the farm asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    digest: Digest,
    entry: usize,
    offset: u64,
    len: u32,
}

type Frame = Vec<Piece>;

/// Makes the farm have the whole tree; gives the manifest's digest.
pub(crate) async fn upload(
    client: &Client,
    env: &dyn Env,
    scan: &Arc<Scan>,
    talk: &Talk,
    patience: Patience,
) -> Result<(Digest, Moved), Failure> {
    let manifest = Bytes::from(scan.manifest.encode());
    let digest = Digest::of(&manifest);
    let mut moved = Moved::default();
    let (mut rounds, mut stuck) = (0, Stuck::default());
    let mut fewest_missing = usize::MAX;
    let mut answered = false;
    let mut trouble = Trouble::default();
    loop {
        let answer = match client.put_source(&digest, manifest.clone()).await {
            Ok(status) if status.complete => {
                trouble.over(talk);
                return Ok((digest, moved));
            }
            Ok(status) => {
                trouble.over(talk);
                answered = true;
                let packs = plan(scan, &status.missing.iter().copied().collect());
                if packs.is_empty() {
                    let why = "the farm says that the source is incomplete, and that nothing is missing";
                    return Err(Failure::error(why));
                }
                if status.missing.len() < fewest_missing {
                    fewest_missing = status.missing.len();
                    stuck = Stuck::default();
                }
                let before = moved.new_bytes;
                let sent = send(client, scan, packs, &mut moved, talk).await?;
                // Some packs arrived, if not all of them.
                if moved.new_bytes > before {
                    stuck = Stuck::default();
                }
                sent
            }
            Err(error) => Err(error),
        };
        let Err(error) = answer else {
            rounds += 1;
            if rounds == ROUNDS {
                return Err(Failure::error(format!("after {ROUNDS} rounds the farm still misses parts of the source")));
            }
            continue;
        };
        answered |= matches!(error, ClientError::Problem(_));
        let patience_ms = if answered { patience.stalled_ms } else { patience.first_ms };
        let left_ms = stuck.left_ms(env.now().mono, patience_ms);
        match pause_ms(&error, backoff(stuck.tries, ROUND_BASE_MS, ROUND_CAP_MS, env.dice()), left_ms) {
            Some(pause_ms) => {
                trouble.tell(talk, &error);
                env.sleep_until(env.now().mono + pause_ms).await;
            }
            None => return Err(Failure::of(error, client.url())),
        }
    }
}

/// Errors since something last moved.
#[derive(Debug, Default)]
struct Stuck {
    tries: u32,
    since: Option<Mono>,
}

impl Stuck {
    /// Counts an error. The patience for it begins with the first one: however long an upload takes, it is not over with it.
    fn left_ms(&mut self, now: Mono, patience_ms: u64) -> u64 {
        self.tries += 1;
        patience_ms.saturating_sub(now.since(*self.since.get_or_insert(now)))
    }
}

/// Until the next try, if one is worth it before the patience that is left is over: as long as the farm asks for, where it
/// does.
fn pause_ms(error: &ClientError, backoff_ms: u64, left_ms: u64) -> Option<u64> {
    let again = match error {
        ClientError::Unreachable { .. } => true,
        // Room comes when a person makes some, who may be the one that reads this.
        ClientError::Problem(problem) => problem.code.is_retryable() && problem.code != ErrorCode::StorageFull,
        ClientError::Protocol { .. } => false,
    };
    again.then(|| error.retry_after_ms().max(backoff_ms)).filter(|pause_ms| *pause_ms < left_ms)
}

/// What was said of an upload that does not get on.
#[derive(Default)]
struct Trouble {
    away: bool,
    put_off: bool,
}

impl Trouble {
    fn tell(&mut self, talk: &Talk, error: &ClientError) {
        match error {
            // It answers, so there is nothing to reconnect to; that it takes the rest shows by itself.
            ClientError::Problem(_) => {
                if !std::mem::replace(&mut self.put_off, true) {
                    talk.warn(&format!("the farm does not take the source yet, trying again  {}", error.why()));
                }
            }
            ClientError::Unreachable { .. } | ClientError::Protocol { .. } => {
                if !std::mem::replace(&mut self.away, true) {
                    talk.warn(&format!("reconnecting…  {}", error.why()));
                }
            }
        }
    }

    fn over(&mut self, talk: &Talk) {
        if std::mem::take(&mut self.away) {
            talk.say("reconnected");
        }
    }
}

/// Sends packs one after the other. The outer error is ours (the tree changed), the inner one the farm's or the network's.
async fn send(
    client: &Client,
    scan: &Arc<Scan>,
    packs: Vec<Vec<Frame>>,
    moved: &mut Moved,
    talk: &Talk,
) -> Result<Result<(), ClientError>, Failure> {
    let total = packs.iter().flatten().flatten().map(|piece| u64::from(piece.len)).sum();
    let bar = talk.bytes_bar("Uploading", total);
    let sent = Arc::new(AtomicU64::new(0));
    let mut outcome = Ok(());
    for frames in packs {
        let new_bytes: u64 = frames.iter().flatten().map(|piece| u64::from(piece.len)).sum();
        let work = Arc::new(Work {
            scan: scan.clone(),
            frames,
            next: AtomicUsize::new(0),
            fault: Mutex::new(None),
            bar: bar.clone(),
            sent: sent.clone(),
        });
        outcome = work.clone().run(client).await?;
        if let Some(failure) = work.fault.lock().unwrap_or_else(PoisonError::into_inner).take() {
            bar.finish_and_clear();
            return Err(failure);
        }
        if outcome.is_err() {
            break;
        }
        moved.new_bytes += new_bytes;
    }
    moved.sent_bytes += sent.load(Ordering::Relaxed);
    bar.finish_and_clear();
    Ok(outcome)
}

/// One pack, made by several threads that take its frames in turn.
struct Work {
    scan: Arc<Scan>,
    frames: Vec<Frame>,
    next: AtomicUsize,
    fault: Mutex<Option<Failure>>,
    bar: ProgressBar,
    sent: Arc<AtomicU64>,
}

impl Work {
    async fn run(self: Arc<Self>, client: &Client) -> Result<Result<(), ClientError>, Failure> {
        let (tx, rx) = mpsc::channel(FRAMES_AHEAD);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        for _ in 0..cores.min(PACKERS_MAX).min(self.frames.len()) {
            let (work, tx) = (self.clone(), tx.clone());
            std::thread::Builder::new()
                .name("pack".into())
                .spawn(move || work.pack(&tx))
                .map_err(|error| Failure::io("a thread for packing", &error))?;
        }
        drop(tx);
        // The pack ends when the last thread has dropped its end: what it found wrong is then known.
        let sent = self.sent.clone();
        let count = move |bytes| {
            sent.fetch_add(bytes, Ordering::Relaxed);
        };
        Ok(client.send_pack(rx, count).await.map(|_| ()))
    }

    fn pack(&self, tx: &mpsc::Sender<PackFrame>) {
        while let Some(frame) = self.frames.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            match self.frame(frame) {
                Ok(packed) => {
                    if tx.blocking_send(packed).is_err() {
                        return;
                    }
                    self.bar.inc(frame.iter().map(|piece| u64::from(piece.len)).sum());
                }
                Err(failure) => {
                    *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
                    // Nobody else need start on a frame of a pack that is lost.
                    self.next.store(self.frames.len(), Ordering::Relaxed);
                    return;
                }
            }
        }
    }

    fn frame(&self, pieces: &[Piece]) -> Result<PackFrame, Failure> {
        let blobs: Result<Vec<_>, Failure> =
            pieces.iter().map(|piece| Ok((piece.digest, read(&self.scan, piece)?))).collect();
        Ok(PackFrame::pack(&blobs?, LEVEL))
    }
}

/// The piece's bytes, if they are still those that were hashed.
fn read(scan: &Scan, piece: &Piece) -> Result<Bytes, Failure> {
    let path = &scan.manifest.entries()[piece.entry].path;
    let mut bytes = Vec::with_capacity(piece.len as usize);
    let mut read = || {
        let mut file = walk::open(&scan.root.join(path))?;
        file.seek(SeekFrom::Start(piece.offset))?;
        file.take(u64::from(piece.len)).read_to_end(&mut bytes)
    };
    match read() {
        Ok(_) if Digest::of(&bytes) == piece.digest => Ok(bytes.into()),
        Ok(_) => Err(walk::changed(path, "was written to")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(walk::changed(path, "vanished")),
        Err(error) => Err(walk::changed(path, &format!("cannot be read any more ({error})"))),
    }
}

/// Missing blobs → pieces, in the tree's order → frames of about a MiB → packs that fit into one request.
fn plan(scan: &Scan, missing: &HashSet<Digest>) -> Vec<Vec<Frame>> {
    let mut planned = HashSet::new();
    let (mut packs, mut pack, mut frame) = (Vec::new(), Vec::new(), Frame::new());
    let (mut frame_bytes, mut pack_bytes) = (0u64, 0u64);
    for piece in pieces(scan) {
        if !missing.contains(&piece.digest) || !planned.insert(piece.digest) {
            continue;
        }
        let len = u64::from(piece.len);
        if !frame.is_empty() && (frame_bytes + len > FRAME_TARGET as u64 || frame.len() == FRAME_BLOBS_MAX) {
            pack.push(std::mem::take(&mut frame));
            frame_bytes = 0;
        }
        if pack_bytes + len + HEADER_BYTES_PER_BLOB > PACK_MAX - (1 << 20) {
            if !frame.is_empty() {
                pack.push(std::mem::take(&mut frame));
                frame_bytes = 0;
            }
            packs.push(std::mem::take(&mut pack));
            pack_bytes = 0;
        }
        frame_bytes += len;
        pack_bytes += len + HEADER_BYTES_PER_BLOB;
        frame.push(piece);
    }
    if !frame.is_empty() {
        pack.push(frame);
    }
    if !pack.is_empty() {
        packs.push(pack);
    }
    packs
}

fn pieces(scan: &Scan) -> impl Iterator<Item = Piece> {
    scan.manifest.entries().iter().enumerate().flat_map(|(n, entry)| {
        let len = piece_len(entry.size);
        entry.chunks.iter().enumerate().map(move |(i, digest)| {
            let offset = i as u64 * len;
            Piece { digest: *digest, entry: n, offset, len: (entry.size - offset).min(len) as u32 }
        })
    })
}

#[cfg(test)]
mod tests {
    use alloy_shared::wire::Problem;
    use alloy_shared::wire::source::{Entry, EntryKind, Manifest};

    use super::*;

    fn scan_of(files: &[(&str, Vec<u8>)]) -> (tempfile::TempDir, Scan) {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let scan = super::super::scan(dir.path(), false).unwrap();
        (dir, scan)
    }

    #[test]
    fn patience_with_errors_begins_with_the_first_and_not_with_the_upload() {
        let mut stuck = Stuck::default();
        let hour = 3_600_000;
        assert_eq!(stuck.left_ms(Mono(hour), STALLED_MS), STALLED_MS);
        assert_eq!(stuck.left_ms(Mono(hour + STALLED_MS - 1), STALLED_MS), 1);
        assert_eq!((stuck.left_ms(Mono(hour + STALLED_MS), STALLED_MS), stuck.tries), (0, 3));
    }

    #[test]
    fn every_missing_blob_is_planned_once_and_reads_back() {
        let large: Vec<u8> = (0..9 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let (_dir, scan) = scan_of(&[
            ("a", b"same".to_vec()),
            ("b", b"same".to_vec()),
            ("c", vec![7; 700 << 10]),
            ("d", vec![8; 700 << 10]),
            ("large", large),
            ("none", Vec::new()),
        ]);
        let all: HashSet<Digest> = scan.manifest.blobs().into_iter().collect();
        let packs = plan(&scan, &all);
        assert_eq!(packs.len(), 1);
        let pieces: Vec<Piece> = packs.into_iter().flatten().flatten().collect();
        assert_eq!(pieces.iter().map(|piece| piece.digest).collect::<HashSet<_>>(), all);
        assert_eq!(pieces.len(), all.len());
        for piece in &pieces {
            assert_eq!(Digest::of(&read(&scan, piece).unwrap()), piece.digest);
        }
        let some: HashSet<Digest> = all.iter().take(2).copied().collect();
        assert_eq!(plan(&scan, &some).into_iter().flatten().flatten().count(), 2);
        assert!(plan(&scan, &HashSet::new()).is_empty());
    }

    #[test]
    fn frames_and_packs_stay_within_their_bounds() {
        let entries = (0..400u64).map(|n| Entry {
            path: format!("f{n:04}"),
            kind: EntryKind::File,
            mode: 0o644,
            size: 3 << 20,
            chunks: vec![Digest::of(&n.to_be_bytes())],
            target: None,
        });
        let manifest = Manifest::new(entries.collect()).unwrap();
        let all = manifest.blobs().into_iter().collect();
        let scan = Scan { root: "/".into(), manifest, warnings: Vec::new(), secrets: Default::default() };
        let packs = plan(&scan, &all);
        assert_eq!(packs.iter().flatten().flatten().count(), 400);
        assert!(packs.len() > 2);
        for pack in &packs {
            assert!(pack.iter().flatten().map(|piece| u64::from(piece.len)).sum::<u64>() <= PACK_MAX);
            assert!(pack.iter().all(|frame| frame.len() == 1));
        }
    }

    #[test]
    fn another_try_waits_as_long_as_the_farm_asks_and_a_full_disk_is_none() {
        let problem =
            |code, retry_after_s| ClientError::Problem(Problem { retry_after_s, ..Problem::new(code, "it says so") });
        let gone = ClientError::Unreachable { url: "http://farm".into(), why: "reset".into(), unknown_host: false };
        for (error, expected) in [
            (gone, Some(300)),
            (problem(ErrorCode::Unavailable, None), Some(300)),
            (problem(ErrorCode::TooManyRequests, Some(10)), Some(10_000)),
            (problem(ErrorCode::Unavailable, Some(119)), Some(119_000)),
            (problem(ErrorCode::Unavailable, Some(120)), None),
            (problem(ErrorCode::Unavailable, Some(u64::MAX)), None),
            (problem(ErrorCode::StorageFull, Some(10)), None),
            (problem(ErrorCode::InvalidSource, None), None),
            (ClientError::protocol("who?"), None),
        ] {
            assert_eq!(pause_ms(&error, 300, STALLED_MS), expected, "{error}");
            assert_eq!(pause_ms(&error, 300, 0), None, "{error}");
        }
    }

    #[test]
    fn a_file_that_changes_before_it_is_sent_is_named() {
        let (dir, scan) = scan_of(&[("steady", b"1".to_vec()), ("moving.txt", b"before".to_vec())]);
        let all = scan.manifest.blobs().into_iter().collect();
        let pieces: Vec<Piece> = plan(&scan, &all).into_iter().flatten().flatten().collect();
        std::fs::write(dir.path().join("moving.txt"), b"after!").unwrap();
        let failure = pieces.iter().find_map(|piece| read(&scan, piece).err()).unwrap();
        assert!(failure.message.contains("moving.txt was written to"), "{}", failure.message);
        std::fs::remove_file(dir.path().join("moving.txt")).unwrap();
        let failure = pieces.iter().find_map(|piece| read(&scan, piece).err()).unwrap();
        assert!(failure.message.contains("moving.txt vanished"), "{}", failure.message);
    }
}
