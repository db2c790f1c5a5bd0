//! S: the orchestrator as a library: what it is made of, and how it starts and stops.
//!
//! A request comes in through [`routes`], which knows who is calling ([`auth`]) and answers with problems ([`error`]).
//! It reads through [`store`] and changes things through [`ops`]; jobs change at the [`desk`] alone, which applies
//! [`job`], admits by [`admit`] and chooses by [`pick`], and whose loop ([`desk_loop`]) commits. What moved is told to
//! the workers' sessions ([`session`]) by [`hub`] and to followers ([`feed`]) by [`wake`]. Log bytes lie in [`logs`], which
//! [`log_sync`] makes durable; all other bytes lie in [`blobs`], many small ones in one [`pack`]. Where several
//! orchestrators share a farm, [`replica`] hears what the others did.
//! What is old goes by [`keep`], and [`gc`] removes it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use alloy_shared::env::{Env, Mono, Now};
use alloy_shared::id::Digest;
use alloy_shared::runtime::{Lifecycle, SystemEnv, random_bytes};
use alloy_shared::secret::{Secret, Token};
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::future::BoxFuture;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub mod admit;
mod app;
pub mod auth;
pub mod backup;
pub mod blobs;
pub mod broken;
pub mod config;
pub mod desk;
pub mod desk_loop;
pub mod error;
pub mod feed;
pub mod gc;
pub mod hub;
pub mod job;
pub mod keep;
mod listen;
pub mod log_sync;
pub mod logs;
pub mod moving;
pub mod ops;
pub mod pack;
pub mod pick;
pub mod program;
pub mod replica;
pub mod routes;
pub mod session;
pub mod store;
pub mod sums;
pub mod wake;

pub use app::{App, Ground};
use backup::restore::Past;
use blobs::Blobs;
use broken::{Broken, Care};
use config::{Config, Database};
use logs::{Chunks, Logs};
use store::sql::chunks::ChunkTable;
use store::sql::{DataLock, OpenError, SqlStore};
use store::{Group, Store, StoreError, Write};

/// The name under which the store keeps the farm's own secret.
pub const FARM_SECRET: &str = "farm_secret";

/// The name under which a shared store keeps where the farm's bytes lie.
const BYTES_PLACE: &str = "bytes_place";

/// A running orchestrator. It stops with the [`Lifecycle`] that it was given.
pub struct Served {
    pub addr: SocketAddr,
    pub base_url: String,
    /// Holds an admin's token from the first start on, readable by the owner alone.
    pub admin_token_file: PathBuf,
    pub app: Arc<App>,
}

/// Why it does not start. The text is for people.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("{0}")]
    Config(String),
    /// Another orchestrator has the data directory.
    #[error(transparent)]
    Lock(#[from] store::sql::LockError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The farm of this data directory is elsewhere.
    #[error(transparent)]
    Moved(#[from] moving::mark::MovedAway),
    /// Somebody restores a farm here.
    #[error(transparent)]
    Unfinished(#[from] backup::restore::Unfinished),
    #[error("{what}: {why}")]
    Start { what: String, why: String },
}

impl ServeError {
    /// True if it was told something that makes no sense anywhere: a start with the same configuration ends the same.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Config(_) => true,
            Self::Open(error) => error.is_usage(),
            Self::Lock(_) | Self::Store(_) | Self::Moved(_) | Self::Unfinished(_) | Self::Start { .. } => false,
        }
    }
}

fn start_error(what: impl Into<String>, why: impl std::fmt::Display) -> ServeError {
    ServeError::Start { what: what.into(), why: why.to_string() }
}

fn cannot_listen(at: SocketAddr, error: std::io::Error) -> ServeError {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            start_error(format!("cannot listen on {at}"), "another program does; --listen ADDR:PORT takes another port")
        }
        _ => start_error(format!("cannot listen on {at}"), error),
    }
}

