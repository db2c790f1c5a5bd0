//! S: all rows of a farm, read from one engine and written to the other: for backups, and for farms that move.

use std::collections::HashMap;
use std::path::Path;

use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use sqlx::postgres::PgConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};

use super::blob::META;
use super::conn::{Args, Conn, Row};
use super::open::{OpenError, postgres_migrations, sqlite_migrations};
use super::reach::plain_postgres;
use super::target::EXPORT_VIEW;
use super::wide::{Kind, Wide};
use super::{SqlStore, backup};

// Parents before what refers to them. What belongs to a database and not to its farm is left out.
super::statements! {
    ALL_META = "SELECT name, value FROM meta WHERE name NOT IN ('bytes_place', 'migrate.from', 'migrate.id', \
        'migrate.verified', 'restored')";
    COPY_META = "INSERT INTO meta (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = \
        excluded.value";
    ALL_WORKERS = "SELECT id, org_id, name, public_key, labels, host_labels, version, epoch, boot, draining, \
        drain_note, enrolled_at_ms, seen_at_ms, revoked FROM workers";
    COPY_WORKERS = "INSERT INTO workers (id, org_id, name, public_key, labels, host_labels, version, epoch, boot, \
        draining, drain_note, enrolled_at_ms, seen_at_ms, revoked) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, \
        $11, $12, $13, $14) ON CONFLICT (id) DO UPDATE SET org_id = excluded.org_id, name = excluded.name, \
        public_key = excluded.public_key, labels = excluded.labels, host_labels = excluded.host_labels, version = \
        excluded.version, epoch = excluded.epoch, boot = excluded.boot, draining = excluded.draining, drain_note = \
        excluded.drain_note, enrolled_at_ms = excluded.enrolled_at_ms, seen_at_ms = excluded.seen_at_ms, revoked = \
        excluded.revoked";
    ALL_TOKENS = "SELECT id, org_id, hash, kind, role, name, shown, labels, created_at_ms, expires_at_ms, \
        revoked_at_ms, used_by FROM tokens";
    COPY_TOKENS = "INSERT INTO tokens (id, org_id, hash, kind, role, name, shown, labels, created_at_ms, \
        expires_at_ms, revoked_at_ms, used_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ON \
        CONFLICT (id) DO UPDATE SET org_id = excluded.org_id, hash = excluded.hash, kind = excluded.kind, role = \
        excluded.role, name = excluded.name, shown = excluded.shown, labels = excluded.labels, created_at_ms = \
        excluded.created_at_ms, expires_at_ms = excluded.expires_at_ms, revoked_at_ms = excluded.revoked_at_ms, \
        used_by = excluded.used_by";
    ALL_MEMBERS = "SELECT user_id, org_id, role, email, created_at_ms FROM members";
    COPY_MEMBERS = "INSERT INTO members (user_id, org_id, role, email, created_at_ms) VALUES ($1, $2, $3, $4, $5) ON \
        CONFLICT (user_id, org_id) DO UPDATE SET role = excluded.role, email = excluded.email, created_at_ms = \
        excluded.created_at_ms";
    ALL_IMAGES = "SELECT org_id, name, want, pinned, workers, labels, generation, at_ms FROM images";
    COPY_IMAGES = "INSERT INTO images (org_id, name, want, pinned, workers, labels, generation, at_ms) VALUES ($1, \
        $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (org_id, name) DO UPDATE SET want = excluded.want, pinned = \
        excluded.pinned, workers = excluded.workers, labels = excluded.labels, generation = excluded.generation, \
        at_ms = excluded.at_ms";
    ALL_BLOBS = "SELECT digest, kind, org_id, size_bytes, object, frame_at, stored_bytes, zstd, frame_bytes, raw_at, \
        created_at_ms, used_at_ms FROM blobs";
    COPY_BLOBS = "INSERT INTO blobs (digest, kind, org_id, size_bytes, object, frame_at, stored_bytes, zstd, \
        frame_bytes, raw_at, created_at_ms, used_at_ms) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ON \
        CONFLICT (digest, kind, org_id) DO UPDATE SET size_bytes = excluded.size_bytes, object = excluded.object, frame_at = \
        excluded.frame_at, stored_bytes = excluded.stored_bytes, zstd = excluded.zstd, frame_bytes = \
        excluded.frame_bytes, raw_at = excluded.raw_at, created_at_ms = excluded.created_at_ms, \
        used_at_ms = excluded.used_at_ms";
    ALL_IDEMPOTENCY = "SELECT org_id, caller, key, body, job_id, created_at_ms FROM idempotency";
    COPY_IDEMPOTENCY = "INSERT INTO idempotency (org_id, caller, key, body, job_id, created_at_ms) VALUES ($1, $2, \
        $3, $4, $5, $6) ON CONFLICT (key, caller, org_id) DO UPDATE SET body = excluded.body, job_id = \
        excluded.job_id, created_at_ms = excluded.created_at_ms";
    ALL_JOBS = "SELECT id, id_tail, org_id, version, state, phase, reason, attempt, worker_id, finished_at_ms, \
        state_json, spec, source, created_at_ms, created_by, events FROM jobs";
    COPY_JOBS = "INSERT INTO jobs (id, id_tail, org_id, version, state, phase, reason, attempt, worker_id, \
        finished_at_ms, state_json, spec, source, created_at_ms, created_by, events) VALUES ($1, $2, $3, $4, $5, $6, \
        $7, $8, $9, $10, $11, $12, $13, $14, $15, $16) ON CONFLICT (id) DO UPDATE SET id_tail = excluded.id_tail, \
        org_id = excluded.org_id, version = excluded.version, state = excluded.state, phase = excluded.phase, reason \
        = excluded.reason, attempt = excluded.attempt, worker_id = excluded.worker_id, finished_at_ms = \
        excluded.finished_at_ms, state_json = excluded.state_json, spec = excluded.spec, source = excluded.source, \
        created_at_ms = excluded.created_at_ms, created_by = excluded.created_by, events = excluded.events";
    ALL_ATTEMPTS = "SELECT job_id, attempt, org_id, worker_id, assigned_at_ms, ended_at_ms, outcome, end_json, \
        timings, teardown_ms, seq, log_len, facts, log_gone_at_ms, files_gone_at_ms FROM attempts";
    COPY_ATTEMPTS = "INSERT INTO attempts (job_id, attempt, org_id, worker_id, assigned_at_ms, ended_at_ms, outcome, \
        end_json, timings, teardown_ms, seq, log_len, facts, log_gone_at_ms, files_gone_at_ms) VALUES ($1, $2, $3, \
        $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15) ON CONFLICT (job_id, attempt) DO UPDATE SET org_id = excluded.org_id, worker_id = \
        excluded.worker_id, assigned_at_ms = excluded.assigned_at_ms, ended_at_ms = excluded.ended_at_ms, outcome = \
        excluded.outcome, end_json = excluded.end_json, timings = excluded.timings, teardown_ms = \
        excluded.teardown_ms, seq = excluded.seq, log_len = excluded.log_len, facts = excluded.facts, \
        log_gone_at_ms = excluded.log_gone_at_ms, files_gone_at_ms = excluded.files_gone_at_ms";
    ALL_EVENTS = "SELECT job_id, seq, org_id, at_ms, attempt, kind, state, phase, reason, worker_id, message, \
        artifact FROM events";
    COPY_EVENTS = "INSERT INTO events (job_id, seq, org_id, at_ms, attempt, kind, state, phase, reason, worker_id, \
        message, artifact) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ON CONFLICT (job_id, seq) DO \
        UPDATE SET org_id = excluded.org_id, at_ms = excluded.at_ms, attempt = excluded.attempt, kind = \
        excluded.kind, state = excluded.state, phase = excluded.phase, reason = excluded.reason, worker_id = \
        excluded.worker_id, message = excluded.message, artifact = excluded.artifact";
    ALL_ARTIFACTS = "SELECT job_id, attempt, path, org_id, size_bytes, sha256, mode, link FROM artifacts";
    COPY_ARTIFACTS = "INSERT INTO artifacts (job_id, attempt, path, org_id, size_bytes, sha256, mode, link) VALUES \
        ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (job_id, attempt, path) DO UPDATE SET org_id = excluded.org_id, \
        size_bytes = excluded.size_bytes, sha256 = excluded.sha256, mode = excluded.mode, link = excluded.link";
    ALL_TRASH = "SELECT object, root, at_ms, taken_at_ms, gone FROM trash";
    COPY_TRASH = "INSERT INTO trash (object, root, at_ms, taken_at_ms, gone) VALUES ($1, $2, $3, $4, $5) ON CONFLICT \
        (object) DO UPDATE SET root = excluded.root, at_ms = excluded.at_ms, taken_at_ms = excluded.taken_at_ms, gone \
        = excluded.gone";
    ALL_RETENTION = "SELECT org_id, jobs_days, artifacts_days, logs_days, sources_days FROM retention";
    COPY_RETENTION = "INSERT INTO retention (org_id, jobs_days, artifacts_days, logs_days, sources_days) VALUES ($1, \
        $2, $3, $4, $5) ON CONFLICT (org_id) DO UPDATE SET jobs_days = excluded.jobs_days, artifacts_days = \
        excluded.artifacts_days, logs_days = excluded.logs_days, sources_days = excluded.sources_days";
    ERASE_META = "DELETE FROM meta WHERE name = $1";
    ERASE_WORKERS = "DELETE FROM workers WHERE id = $1";
    ERASE_TOKENS = "DELETE FROM tokens WHERE id = $1";
    ERASE_MEMBERS = "DELETE FROM members WHERE user_id = $1 AND org_id = $2";
    ERASE_IMAGES = "DELETE FROM images WHERE org_id = $1 AND name = $2";
    ERASE_BLOBS = "DELETE FROM blobs WHERE digest = $1 AND kind = $2 AND org_id = $3";
    ERASE_IDEMPOTENCY = "DELETE FROM idempotency WHERE org_id = $1 AND caller = $2 AND key = $3";
    ERASE_JOBS = "DELETE FROM jobs WHERE id = $1";
    ERASE_ATTEMPTS = "DELETE FROM attempts WHERE job_id = $1 AND attempt = $2";
    ERASE_EVENTS = "DELETE FROM events WHERE job_id = $1 AND seq = $2";
    ERASE_ARTIFACTS = "DELETE FROM artifacts WHERE job_id = $1 AND attempt = $2 AND path = $3";
    ERASE_TRASH = "DELETE FROM trash WHERE object = $1";
    ERASE_RETENTION = "DELETE FROM retention WHERE org_id = $1";
    ALL_VERSIONS = "SELECT version FROM _sqlx_migrations ORDER BY version";
}

