//! S: a farm of files in a Postgres and, if that is wished, a bucket: the bulk while the farm runs, the rest while it does not.
//!
//! A pass takes the database as it is at one moment and brings what the target lacks: objects, logs, rows. The last pass runs with
//! the farm's lock held, counts and sums up every table on both sides, and only then says in the target that it is whole; until
//! then no orchestrator starts on it. Whatever was brought stays when a move is cut off: the next one goes on.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use alloy_shared::env::{Env, Ms};
use alloy_shared::id::Digest;
use alloy_shared::runtime::random_bytes;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::backup::list::{self, Head, ListError};
use crate::backup::{BackupError, DATABASE, OBJECTS, copy, hash, make_dir, settle};
use crate::blobs::mark::{Elsewhere, bucket_of};
use crate::blobs::{BlobError, BlobKey, Blobs, OpenS3, off_thread};
use crate::broken::Care;
use crate::config::S3;
use crate::logs::LogError;
use crate::store::sql::backup::{Needs, copy_at_once, examine, meta_of, needs_of, schema, upgrade};
use crate::store::sql::tables::{Known, Tables, Tallies, bring};
use crate::store::sql::target::MoveLock;
use crate::store::sql::{DataLock, OpenError, SqlStore, shown_address};
use crate::store::{Group, Store as _, StoreError, Write};
use crate::{BYTES_PLACE, FARM_SECRET, bytes_place, farm_mark};

mod journal;
mod logs;
pub mod mark;
mod objects;

use journal::{Brought, Journal};
use mark::{Gone, MovedAway};

/// In the target: of which farm it is, under which name it was begun, and that it is whole.
const FROM: &str = "migrate.from";
const ID: &str = "migrate.id";
const VERIFIED: &str = "migrate.verified";
/// In a target that was restored: when.
pub(crate) const RESTORED: &str = "restored";
/// What a move needs beside the farm.
const WORK: &str = "moving";
const JOURNAL: &str = "journal";
const BLOBS: &str = "blobs";
/// A pass that cost no more is no reason for another one before the last: so many bytes, and so many more for each object and log.
const LITTLE: u64 = 64 << 20;
const EACH: u64 = 128 << 10;
/// Before the last one.
const PASSES: usize = 10;
const LOCK_TRIES: u32 = 25;
const LOCK_PAUSE_MS: u64 = 200;

