//! S: a backup of a farm that keeps some of it elsewhere: its books in a Postgres, its objects in a bucket. What comes out is what
//! a farm of files gives: the books as an SQLite file, objects with seals, logs as files, so that any backup goes back to either.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use alloy_shared::env::Env;
use alloy_shared::id::AttemptRef;
use futures_util::stream::{self, FuturesUnordered};
use futures_util::{StreamExt as _, TryStreamExt as _};
use sqlx::postgres::PgConnection;
use tokio_util::sync::CancellationToken;

use super::part::{self, unless_stopped};
use super::{BackupError, Copy, DATABASE, LOGS, OBJECTS, Taken, at, make_dir, parent};
use crate::blobs::mark::{compare, compare_books};
use crate::blobs::{BlobError, BlobKey, Blobs};
use crate::broken::Care;
use crate::config::S3;
use crate::moving::{is_whole, mark};
use crate::store::sql::backup::{Needs, copy_at_once, examine, meta_of};
use crate::store::sql::chunks::Part;
use crate::store::sql::tables::{Tables, copy_to_file};
use crate::store::sql::target::LogsThen;
use crate::sums::Sums;
use crate::{BYTES_PLACE, FARM_SECRET};

/// Objects that are copied at once, and logs, each over a connection of its own.
const AT_ONCE: usize = 8;
/// Log bytes that are read at once.
const WINDOW: u64 = 4 << 20;

/// Where a farm keeps what.
#[derive(Debug, Clone)]
pub struct Source<'a> {
    /// An orchestrator's data.
    pub farm: &'a Path,
    /// The address of its Postgres. Absent: its books are a file.
    pub database: Option<&'a str>,
    /// Absent: its objects are files.
    pub bucket: Option<&'a S3>,
}

/// Takes a backup into `target`, which must not exist. Who says `stop` waits for the end all the same.
pub async fn take(
    source: Source<'_>,
    target: &Path,
    taken_at: String,
    env: Arc<dyn Env>,
    stop: &CancellationToken,
) -> Result<Taken, BackupError> {
    let bucket = source.bucket.map(S3::url);
    if source.database.is_none() {
        if !source.farm.join(DATABASE).is_file() {
            return Err(BackupError::NoFarm(source.farm.to_owned()));
        }
        mark::check(source.farm)?;
        compare(source.farm, bucket.as_deref())?;
    }
    if fs::symlink_metadata(target).is_ok() {
        return Err(BackupError::Exists(target.to_owned()));
    }
    let part = part::Part::begin(target)?;
    let copy = Copy::new(source.farm, part.path(), stop.clone());
    let taken = unless_stopped(stop, fill(source, copy, taken_at, env)).await;
    part.end(target, taken).await
}

async fn fill(
    source: Source<'_>,
    mut copy: Copy<'_>,
    taken_at: String,
    env: Arc<dyn Env>,
) -> Result<Taken, BackupError> {
    let (part, bucket) = (copy.part, source.bucket.map(S3::url));
    let database = part.join(DATABASE);
    let mut tables = match source.database {
        Some(url) => Some(Tables::postgres(url).await?),
        None => None,
    };
    match &mut tables {
        Some(tables) => {
            if tables.versions().await?.is_empty() || !is_whole(tables).await? {
                return Err(BackupError::NoFarmThere);
            }
            tables.refuse_newer().await?;
            if let Some(kept) = tables.meta(BYTES_PLACE).await? {
                compare_books(&kept, source.farm, bucket.as_deref())?;
            }
            tables.hold_still().await?;
            copy_to_file(tables, &database).await?;
        }
        None => copy_at_once(&source.farm.join(DATABASE), &database).await?,
    }
    if meta_of(&database, FARM_SECRET).await?.is_none() {
        return Err(BackupError::NoFarmThere);
    }
    let needs = examine(&database).await?;
    copy.books()?;
    let from = match source.bucket {
        Some(place) => Blobs::open_s3(place, part.join("spool"), Care::default(), env.clone()).await?,
        None => Blobs::look(source.farm.join("blobs")),
    };
    objects(&mut copy, &from, &needs, &*env).await?;
    match (tables, source.database) {
        (Some(tables), Some(url)) => logs(&mut copy, &from, tables, url).await?,
        (None, _) | (_, None) => copy.logs()?,
    }
    let taken = copy.finish(&needs, taken_at)?;
    for name in ["spool", "blobs/tmp", "blobs/partial"] {
        let path = part.join(name);
        if path.exists() {
            fs::remove_dir_all(&path).map_err(at(&path))?;
        }
    }
    Ok(taken)
}