/// A table that a farm has on either engine.
pub(super) struct Table {
    name: &'static str,
    /// The first so many columns tell a row from all others.
    keys: usize,
    all: &'static str,
    pub(super) copy: Wide,
    erase: &'static str,
}

/// Of columns that each hold a text, an integer or a flag.
const fn kinds<const N: usize>(letters: &[u8; N]) -> [Kind; N] {
    let mut kinds = [Kind::Text; N];
    let mut at = 0;
    while at < N {
        kinds[at] = match letters[at] {
            b't' => Kind::Text,
            b'i' => Kind::Int,
            b'f' => Kind::Flag,
            _ => panic!("a column holds a text, an integer or a flag"),
        };
        at += 1;
    }
    kinds
}

macro_rules! tables {
    ($($name:literal $kinds:literal $keys:literal $all:ident $copy:ident $erase:ident;)+) => {
        [$(Table {
            name: $name,
            keys: $keys,
            all: $all,
            copy: Wide::new($copy, &const { kinds($kinds) }),
            erase: $erase,
        }),+]
    };
}

pub(super) static TABLES: [Table; 13] = tables! {
    "meta" b"tt" 1 ALL_META COPY_META ERASE_META;
    "workers" b"tttttttitftiif" 1 ALL_WORKERS COPY_WORKERS ERASE_WORKERS;
    "tokens" b"ttttttttiiit" 1 ALL_TOKENS COPY_TOKENS ERASE_TOKENS;
    "members" b"tttti" 2 ALL_MEMBERS COPY_MEMBERS ERASE_MEMBERS;
    "images" b"tttfttii" 2 ALL_IMAGES COPY_IMAGES ERASE_IMAGES;
    "blobs" b"tttitiifiiii" 3 ALL_BLOBS COPY_BLOBS ERASE_BLOBS;
    "idempotency" b"ttttti" 3 ALL_IDEMPOTENCY COPY_IDEMPOTENCY ERASE_IDEMPOTENCY;
    "jobs" b"tititttititttiti" 1 ALL_JOBS COPY_JOBS ERASE_JOBS;
    "attempts" b"tittiitttiiitii" 2 ALL_ATTEMPTS COPY_ATTEMPTS ERASE_ATTEMPTS;
    "events" b"titiittttttt" 2 ALL_EVENTS COPY_EVENTS ERASE_EVENTS;
    "artifacts" b"tittitit" 3 ALL_ARTIFACTS COPY_ARTIFACTS ERASE_ARTIFACTS;
    "trash" b"ttiif" 1 ALL_TRASH COPY_TRASH ERASE_TRASH;
    "retention" b"tiiii" 1 ALL_RETENTION COPY_RETENTION ERASE_RETENTION;
};