#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    #[error("there is no farm in {}: it holds no {DATABASE}", .0.display())]
    NoFarm(PathBuf),
    #[error("{0} holds a farm already")]
    Occupied(String),
    #[error("{} holds a farm already, or parts of one; name another --data-dir", .0.display())]
    InUse(PathBuf),
    #[error("another move into {0} is running")]
    Busy(String),
    #[error("the objects of this farm lie in {0} already, and stay there")]
    InBucket(String),
    #[error(
        "{0} holds the objects of another farm, and each would remove the other's: every farm needs a prefix of its own"
    )]
    NotOurs(String),
    /// Each names what it is.
    #[error("the farm has lost or damaged {}: {}", if .0.len() == 1 { "something" } else { "some things" }, .0.join("; "))]
    Damaged(Vec<String>),
    #[error("{what} came out wrong where it was brought: {why}")]
    Wrong { what: String, why: String },
    #[error(
        "table {table}: {here} rows here and {there} there, and they are not the same; begin anew with an empty database"
    )]
    Differs { table: &'static str, here: u64, there: u64 },
    #[error("{} is no backup that can be restored: {error}", dir.display())]
    List { dir: PathBuf, error: ListError },
    #[error("the backup is damaged: {path} {why}")]
    BadBackup { path: String, why: &'static str },
    #[error(transparent)]
    Gone(#[from] MovedAway),
    #[error(transparent)]
    Place(#[from] Elsewhere),
    #[error(transparent)]
    Database(#[from] OpenError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Bucket(#[from] OpenS3),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> MoveError + '_ {
    move |error| MoveError::Io { path: path.to_owned(), error }
}

/// Where a farm goes.
#[derive(Debug, Clone)]
pub struct To {
    /// The address of a Postgres that holds nothing.
    pub database: String,
    /// Absent: objects stay where they are.
    pub bucket: Option<S3>,
}

/// What a pass has looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    pub rows: u64,
    pub objects: u64,
    pub logs: u64,
    pub bytes: u64,
}

/// Told now and then how far a pass is.
pub type Heard = Arc<dyn Fn(&Counts) + Send + Sync>;

/// How a move stands.
pub enum Begun {
    Going(Box<Mover>),
    /// It is whole already.
    Done {
        to: String,
    },
}

pub struct Mover {
    /// The farm's directory, or a backup of one.
    farm: PathBuf,
    work: PathBuf,
    shown: String,
    sql: SqlStore,
    tables: Tables,
    known: Known,
    journal: Journal,
    /// Where objects and long logs go. Absent: objects stay, logs are rows at first.
    blobs: Option<Arc<Blobs>>,
    bucket: Option<S3>,
    /// How long each object is there.
    there: Option<HashMap<BlobKey, u64>>,
    damaged: Vec<String>,
    counts: Counts,
    /// What each pass has cost, by what it brought.
    passes: Vec<u64>,
    heard: Heard,
    _lock: MoveLock,
}

impl Mover {
    /// Looks at both sides, and takes the target for this farm.
    pub async fn open(farm: &Path, to: To, heard: Heard, env: Arc<dyn Env>) -> Result<Begun, MoveError> {
        match Self::begin(farm, &farm.join(WORK), None, to, heard, env).await? {
            // The mark was set before the move was called whole. Somebody has removed it, and run the farm here since.
            Begun::Done { to } if mark::gone(farm)?.is_none() => Err(MoveError::Occupied(to)),
            begun => Ok(begun),
        }
    }

    /// `files`: where what stays files is brought to. Until the target is this farm's, nothing is made beside either of them.
    async fn begin(
        farm: &Path,
        work: &Path,
        files: Option<&Path>,
        to: To,
        heard: Heard,
        env: Arc<dyn Env>,
    ) -> Result<Begun, MoveError> {
        if !farm.join(DATABASE).is_file() {
            return Err(MoveError::NoFarm(farm.to_owned()));
        }
        let shown = shown_address(&to.database)?;
        if let Some(gone) = mark::gone(farm)?.filter(|gone| gone.to != shown) {
            return Err(MovedAway::To { to: gone.to, file: farm.join("moved") }.into());
        }
        if let (Some(has), Some(asked)) = (bucket_of(farm)?, &to.bucket)
            && has != asked.url()
        {
            return Err(MoveError::InBucket(has));
        }
        let sql = SqlStore::open_shared(&to.database, "alloy admin".to_owned()).await?;
        let Some(lock) = patient_lock(&to.database, &*env).await? else { return Err(MoveError::Busy(shown)) };
        let path = work.join(JOURNAL);
        if let Some(files) = files.filter(|files| files.join(BLOBS).exists()) {
            let begun = Journal::of(&path).map_err(at(&path))?;
            if begun.is_none() || begun != sql.meta(ID).await? {
                return Err(MoveError::InUse(files.to_owned()));
            }
        }
        let secret = meta_of(&farm.join(DATABASE), FARM_SECRET).await?.unwrap_or_default();
        let owner = farm_mark(&secret);
        let id = claim(&sql, &owner.to_string(), &shown).await?;
        if sql.meta(VERIFIED).await?.is_some() {
            let _ = fs::remove_dir_all(work);
            return Ok(Begun::Done { to: shown });
        }
        let mut tables = Tables::postgres(&to.database).await?;
        let mut known = Known::default();
        tables.tally(Some(&mut known)).await?;
        let place = to.bucket.as_ref().map(S3::url).unwrap_or_default();
        make_dir(work).map_err(at(work))?;
        let journal = Journal::open(&path, &format!("{id} {place}")).map_err(at(&path))?;
        let blobs = match &to.bucket {
            Some(place) => Some(Arc::new(claimed(place, work, &owner, env).await?)),
            None => None,
        };
        Ok(Begun::Going(Box::new(Self {
            farm: farm.to_owned(),
            work: work.to_owned(),
            shown,
            sql,
            tables,
            known,
            journal,
            blobs,
            bucket: to.bucket,
            there: None,
            damaged: Vec::new(),
            counts: Counts::default(),
            passes: Vec::new(),
            heard,
            _lock: lock,
        })))
    }

    /// Brings all that there is by now. The farm may run meanwhile.
    pub async fn bulk(&mut self) -> Result<Counts, MoveError> {
        let snapshot = self.snapshot().await?;
        let needs = examine(&snapshot).await?;
        self.pass(&snapshot, &needs).await?;
        Ok(self.counts.clone())
    }

    /// Whether much came while the farm was copied that another pass can bring before the last one, during which it stands still.
    pub fn lags(&self) -> bool {
        worth_another(&self.passes)
    }

    /// The database, as people may see it.
    pub fn to(&self) -> &str {
        &self.shown
    }

    /// What the farm has lost or damaged, by now.
    pub fn damaged(&self) -> &[String] {
        &self.damaged
    }

    /// Brings what has changed since, verifies everything, and makes the target the farm. `leave`: what is damaged here is left out
    /// there. Nobody else runs the farm: the lock says so.
    pub async fn finish(mut self, _lock: &DataLock, leave: bool) -> Result<(Counts, Vec<String>), MoveError> {
        let snapshot = self.snapshot().await?;
        let needs = needs_of(&snapshot).await?;
        self.whole(&snapshot, &needs, leave).await?;
        let bucket = self.bucket.as_ref().map(S3::url);
        let stays = bucket_of(&self.farm)?;
        let place = bytes_place(&self.farm, bucket.as_deref().or(stays.as_deref()))?;
        let gone = Gone { to: self.shown.clone(), bucket };
        mark::set(&self.farm, &gone).map_err(at(&self.farm))?;
        self.say_whole(place, None).await
    }

    /// The database as it is now, in a file of its own, with the tables of this version.
    async fn snapshot(&self) -> Result<PathBuf, MoveError> {
        let path = self.work.join(DATABASE);
        for left in ["", "-wal", "-shm", ".open"] {
            remove(&self.work.join(format!("{DATABASE}{left}")))?;
        }
        copy_at_once(&self.farm.join(DATABASE), &path).await?;
        upgrade(&path).await?;
        Ok(path)
    }

    async fn pass(&mut self, snapshot: &Path, needs: &Needs) -> Result<Tallies, MoveError> {
        (self.damaged, self.counts) = (Vec::new(), Counts::default());
        self.passes.push(0);
        self.bring_objects(needs).await?;
        self.bring_logs(needs).await?;
        let mut from = Tables::file(snapshot).await?;
        let tallies = bring(&mut from, &mut self.tables, &mut self.known).await?;
        from.close().await?;
        self.counts.rows = tallies.iter().map(|(_, tally)| tally.rows).sum();
        Ok(tallies)
    }

    /// What lies there as it is here.
    fn brought(&mut self, what: Brought) -> Result<(), MoveError> {
        if let Some(cost) = self.passes.last_mut() {
            *cost += what.len + EACH;
        }
        self.journal.add(what).map_err(at(&self.work))
    }

    /// The last pass, and the comparison of both sides.
    async fn whole(&mut self, snapshot: &Path, needs: &Needs, leave: bool) -> Result<(), MoveError> {
        self.tables.begin().await?;
        let here = self.pass(snapshot, needs).await?;
        if !self.damaged.is_empty() && !leave {
            return Err(MoveError::Damaged(self.damaged.clone()));
        }
        let there = self.tables.tally(None).await?;
        for ((table, here), (_, there)) in here.iter().zip(&there) {
            if here != there {
                return Err(MoveError::Differs { table, here: here.rows, there: there.rows });
            }
        }
        Ok(self.tables.commit().await?)
    }

    /// From here on an orchestrator starts on the target.
    async fn say_whole(self, place: String, restored: Option<Ms>) -> Result<(Counts, Vec<String>), MoveError> {
        let Counts { rows, objects, logs, .. } = self.counts;
        let mut writes = vec![
            Write::AddMeta { name: VERIFIED, value: format!("{rows} {objects} {logs}") },
            Write::AddMeta { name: BYTES_PLACE, value: place },
        ];
        if let Some(at) = restored {
            writes.push(Write::AddMeta { name: RESTORED, value: at.0.to_string() });
        }
        self.sql.commit(&[Group(writes)]).await?;
        self.tables.close().await?;
        self.sql.close().await;
        let _ = fs::remove_dir_all(&self.work);
        Ok((self.counts, self.damaged))
    }
}

/// A pass brings what came while the one before ran. Where that is no less, the farm grows as fast as it is brought.
fn worth_another(passes: &[u64]) -> bool {
    let fewer = passes.is_sorted_by(|before, new| new < before);
    fewer && passes.len() < PASSES && passes.last().is_some_and(|cost| *cost > LITTLE)
}

/// A database notices only after a moment that a process is gone that held it.
async fn patient_lock(database: &str, env: &dyn Env) -> Result<Option<MoveLock>, OpenError> {
    for _ in 0..LOCK_TRIES {
        if let Some(lock) = MoveLock::take(database).await? {
            return Ok(Some(lock));
        }
        env.sleep_until(env.now().mono + LOCK_PAUSE_MS).await;
    }
    Ok(None)
}

/// The bucket, once it is this farm's.
async fn claimed(place: &S3, work: &Path, owner: &Digest, env: Arc<dyn Env>) -> Result<Blobs, MoveError> {
    let blobs = Blobs::open_s3(place, work.join("spool"), Care::default(), env).await?;
    if blobs.claim(owner).await? { Ok(blobs) } else { Err(MoveError::NotOurs(place.url())) }
}

/// Says in the target whose it is, and returns the name of the move.
async fn claim(sql: &SqlStore, from: &str, shown: &str) -> Result<String, MoveError> {
    let theirs = sql.meta(FROM).await?;
    if theirs.as_deref().is_some_and(|theirs| theirs != from)
        || theirs.is_none() && sql.meta(FARM_SECRET).await?.is_some()
    {
        return Err(MoveError::Occupied(shown.to_owned()));
    }
    let fresh = BASE64.encode(random_bytes::<16>());
    let writes = vec![Write::AddMeta { name: FROM, value: from.to_owned() }, Write::AddMeta { name: ID, value: fresh }];
    sql.commit(&[Group(writes)]).await?;
    Ok(sql.meta(ID).await?.unwrap_or_default())
}

/// False for a database into which a farm is being moved.
pub(crate) async fn check_whole(sql: &SqlStore) -> Result<bool, StoreError> {
    Ok(sql.meta(FROM).await?.is_none() || sql.meta(VERIFIED).await?.is_some())
}

/// The same for whoever reads all of it.
pub(crate) async fn is_whole(tables: &mut Tables) -> Result<bool, OpenError> {
    Ok(tables.meta(FROM).await?.is_none() || tables.meta(VERIFIED).await?.is_some())
}

fn remove(path: &Path) -> Result<(), MoveError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Makes the farm of a backup in an empty Postgres, and in `farm` what is files of it. Whoever ran that farm must not run it any
/// more.
pub async fn restore(
    backup: &Path,
    farm: &Path,
    to: To,
    now: Ms,
    heard: Heard,
    env: Arc<dyn Env>,
) -> Result<(Head, Counts), MoveError> {
    let listed = list::read(backup, schema());
    let (head, entries) = listed.map_err(|error| MoveError::List { dir: backup.to_owned(), error })?;
    let (work, shown) = (farm.join("restoring"), shown_address(&to.database)?);
    // No restore into a Postgres makes a database here. Whose the objects are that one has made is told by its journal.
    let begun = || Journal::of(&work.join(JOURNAL)).map_err(at(&work));
    if farm.join(DATABASE).exists() || farm.join(BLOBS).exists() && begun()?.is_none() {
        return Err(MoveError::InUse(farm.to_owned()));
    }
    let from = backup.to_owned();
    let entries =
        off_thread(move || entries.iter().try_for_each(|entry| checked(&from, entry)).map(|()| entries)).await?;
    let stays = to.bucket.is_none();
    let Begun::Going(mut mover) = Mover::begin(backup, &work, Some(farm), to, heard, env).await? else {
        return Err(MoveError::Occupied(shown));
    };
    let (from, files) = (backup.to_owned(), farm.to_owned());
    off_thread(move || {
        let own = |path: &str| path == "admin.token" || path.starts_with("worker/");
        let kept = entries.iter().filter(|entry| own(&entry.path) || stays && entry.path.starts_with(OBJECTS));
        for entry in kept {
            let (source, target) = (from.join(&entry.path), files.join(&entry.path));
            make_dir(target.parent().unwrap_or(&files)).map_err(at(&target))?;
            remove(&target)?;
            copy(&source, &target, None).map_err(at(&source))?;
        }
        settle(&files).map_err(at(&files))
    })
    .await?;
    let database = mover.snapshot().await?;
    let needs = examine(&database).await?;
    // What the farm had lost by then its backup has not.
    mover.whole(&database, &needs, true).await?;
    let place = bytes_place(farm, mover.bucket.as_ref().map(S3::url).as_deref())?;
    let (counts, _) = mover.say_whole(place, Some(now)).await?;
    Ok((head, counts))
}

fn checked(from: &Path, entry: &list::Entry) -> Result<(), MoveError> {
    let path = from.join(&entry.path);
    let bad = |why| MoveError::BadBackup { path: entry.path.clone(), why };
    if !path.is_file() {
        return Err(bad("is not there"));
    }
    let (size, sha256) = hash(&path).map_err(at(&path))?;
    match (size == entry.size, sha256 == entry.sha256) {
        (true, true) => Ok(()),
        (false, _) => Err(bad("has another length")),
        (true, false) => Err(bad("has other bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_end_with_one_that_brings_little_or_no_less_than_the_one_before() {
        assert!(worth_another(&[LITTLE + 1]) && worth_another(&[9 * LITTLE, 2 * LITTLE]));
        assert!(!worth_another(&[0]) && !worth_another(&[LITTLE]) && !worth_another(&[9 * LITTLE, LITTLE]));
        assert!(!worth_another(&[2 * LITTLE, 2 * LITTLE]) && !worth_another(&[2 * LITTLE, 3 * LITTLE]));
        let ever: Vec<u64> = (0..20).map(|pass| 2 * LITTLE - pass).collect();
        assert!(worth_another(&ever[..PASSES - 1]) && !worth_another(&ever[..PASSES]));
    }
}
