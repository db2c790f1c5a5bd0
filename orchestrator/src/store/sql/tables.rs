//! S: all rows of a farm, read from one engine and written to the other: for backups, and for farms that move.

use std::collections::HashSet;
use std::path::Path;

use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use sqlx::postgres::PgConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode};
use sqlx::{ConnectOptions as _, Connection as _};

use super::conn::{Args, Conn, Row, Wide};
use super::open::{OpenError, plain_postgres};
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
    CLEAR_MEMBERS = "DELETE FROM members";
    ALL_IMAGES = "SELECT org_id, name, want, pinned, workers, labels, generation, at_ms FROM images";
    COPY_IMAGES = "INSERT INTO images (org_id, name, want, pinned, workers, labels, generation, at_ms) VALUES ($1, \
        $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (org_id, name) DO UPDATE SET want = excluded.want, pinned = \
        excluded.pinned, workers = excluded.workers, labels = excluded.labels, generation = excluded.generation, \
        at_ms = excluded.at_ms";
    CLEAR_IMAGES = "DELETE FROM images";
    ALL_BLOBS = "SELECT digest, kind, org_id, size_bytes, object, frame_at, stored_bytes, zstd, frame_bytes, raw_at, \
        created_at_ms FROM blobs";
    COPY_BLOBS = "INSERT INTO blobs (digest, kind, org_id, size_bytes, object, frame_at, stored_bytes, zstd, \
        frame_bytes, raw_at, created_at_ms) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT \
        (digest, kind, org_id) DO UPDATE SET size_bytes = excluded.size_bytes, object = excluded.object, frame_at = \
        excluded.frame_at, stored_bytes = excluded.stored_bytes, zstd = excluded.zstd, frame_bytes = \
        excluded.frame_bytes, raw_at = excluded.raw_at, created_at_ms = excluded.created_at_ms";
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
        timings, teardown_ms, seq, log_len, facts FROM attempts";
    COPY_ATTEMPTS = "INSERT INTO attempts (job_id, attempt, org_id, worker_id, assigned_at_ms, ended_at_ms, outcome, \
        end_json, timings, teardown_ms, seq, log_len, facts) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, \
        $12, $13) ON CONFLICT (job_id, attempt) DO UPDATE SET org_id = excluded.org_id, worker_id = \
        excluded.worker_id, assigned_at_ms = excluded.assigned_at_ms, ended_at_ms = excluded.ended_at_ms, outcome = \
        excluded.outcome, end_json = excluded.end_json, timings = excluded.timings, teardown_ms = \
        excluded.teardown_ms, seq = excluded.seq, log_len = excluded.log_len, facts = excluded.facts";
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
}

/// A table that a farm has on either engine.
struct Table {
    name: &'static str,
    /// What each column holds: a text, an integer or a flag.
    kinds: &'static [u8],
    all: &'static str,
    copy: Wide,
    /// Of a table whose rows may go.
    clear: Option<&'static str>,
}

static TABLES: [Table; 11] = [
    Table { name: "meta", kinds: b"tt", all: ALL_META, copy: Wide::new(COPY_META, 2), clear: None },
    Table {
        name: "workers",
        kinds: b"tttttttitftiif",
        all: ALL_WORKERS,
        copy: Wide::new(COPY_WORKERS, 14),
        clear: None,
    },
    Table { name: "tokens", kinds: b"ttttttttiiit", all: ALL_TOKENS, copy: Wide::new(COPY_TOKENS, 12), clear: None },
    Table {
        name: "members",
        kinds: b"tttti",
        all: ALL_MEMBERS,
        copy: Wide::new(COPY_MEMBERS, 5),
        clear: Some(CLEAR_MEMBERS),
    },
    Table {
        name: "images",
        kinds: b"tttfttii",
        all: ALL_IMAGES,
        copy: Wide::new(COPY_IMAGES, 8),
        clear: Some(CLEAR_IMAGES),
    },
    Table { name: "blobs", kinds: b"tttitiifiii", all: ALL_BLOBS, copy: Wide::new(COPY_BLOBS, 11), clear: None },
    Table {
        name: "idempotency",
        kinds: b"ttttti",
        all: ALL_IDEMPOTENCY,
        copy: Wide::new(COPY_IDEMPOTENCY, 6),
        clear: None,
    },
    Table { name: "jobs", kinds: b"tititttititttiti", all: ALL_JOBS, copy: Wide::new(COPY_JOBS, 16), clear: None },
    Table {
        name: "attempts",
        kinds: b"tittiitttiiit",
        all: ALL_ATTEMPTS,
        copy: Wide::new(COPY_ATTEMPTS, 13),
        clear: None,
    },
    Table { name: "events", kinds: b"titiittttttt", all: ALL_EVENTS, copy: Wide::new(COPY_EVENTS, 12), clear: None },
    Table {
        name: "artifacts",
        kinds: b"tittitit",
        all: ALL_ARTIFACTS,
        copy: Wide::new(COPY_ARTIFACTS, 8),
        clear: None,
    },
];

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

/// The rows that are there already, by a part of their digest.
#[derive(Debug, Default)]
pub struct Known(HashSet<u128>);

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
        self.conn().run("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", Args::new()).await?;
        Ok(())
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

    /// Counts all rows, and learns them.
    pub async fn tally(&mut self, mut known: Option<&mut Known>) -> Result<Tallies, OpenError> {
        let mut tallies = Vec::new();
        for table in &TABLES {
            let mut tally = Tally::default();
            let mut rows = rows(self, table);
            while let Some(row) = rows.try_next().await? {
                let digest = args(&row, table)?.digest(table.name);
                tally.add(&digest);
                if let Some(known) = &mut known {
                    known.0.insert(short(&digest));
                }
            }
            tallies.push((table.name, tally));
        }
        Ok(tallies)
    }
}

fn rows<'a>(tables: &'a mut Tables, table: &'static Table) -> BoxStream<'a, Result<Row, sqlx::Error>> {
    match tables {
        Tables::Sqlite(conn) => sqlx::query(table.all).fetch(conn).map_ok(Row::Sqlite).boxed(),
        Tables::Postgres(conn) => sqlx::query(table.all).fetch(conn).map_ok(Row::Postgres).boxed(),
    }
}

fn args(row: &Row, table: &Table) -> Result<Args, sqlx::Error> {
    let mut args = Args::new();
    for (index, kind) in table.kinds.iter().enumerate() {
        args = match kind {
            b't' => args.maybe_text(row.text_at(index)?),
            b'i' => args.maybe_int(row.int_at(index)?),
            _ => args.maybe_flag(row.flag_at(index)?),
        };
    }
    Ok(args)
}

/// Writes every row of `from` that is not known to be there. Tables whose rows may go are written anew.
pub async fn bring(from: &mut Tables, to: &mut Tables, known: &mut Known) -> Result<Tallies, OpenError> {
    let mut tallies = Vec::new();
    for table in &TABLES {
        let (mut tally, mut page, mut waiting) = (Tally::default(), Args::new(), 0);
        if let Some(clear) = table.clear {
            to.conn().run(clear, Args::new()).await?;
        }
        let mut rows = rows(from, table);
        while let Some(row) = rows.try_next().await? {
            let args = args(&row, table)?;
            let digest = args.digest(table.name);
            tally.add(&digest);
            if !known.0.insert(short(&digest)) && table.clear.is_none() {
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
        tallies.push((table.name, tally));
    }
    Ok(tallies)
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