/// Rows of one commit.
const PAGE: usize = 1_024;

/// How many rows a table has, and a sum that says which, in whatever order they are read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub rows: u64,
    sum: [u64; 4],
}

impl Tally {
    fn add(&mut self, digest: &[u8; 32]) {
        self.rows += 1;
        for (sum, part) in self.sum.iter_mut().zip(digest.chunks_exact(8)) {
            let part = part.first_chunk().copied().unwrap_or_default();
            *sum = sum.wrapping_add(u64::from_le_bytes(part));
        }
    }
}

/// What each table holds.
pub type Tallies = Vec<(&'static str, Tally)>;

/// The rows that are there already: of each table, what a row's key hashes to, and what all of it does.
#[derive(Debug, Default)]
pub struct Known(HashMap<&'static str, HashMap<u128, u128>>);

fn short(digest: &[u8; 32]) -> u128 {
    u128::from_le_bytes(digest.first_chunk().copied().unwrap_or_default())
}

/// A connection to all tables of a farm.
pub enum Tables {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

impl Tables {
    /// Of a file that nobody writes.
    pub async fn file(path: &Path) -> Result<Self, OpenError> {
        let options = SqliteConnectOptions::new().filename(path).read_only(true).immutable(true);
        Ok(Self::Sqlite(options.disable_statement_logging().connect().await?))
    }

    /// Of a new file.
    pub async fn new_file(path: &Path) -> Result<Self, OpenError> {
        SqlStore::open_sqlite(path).await?.close().await;
        let options =
            SqliteConnectOptions::new().filename(path).foreign_keys(true).journal_mode(SqliteJournalMode::Delete);
        Ok(Self::Sqlite(options.disable_statement_logging().connect().await?))
    }

    pub async fn postgres(url: &str) -> Result<Self, OpenError> {
        Ok(Self::Postgres(plain_postgres(url).await?))
    }

    fn conn(&mut self) -> Conn<'_> {
        match self {
            Self::Sqlite(conn) => Conn::Sqlite(conn),
            Self::Postgres(conn) => Conn::Postgres(conn),
        }
    }

    /// Everything that is written until [`Tables::commit`] is written as a whole.
    pub async fn begin(&mut self) -> Result<(), OpenError> {
        self.conn().run("BEGIN", Args::new()).await?;
        Ok(())
    }

    /// Everything that is read from here on is as it is now.
    pub async fn hold_still(&mut self) -> Result<(), OpenError> {
        self.conn().run(HOLD_STILL, Args::new()).await?;
        Ok(())
    }

    /// Another connection to the same Postgres, which sees what this one does since it holds still.
    pub async fn another(&mut self, url: &str) -> Result<PgConnection, OpenError> {
        let row = self.conn().first(EXPORT_VIEW, Args::new()).await?;
        let view = row.map(|row| row.text_at(0)).transpose()?.flatten().unwrap_or_default();
        let mut other = plain_postgres(url).await?;
        sqlx::query(HOLD_STILL).execute(&mut other).await?;
        // It takes no parameter.
        sqlx::raw_sql(AssertSqlSafe(format!("SET TRANSACTION SNAPSHOT '{view}'"))).execute(&mut other).await?;
        Ok(other)
    }

    pub async fn commit(&mut self) -> Result<(), OpenError> {
        self.conn().run("COMMIT", Args::new()).await?;
        Ok(())
    }

    pub async fn close(self) -> Result<(), OpenError> {
        match self {
            Self::Sqlite(conn) => conn.close().await?,
            Self::Postgres(conn) => conn.close().await?,
        }
        Ok(())
    }

    /// The migrations that it has been through. None: nobody made a farm there.
    pub async fn versions(&mut self) -> Result<Vec<i64>, OpenError> {
        let read = match self {
            Self::Sqlite(conn) => sqlx::query_scalar(ALL_VERSIONS).fetch_all(conn).await,
            Self::Postgres(conn) => sqlx::query_scalar(ALL_VERSIONS).fetch_all(conn).await,
        };
        match read {
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some(UNDEFINED_TABLE) => Ok(Vec::new()),
            read => Ok(read?),
        }
    }

    /// Refuses a database with tables that this version does not know, and so would leave behind.
    pub async fn refuse_newer(&mut self) -> Result<(), OpenError> {
        let known = match self {
            Self::Sqlite(_) => sqlite_migrations(),
            Self::Postgres(_) => postgres_migrations(),
        };
        let found = self.versions().await?;
        match found.iter().find(|version| known.iter().all(|ours| ours.version != **version)) {
            Some(version) => Err(OpenError::Newer(*version)),
            None => Ok(()),
        }
    }

    pub async fn meta(&mut self, name: &str) -> Result<Option<String>, OpenError> {
        let row = self.conn().first(META, Args::new().text(name)).await?;
        Ok(row.map(|row| row.text_at(1)).transpose()?.flatten())
    }

    /// Counts all rows, and learns them.
    pub async fn tally(&mut self, mut known: Option<&mut Known>) -> Result<Tallies, OpenError> {
        let mut tallies = Vec::new();
        for table in &TABLES {
            let mut tally = Tally::default();
            let mut rows = rows(self, table);
            while let Some(row) = rows.try_next().await? {
                let args = args(&row, table)?;
                let digest = args.digest(table.name, table.copy.columns.len());
                tally.add(&digest);
                if let Some(known) = &mut known {
                    known.0.entry(table.name).or_default().insert(key(&args, table), short(&digest));
                }
            }
            tallies.push((table.name, tally));
        }
        Ok(tallies)
    }
}

const HOLD_STILL: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
/// What Postgres calls a table that is not there.
const UNDEFINED_TABLE: &str = "42P01";

fn key(args: &Args, table: &Table) -> u128 {
    short(&args.digest(table.name, table.keys))
}

fn rows<'a>(tables: &'a mut Tables, table: &'static Table) -> BoxStream<'a, Result<Row, sqlx::Error>> {
    match tables {
        Tables::Sqlite(conn) => sqlx::query(table.all).fetch(conn).map_ok(Row::Sqlite).boxed(),
        Tables::Postgres(conn) => sqlx::query(table.all).fetch(conn).map_ok(Row::Postgres).boxed(),
    }
}

fn args(row: &Row, table: &Table) -> Result<Args, sqlx::Error> {
    let mut args = Args::new();
    for (index, kind) in table.copy.columns.iter().enumerate() {
        args = match kind {
            Kind::Text => args.maybe_text(row.text_at(index)?),
            Kind::Int => args.maybe_int(row.int_at(index)?),
            Kind::Flag => args.maybe_flag(row.flag_at(index)?),
        };
    }
    Ok(args)
}

/// Makes `to` hold the rows of `from` and no others. What is known to be there as it is, is not written again.
pub async fn bring(from: &mut Tables, to: &mut Tables, known: &mut Known) -> Result<Tallies, OpenError> {
    let (mut tallies, mut stale) = (Vec::new(), Vec::new());
    for table in &TABLES {
        let (mut tally, mut page, mut waiting) = (Tally::default(), Args::new(), 0);
        let (mut before, mut now) = (known.0.remove(table.name).unwrap_or_default(), HashMap::new());
        let mut rows = rows(from, table);
        while let Some(row) = rows.try_next().await? {
            let args = args(&row, table)?;
            let (key, digest) = (key(&args, table), args.digest(table.name, table.copy.columns.len()));
            tally.add(&digest);
            now.insert(key, short(&digest));
            if before.remove(&key) == Some(short(&digest)) {
                continue;
            }
            page.append(args);
            waiting += 1;
            if waiting == PAGE {
                to.conn().run_wide(&table.copy, std::mem::take(&mut page)).await?;
                waiting = 0;
            }
        }
        to.conn().run_wide(&table.copy, page).await?;
        known.0.insert(table.name, now);
        tallies.push((table.name, tally));
        stale.push((table, before));
    }
    // What refers to a row goes before it.
    for (table, gone) in stale.into_iter().rev().filter(|(_, gone)| !gone.is_empty()) {
        erase(to, table, &gone).await?;
    }
    Ok(tallies)
}

/// Removes the rows with these keys.
async fn erase(to: &mut Tables, table: &'static Table, gone: &HashMap<u128, u128>) -> Result<(), OpenError> {
    let mut found = Vec::new();
    let mut rows = rows(to, table);
    while let Some(row) = rows.try_next().await? {
        let args = args(&row, table)?;
        if gone.contains_key(&key(&args, table)) {
            found.push(args.first(table.keys));
        }
    }
    drop(rows);
    for keys in found {
        to.conn().run(table.erase, keys).await?;
    }
    Ok(())
}

/// Copies all that a shared database holds now into a new file of the other engine.
pub async fn copy_to_file(from: &mut Tables, path: &Path) -> Result<(), OpenError> {
    let mut building = path.as_os_str().to_owned();
    building.push(".new");
    let building = std::path::PathBuf::from(building);
    let mut to = Tables::new_file(&building).await?;
    to.begin().await?;
    let told = bring(from, &mut to, &mut Known::default()).await?;
    to.commit().await?;
    let have = to.tally(None).await?;
    to.close().await?;
    if told != have {
        return Err(OpenError::Damaged { path: building, found: "it holds other rows than were written".to_owned() });
    }
    backup::copy_at_once(&building, path).await?;
    let gone = std::fs::remove_file(&building);
    gone.map_err(|error| OpenError::Io { path: building, error })
}