/// Every object that the database names.
async fn objects(copy: &mut Copy<'_>, from: &Blobs, needs: &Needs, env: &dyn Env) -> Result<(), BackupError> {
    if needs.objects.is_empty() {
        return Ok(());
    }
    let to = Blobs::open(copy.part.join("blobs"), env.now().wall, Care::default()).await?;
    let sizes = sizes(from).await?;
    // One that is not there is told in the end.
    let found = needs.objects.iter().filter_map(|object| sizes.get_key_value(&BlobKey::parse(object)?));
    let bring = async |(key, size): (&BlobKey, &u64)| {
        let brought = match from.read(key, 0..*size).await {
            Ok(body) => to.put(key, body, key.digest()).await.map(drop),
            Err(error) => Err(error),
        };
        (key.clone(), brought)
    };
    let mut bringing = stream::iter(found).map(bring).buffer_unordered(AT_ONCE);
    while let Some((key, brought)) = bringing.next().await {
        match brought {
            Ok(()) => {}
            Err(error @ (BlobError::Damaged(_) | BlobError::Digest { .. } | BlobError::Body(_))) => {
                copy.missing.push(format!("{OBJECTS}/{key} is damaged: {error}"));
            }
            Err(BlobError::Missing(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    drop(bringing);
    copy.add_dir(OBJECTS)
}

/// How long every object is.
pub(crate) async fn sizes(blobs: &Blobs) -> Result<HashMap<BlobKey, u64>, BlobError> {
    let (mut sizes, mut after) = (HashMap::new(), None);
    loop {
        let page = match blobs.list("", after.as_ref()).await {
            // A farm that never had an object.
            Err(BlobError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => return Ok(sizes),
            page => page?,
        };
        let Some(last) = page.last() else { return Ok(sizes) };
        after = Some(last.key.clone());
        sizes.extend(page.into_iter().map(|object| (object.key, object.size)));
    }
}

/// Every log, over some connections that all see what the first one does.
async fn logs(copy: &mut Copy<'_>, blobs: &Blobs, mut tables: Tables, url: &str) -> Result<(), BackupError> {
    let mut first = tables.another(url).await?;
    let all = LogsThen(&mut first).all().await?;
    let mut shares = vec![Vec::new(); AT_ONCE.min(all.len())];
    for (number, attempt) in all.into_iter().enumerate() {
        let share = number % shares.len();
        shares[share].push(attempt);
    }
    let mut writing = FuturesUnordered::new();
    for share in shares {
        let (conn, part) = (tables.another(url).await?, copy.part);
        writing.push(some_logs(part, blobs, conn, share));
    }
    let (mut names, mut missing) = (Vec::new(), Vec::new());
    while let Some((some_names, some_missing)) = writing.try_next().await? {
        names.extend(some_names);
        missing.extend(some_missing);
    }
    drop(writing);
    names.sort();
    missing.sort();
    copy.missing.extend(missing);
    names.into_iter().try_for_each(|name| copy.add(name))
}

/// Writes these logs. The answer is what was written, and what of it is missing.
async fn some_logs(
    part: &Path,
    blobs: &Blobs,
    mut conn: PgConnection,
    attempts: Vec<AttemptRef>,
) -> Result<(Vec<String>, Vec<String>), BackupError> {
    let mut from = LogsThen(&mut conn);
    let (mut names, mut missing) = (Vec::new(), Vec::new());
    for attempt in attempts {
        let name = format!("{LOGS}/{}/{}", attempt.job, attempt.attempt);
        let path = part.join(format!("{name}.log"));
        make_dir(parent(&path)).map_err(at(&path))?;
        let new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let mut log = Log { file: new.map_err(at(&path))?, sums: Sums::default() };
        if let Err(why) = log.write(&attempt, blobs, &mut from).await? {
            missing.push(format!("{name}.log lacks what is behind {} bytes: {why}", log.sums.so_far()));
        }
        names.push(format!("{name}.log"));
        let Some(told) = from.seal(&attempt).await? else { continue };
        let seal = log.sums.seal();
        if (seal.len, seal.sha256) == told {
            let path = part.join(format!("{name}.seal"));
            fs::write(&path, seal.encode()).map_err(at(&path))?;
            names.push(format!("{name}.seal"));
        } else {
            missing.push(format!("{name}.log is not what its seal says"));
        }
    }
    Ok((names, missing))
}

struct Log {
    file: File,
    sums: Sums,
}

impl Log {
    /// From whatever has the next byte: where a farm was moved while a log grew, objects may lie behind rows. The inner error is
    /// what cannot be had.
    async fn write(
        &mut self,
        attempt: &AttemptRef,
        blobs: &Blobs,
        from: &mut LogsThen<'_>,
    ) -> Result<Result<(), String>, BackupError> {
        let parts = from.parts(attempt).await?;
        loop {
            let begin = self.sums.so_far();
            let part = parts.iter().find(|part| (part.start..part.end).contains(&begin));
            let done = match part {
                Some(part) => self.write_part(part, blobs).await?,
                None => self.write_rows(attempt, from).await.map(Ok)?,
            };
            if done.is_err() {
                return Ok(done);
            }
            if self.sums.so_far() == begin {
                let known = parts.iter().map(|part| part.end).max().unwrap_or(0);
                return Ok(if begin < known { Err("it has a gap".to_owned()) } else { Ok(()) });
            }
        }
    }

    /// The rest of an object.
    async fn write_part(&mut self, part: &Part, blobs: &Blobs) -> Result<Result<(), String>, BackupError> {
        let Some(key) = BlobKey::parse(&part.object) else {
            return Ok(Err(format!("{} is no object", part.object)));
        };
        while self.sums.so_far() < part.end {
            let at = self.sums.so_far();
            let len = (part.end - at).min(WINDOW) as u32;
            match blobs.read_piece(&key, at - part.start, len).await {
                Ok(bytes) => self.append(&bytes)?,
                Err(error @ (BlobError::Missing(_) | BlobError::Damaged(_))) => return Ok(Err(error.to_string())),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Ok(()))
    }

    /// As far as rows go without a gap, but not much at once.
    async fn write_rows(&mut self, attempt: &AttemptRef, from: &mut LogsThen<'_>) -> Result<(), BackupError> {
        let begin = self.sums.so_far();
        for (start, bytes) in from.rows(attempt, begin, begin + WINDOW).await? {
            let Some(skip) = self.sums.so_far().checked_sub(start) else { break };
            if let Some(news) = usize::try_from(skip).ok().and_then(|skip| bytes.get(skip..)) {
                self.append(news)?;
            }
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        self.sums.update(bytes);
        self.file.write_all(bytes).map_err(at(Path::new(LOGS)))
    }
}