/// Starts an orchestrator: lock, open, restore, listen. When it returns, requests are answered.
pub async fn serve(config: Config, env: Arc<SystemEnv>, life: Lifecycle) -> Result<Served, ServeError> {
    config.check().map_err(ServeError::Config)?;
    let dir = config.farm_dir();
    let lock = DataLock::acquire(&dir)?;
    if config.database == Database::Local {
        moving::mark::check(&dir)?;
        backup::restore::check(&dir)?;
    }
    let mark = |error| start_error("the mark of a restored farm", error);
    let here = backup::restore::wait(&dir, &config.limits, &*env, &life).await.map_err(mark)?;
    let sql = Arc::new(unless_stopped(&life, open(&config)).await??);
    let there = check_target(&sql, &config, &*env, &life).await?;
    if here == Past::Stopped || there == Past::Stopped {
        return Err(start_error("told to stop", "nothing was begun"));
    }
    let listener = TcpListener::bind(config.listen).await.map_err(|error| cannot_listen(config.listen, error))?;
    let addr = listener.local_addr().map_err(|error| start_error("the listening socket", error))?;

    let background = life.hard.child_token();
    let system = env;
    let env: Arc<dyn Env> = Arc::new(TaskEnv { system: system.clone(), until: background.clone() });
    let broken = sql.broken();
    let ground = ground(&config, addr, &sql, env, life.soft.clone(), broken.clone()).await?;
    let app = App::on(ground).await?;
    if here == Past::Restored {
        app.let_go_of_leases().await;
        backup::restore::forget(&dir).map_err(mark)?;
    }
    if there == Past::Restored {
        unless_stopped(&life, forget_restored(&app)).await??;
    }
    let admin_token_file = dir.join("admin.token");
    let made = ops::access::first_token(&app, async |token| write_private(&admin_token_file, token)).await;
    if made.map_err(|error| start_error("the first token", error))? {
        tracing::info!("a new admin token is in {}", admin_token_file.display());
    }

    app.begin();
    let failing = life.clone();
    let watch = async move {
        broken.told().await;
        failing.fail();
        failing.hard.cancel();
    };
    app.env.spawn("broken", Box::pin(watch));
    let stop = Stop { life, background, sql, _lock: lock };
    system.spawn("http", Box::pin(run(app.clone(), listener, stop)));
    tracing::info!("listening on http://{addr}, data in {}", dir.display());
    Ok(Served { addr, base_url: app.base_url.clone(), admin_token_file, app })
}

/// Some of a start waits for other orchestrators.
async fn unless_stopped<T>(life: &Lifecycle, work: impl Future<Output = T>) -> Result<T, ServeError> {
    tokio::select! {
        biased;
        () = life.soft.cancelled() => Err(start_error("told to stop", "nothing was begun")),
        done = work => Ok(done),
    }
}

/// What is let go of at the end, in this order.
struct Stop {
    life: Lifecycle,
    background: CancellationToken,
    sql: Arc<SqlStore>,
    _lock: DataLock,
}

/// Answers requests until the soft stop, then ends in order: workers are told to come back, open requests end, log bytes
/// become durable, the tasks behind them end, the database closes.
async fn run(app: Arc<App>, listener: TcpListener, stop: Stop) {
    let grace_ms = app.limits.stop_ms / 2;
    let router = routes::router(app.clone());
    let connections = TaskTracker::new();
    let listening = listen::serve(listener, router, connections.clone(), app.stopping.clone(), grace_ms);
    let goodbyes = async {
        app.stopping.cancelled().await;
        app.say_goodbye(grace_ms).await
    };
    tokio::select! {
        biased;
        () = stop.life.hard.cancelled() => {}
        ((), said) = async { tokio::join!(listening, goodbyes) } => {
            if !said {
                tracing::warn!("sessions of workers did not end in time and are cut");
            }
        }
    }
    app.settle().await;
    stop.background.cancel();
    if let Some(shared) = &app.shared
        && let Err(error) = shared.forget().await
    {
        tracing::warn!(%error, "the other orchestrators wait for this one for a moment");
    }
    stop.sql.close().await;
}

