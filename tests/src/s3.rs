//! An object store of the test's own: a real S3 server in this process over a temporary directory, which checks signatures, and
//! in front of it what networks and busy stores do.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, fs};

use alloy_shared::secret::Secret;
use anyhow::{Context as _, Result};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use orchestrator::config::S3 as Place;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

mod faults;

pub use faults::{Counts, Faults, Odds};

pub const BUCKET: &str = "farm-bytes";
pub const KEY_ID: &str = "AKIATEST";
pub const SECRET: &str = "thesecretofthetests";

pub struct S3 {
    pub address: SocketAddr,
    pub faults: Arc<Faults>,
    dir: TempDir,
    /// Dropped, it stops.
    _stop: DropGuard,
}

impl S3 {
    /// Starts on a free port, with one empty bucket and no faults.
    pub async fn start() -> Result<S3> {
        let dir = tempfile::Builder::new().prefix("alloy-s3-").tempdir()?;
        fs::create_dir(dir.path().join(BUCKET))?;
        let store = s3s_fs::FileSystem::new(dir.path()).map_err(|error| anyhow::anyhow!("{error:?}"))?;
        let mut builder = S3ServiceBuilder::new(store);
        builder.set_auth(SimpleAuth::from_single(KEY_ID, SECRET));
        let service = builder.build();
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let faults = Arc::new(Faults::default());
        let (shared, stop) = (faults.clone(), CancellationToken::new());
        let until = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // On a thread of its own: a test that waits for a program waits for no store.
        std::thread::spawn(move || {
            let serving = async { serve(TcpListener::from_std(listener)?, service, shared).await };
            runtime.block_on(until.run_until_cancelled(serving))
        });
        Ok(S3 { address, faults, dir, _stop: stop.drop_guard() })
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// As an orchestrator is told of it.
    pub fn place(&self, prefix: &str) -> Place {
        Place {
            bucket: BUCKET.to_owned(),
            prefix: prefix.to_owned(),
            endpoint: Some(self.endpoint()),
            region: "us-east-1".to_owned(),
            key_id: KEY_ID.to_owned(),
            secret: Secret::new(SECRET.to_owned()),
            presign: false,
        }
    }

    /// The same as variables.
    pub fn env(&self, prefix: &str) -> Vec<(String, String)> {
        let text = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let url = format!("s3://{BUCKET}/{prefix}");
        let pairs = [
            ("ALLOY_S3_URL", url.as_str()),
            ("ALLOY_S3_ENDPOINT", &self.endpoint()),
            ("AWS_ACCESS_KEY_ID", KEY_ID),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
        ];
        pairs.into_iter().map(text).collect()
    }

    /// The file behind an object, for whoever damages it.
    pub fn file(&self, key: &str) -> PathBuf {
        self.dir.path().join(BUCKET).join(key)
    }

    /// All objects of the bucket with their bytes, past all faults.
    pub fn objects(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut out = Vec::new();
        let root = self.dir.path().join(BUCKET);
        walk(&root, &mut |path| {
            let key = path.strip_prefix(&root)?.to_str().context("a key is text")?.to_owned();
            out.push((key, fs::read(path)?));
            Ok(())
        })?;
        out.sort();
        Ok(out)
    }

    /// Parts of uploads that were begun and neither finished nor dropped.
    pub fn stray_parts(&self) -> Result<Vec<String>> {
        let mut out = Vec::new();
        for entry in fs::read_dir(self.dir.path())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with(".upload_id-") {
                out.push(name);
            }
        }
        Ok(out)
    }
}

async fn serve(listener: TcpListener, service: S3Service, faults: Arc<Faults>) -> Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let (socket, _) = listener.accept().await?;
        let _ = socket.set_nodelay(true);
        let (service, faults) = (service.clone(), faults.clone());
        connections.spawn(async move {
            let answer = hyper::service::service_fn(move |request| {
                let (service, faults) = (service.clone(), faults.clone());
                async move { faults::answer(&service, &faults, request).await }
            });
            // A client that goes away, or a connection that is broken on purpose.
            let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), answer).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

fn walk(dir: &Path, each: &mut impl FnMut(&Path) -> Result<()>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { walk(&path, each)? } else { each(&path)? }
    }
    Ok(())
}

/// What a connection that is broken on purpose ends with.
#[derive(Debug)]
pub(crate) struct Broken;

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the connection breaks here")
    }
}

impl std::error::Error for Broken {}