async fn ground(
    config: &Config,
    addr: SocketAddr,
    sql: &Arc<SqlStore>,
    env: Arc<dyn Env>,
    stopping: CancellationToken,
    broken: Broken,
) -> Result<Ground, ServeError> {
    let dir = config.farm_dir();
    let care = Care { floor: config.limits.disk_floor, reserve: config.limits.disk_reserve(), broken };
    let secret = farm_secret(&**sql).await?;
    let bucket = config.s3.as_ref().map(config::S3::url);
    if sql.shared().is_some() {
        check_place(&**sql, &dir, bucket.as_deref()).await?;
    }
    let blobs = Arc::new(blobs(config, &dir, care.clone(), env.clone()).await?);
    if let Some(bucket) = &config.s3 {
        // Before anything is written down about the place.
        own(&blobs, &bucket.url(), &secret).await?;
        blobs::mark::set(&dir, &bucket.url()).map_err(|error| start_error("the farm's objects", error))?;
    }
    let logs = match sql.shared() {
        Some(shared) => Logs::Chunks(Chunks::new(ChunkTable(shared.pool().clone()), blobs.clone())),
        None => Logs::open(dir.join("logs"), care).map_err(|error| start_error("the log directory", error))?,
    };
    if sql.shared().is_some() {
        set_place(&**sql, &dir, bucket.as_deref()).await?;
    }
    Ok(Ground {
        logs,
        blobs,
        secret,
        shared: sql.shared().cloned(),
        store: sql.clone(),
        sign_in: sign_in(config, env.clone())?,
        env,
        limits: config.limits.clone(),
        keep: config.keep,
        base_url: config.url(addr),
        behind_proxy: config.behind_proxy,
        random: random_bytes,
        stopping,
    })
}

fn sign_in(config: &Config, env: Arc<dyn Env>) -> Result<Option<auth::sign_in::SignIn>, ServeError> {
    let made = config.supabase.as_ref().map(|supabase| auth::sign_in::SignIn::new(supabase, env)).transpose();
    made.map_err(|error| start_error("signing in with Supabase", error))
}

/// The database: a file of this orchestrator's own, or one that others may share.
async fn open(config: &Config) -> Result<SqlStore, ServeError> {
    match &config.database {
        Database::Local => Ok(SqlStore::open_sqlite(&config.farm_dir().join("alloy.db")).await?),
        Database::Postgres(url) => {
            let me = format!("orc_{:032x}", u128::from_le_bytes(random_bytes()));
            Ok(SqlStore::open_shared(url.expose(), me).await?)
        }
    }
}

/// A database that others may share holds a whole farm, and perhaps one that was restored a moment ago.
async fn check_target(sql: &SqlStore, config: &Config, env: &dyn Env, life: &Lifecycle) -> Result<Past, ServeError> {
    if sql.shared().is_none() {
        return Ok(Past::Own);
    }
    if !moving::check_whole(sql).await? {
        let why = "a farm is being moved into it, and is not whole there: run `alloy admin migrate-db` or `alloy admin restore` \
                   again, to its end";
        return Err(start_error("the database", why));
    }
    match sql.meta(moving::RESTORED).await? {
        Some(at) => Ok(backup::restore::wait_since(&at, &config.limits, env, life).await),
        None => Ok(Past::Own),
    }
}

/// Of several orchestrators that start at once only one lets go of what the farm of the backup held.
async fn forget_restored(app: &Arc<App>) -> Result<(), ServeError> {
    let Some(shared) = &app.shared else { return Ok(()) };
    // Whoever comes while one lets go waits, and finds that it is done: what is given out by then is not let go of.
    let _turn = store::sql::target::one_after_another(shared.pool()).await?;
    if app.store.meta(moving::RESTORED).await?.is_some() {
        app.let_go_of_leases().await;
        store::sql::target::forget_restored(shared.pool()).await?;
    }
    Ok(())
}

/// All orchestrators of a farm must find each other's bytes. The first one finds nothing said.
async fn check_place(store: &dyn Store, dir: &Path, bucket: Option<&str>) -> Result<(), ServeError> {
    let Some(kept) = store.meta(BYTES_PLACE).await? else { return Ok(()) };
    blobs::mark::compare_books(&kept, dir, bucket).map_err(|error| start_error("the farm's objects", error))
}

/// Says where they lie, once it is known that they may lie there.
async fn set_place(store: &dyn Store, dir: &Path, bucket: Option<&str>) -> Result<(), ServeError> {
    let place = bytes_place(dir, bucket).map_err(|error| start_error("the farm's objects", error))?;
    store.commit(&[Group(vec![Write::AddMeta { name: BYTES_PLACE, value: place }])]).await?;
    check_place(store, dir, bucket).await
}

/// Where a farm's bytes lie, as a database says it that others share.
fn bytes_place(dir: &Path, bucket: Option<&str>) -> Result<String, blobs::mark::Elsewhere> {
    match bucket {
        Some(bucket) => Ok(bucket.to_owned()),
        None => blobs::mark::files_of(dir, || u128::from_le_bytes(random_bytes())),
    }
}

/// Where the farm's objects lie.
async fn blobs(config: &Config, dir: &Path, care: Care, env: Arc<dyn Env>) -> Result<Blobs, ServeError> {
    let elsewhere = |error| start_error("the farm's objects", error);
    let url = config.s3.as_ref().map(config::S3::url);
    // Files stay where they were when a farm is moved to a bucket.
    let moved = moving::mark::gone(dir)?.and_then(|gone| gone.bucket);
    if url.is_none() || moved != url {
        blobs::mark::compare(dir, url.as_deref()).map_err(elsewhere)?;
    }
    let Some(place) = &config.s3 else {
        let blobs = Blobs::open(dir.join("blobs"), env.now().wall, care).await;
        return blobs.map_err(|error| start_error("the blob directory", error));
    };
    let blobs = Blobs::open_s3(place, dir.join("spool"), care, env).await;
    let blobs = blobs.map_err(|error| start_error("the farm's objects", error))?;
    tracing::info!("objects lie in {}", place.place());
    Ok(blobs)
}

/// Which farm it is, for those who may know that but not its secret, which is given as the store keeps it.
pub(crate) fn farm_mark(secret: &str) -> Digest {
    Digest::of(secret.as_bytes())
}

/// A bucket has the objects of one farm.
async fn own(blobs: &Blobs, bucket: &str, secret: &Secret<[u8; 32]>) -> Result<(), ServeError> {
    match blobs.claim(&farm_mark(&BASE64.encode(secret.expose()))).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(start_error(
            "the farm's objects",
            format!("{}; say ALLOY_S3_URL=s3://BUCKET/PREFIX", moving::MoveError::NotOurs(bucket.to_owned())),
        )),
        Err(error) => Err(start_error("the farm's objects", error)),
    }
}

/// The secret under which grants are made; the first start throws it.
async fn farm_secret(store: &dyn Store) -> Result<Secret<[u8; 32]>, ServeError> {
    let fresh = BASE64.encode(random_bytes::<32>());
    // The first value stays, so this changes nothing from the second start on.
    store.commit(&[Group(vec![Write::AddMeta { name: FARM_SECRET, value: fresh }])]).await?;
    let kept = store.meta(FARM_SECRET).await?.unwrap_or_default();
    let bytes = BASE64.decode(kept).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    bytes.map(Secret::new).ok_or_else(|| start_error("the farm's secret", "it is damaged; restore the database"))
}

/// Writes a token where only the owner reads it: whole or not at all.
fn write_private(path: &Path, token: &Token) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let new = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    writeln!(file, "{}", token.expose())?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    blobs::sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// The system, with tasks that end when their orchestrator does.
struct TaskEnv {
    system: Arc<SystemEnv>,
    until: CancellationToken,
}

#[async_trait]
impl Env for TaskEnv {
    fn now(&self) -> Now {
        self.system.now()
    }
    async fn sleep_until(&self, at: Mono) {
        self.system.sleep_until(at).await;
    }
    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>) {
        let until = self.until.clone();
        let task = async move {
            // `None`: it was dropped, which is how a task without an end of its own ends.
            let _ = until.run_until_cancelled(task).await;
        };
        self.system.spawn(name, Box::pin(task));
    }
    fn dice(&self) -> u64 {
        self.system.dice()
    }
}

#[cfg(test)]
mod tests;
